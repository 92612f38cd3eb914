"""Runs the demo; exits 0 only if every expectation held."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from distroml.cli.context import console, printable
from distroml.cli.progress import JobProgress, render
from distroml.cli.watch import PlainLines
from distroml.client import Json
from distroml.demo import report
from distroml.demo.leftovers import Mark
from distroml.demo.story import EVERY_N_STEPS, DemoFailed, Facts, Story
from distroml.errors import DistroMLError
from distroml.local_cluster import LocalCluster

if TYPE_CHECKING:
    from rich.console import RenderableType

NODES = 3
SLOTS = 2
TIMEOUT_S = 210.0
"""For the story; stopping the nodes takes at most half a minute more."""
DEFAULT_STEPS = 1200
LEAST_STEPS = 8 * EVERY_N_STEPS
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
PICTURES_PER_S = 8
MAX_SAID = 12


class Screen:
    """Shows the story's lines and the job: a live picture on a terminal, lines elsewhere."""

    def __init__(self, stack: ExitStack) -> None:
        self._begun = time.monotonic()
        self._plain = PlainLines(self._stamp)
        self._progress: JobProgress | None = None
        self._said: deque[str] = deque(maxlen=MAX_SAID)
        self._live = sys.stdout.isatty()
        if self._live:
            from rich.live import Live

            stack.enter_context(
                Live(
                    get_renderable=self._picture,
                    console=console(),
                    refresh_per_second=PICTURES_PER_S,
                )
            )

    def say(self, text: str) -> None:
        """One line of the story."""
        self._said.append(f"{self._stamp()} {printable(text)}")
        if not self._live:
            self._plain.say(text)

    def _stamp(self) -> str:
        return f"{time.monotonic() - self._begun:6.1f} s "

    def watch(self, progress: JobProgress, event: Json) -> None:
        """Something happened to the job."""
        self._progress = progress
        if not self._live:
            self._plain.show(progress, event)

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        said = [Text(line) for line in tuple(self._said)]
        return Group(*said, Text(), render(self._progress)) if self._progress else Group(*said)


async def perform(cluster: LocalCluster, mark: Mark, facts: Facts, screen: Screen) -> str:
    """Run the story within its time; returns what went wrong, empty if nothing did."""
    story = Story(cluster, mark, facts, screen.say, screen.watch)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await story.run()
    except TimeoutError as error:
        if str(error):
            return str(error)
        return f"Not finished after {TIMEOUT_S:.0f} s; it was waiting for {story.awaited}."
    except DemoFailed as error:
        return f"{error}."
    except DistroMLError as error:
        return f"While waiting for {story.awaited}: {error.detail}"
    finally:
        facts.wall_s = round(time.time() - facts.started_at, 2)
    return ""


def main() -> int:
    """Parse the options, run, clean up, report."""
    options = _options()
    for name in [name for name in os.environ if name.startswith("DISTROML_")]:
        del os.environ[name]  # settings of the user's own nodes
    root = Path(tempfile.mkdtemp(prefix="distroml-demo-"))
    mark = Mark()
    cluster = LocalCluster(root, nodes=NODES, slots=SLOTS, environ=mark.environ)
    facts = Facts(started_at=time.time(), seed=options.seed, steps=options.steps)
    held, interrupted, trouble = False, False, ""
    mark.post_sentry()
    try:
        with ExitStack() as stack:
            screen = Screen(stack)
            trouble = asyncio.run(perform(cluster, mark, facts, screen))
        verdicts = report.judge(facts, cluster.copies)
        held = not trouble and all(one.held for one in verdicts)
        report.show(facts, verdicts)
        if options.json is not None:
            report.write_json(options.json, facts, verdicts)
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
    finally:
        _end(cluster, mark)
        if not held and not interrupted:
            print(f"\n{cluster.log_tails()}", file=sys.stderr)
        if (held or interrupted) and not options.keep:
            shutil.rmtree(root, ignore_errors=True)
        else:
            print(f"\nData and logs are in {root}")
    if interrupted:
        print("Interrupted; all nodes are stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{'Everything held.' if held else 'FAILED. ' + trouble}")
    return 0 if held else EXIT_FAILED


def _end(cluster: LocalCluster, mark: Mark) -> None:
    """Whatever still runs (after a second Ctrl-C, say) ends here."""
    for node in cluster.nodes.values():
        node.kill()
    if left := mark.kill_all():
        print(f"Killed {len(left)} processes that were left: {left}", file=sys.stderr)
    mark.dismiss_sentry()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m distroml.demo",
        description="Three nodes on this machine train a network on handwritten digits; one worker and then the "
        "leader are killed. Exits 0 only if everything was recovered from.",
    )
    parser.add_argument("--keep", action="store_true", help="keep the nodes' data and logs")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="training steps (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    if options.steps < LEAST_STEPS:
        parser.error(f"--steps must be at least {LEAST_STEPS}: both faults must fall into training")
    return options


if __name__ == "__main__":
    sys.exit(main())
