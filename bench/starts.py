"""What it costs to import, to ask for the version, and to start a node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

from bench.processes import Cost, run_to_end, start_cost
from bench.table import Aim, Row, compare
from distroml.local_cluster import free_ports

NOTHING = ("-c", "pass")
IMPORT = ("-c", "import sys, distroml; sys.exit('torch' in sys.modules)")
VERSION = ("-m", "distroml.cli.main", "--version")
BARE_APP = dedent("""
    import sys
    from aiohttp import web

    async def ready(request):
        return web.json_response({"ready": True})

    app = web.Application()
    app.router.add_get("/ready", ready)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
""")


def commands(runs: int) -> list[Row]:
    """``import distroml`` (which must not import torch) and ``distroml --version`` beside an empty program."""
    rounds = [
        (run_to_end(NOTHING), run_to_end(IMPORT), run_to_end(VERSION)) for _ in range(1 + runs)
    ]
    nothing, imported, version = ([costs[i] for costs in rounds[1:]] for i in range(3))
    return [
        *_rows("import distroml", imported, "python -c pass", nothing, cpu=Aim("ours", "<", 0.2)),
        *_rows("distroml --version", version, "python -c pass", nothing, cpu=Aim("ours", "<", 0.5)),
    ]


def node(runs: int, directory: Path) -> list[Row]:
    """``distroml-node`` with no slots, from nothing to /ready = 200, beside a bare aiohttp application."""
    ours: list[Cost] = []
    bare: list[Cost] = []
    for number in range(1 + runs):
        port, other = free_ports(2)
        place, log = directory / f"node-{number}", directory / f"start-{number}.log"
        arguments = ["-m", "distroml.node", "--slots", "0", "--http", f"127.0.0.1:{port}"]
        arguments += ["--name", "a", "--data-dir", str(place), "--store-dir", str(place / "store")]
        ours.append(start_cost(arguments, port, "/ready", log))
        bare.append(start_cost(["-c", BARE_APP, str(other)], other, "/ready", log))
    name = "bare aiohttp app"
    return _rows("distroml-node to ready", ours[1:], name, bare[1:], cpu=Aim("ours", "<", 1.0))


def _rows(
    what: str, ours: Sequence[Cost], peer_name: str, peer: Sequence[Cost], cpu: Aim
) -> list[Row]:
    return [
        compare(
            f"{what}: CPU",
            "s",
            "lower",
            ours=[cost.cpu_s for cost in ours],
            peer_name=peer_name,
            peer=[cost.cpu_s for cost in peer],
            aim=cpu,
        ),
        compare(
            f"{what}: wall",
            "s",
            "lower",
            ours=[cost.wall_s for cost in ours],
            peer_name=peer_name,
            peer=[cost.wall_s for cost in peer],
        ),
    ]
