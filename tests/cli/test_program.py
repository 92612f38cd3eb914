"""The command line as a process: exit codes, signals, pipes, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.api import Api, job
from tests.cli.conftest import finish, program
from tests.fake_nodes import Answer, FakeNode

Serve = Callable[[Answer], FakeNode]


@pytest.mark.parametrize(
    ("tokens", "code"),
    [(["--version"], 0), (["jobs", "--bad"], 2), (["jobs", "--url", "http://127.0.0.1:1"], 5)],
)
def test_exit_codes(tokens: list[str], code: int) -> None:
    result = finish(program(*tokens))
    assert result.code == code
    assert "Traceback" not in result.err


def test_an_invalid_file_exits_2_and_an_unknown_job_3(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text("resources.workers = -1")
    result = finish(program("submit", file))
    assert result.code == 2
    assert str(file) in result.err
    assert "resources.workers" in result.err
    assert finish(program("job", "none", "--url", serve(Api()).url)).code == 3


def test_the_nodes_come_from_the_environment(serve: Serve) -> None:
    node = serve(Api(job("job-1")))
    environment = {**os.environ, "DISTROML_URL": f"http://127.0.0.1:1,{node.url}"}
    result = finish(program("jobs", "--json", env=environment))
    assert [one["job_id"] for one in json.loads(result.out)["jobs"]] == ["job-1"]


def test_a_specification_may_come_through_a_pipe(serve: Serve) -> None:
    process = program("submit", "-", "--url", serve(Api()).url, stdin=subprocess.PIPE)
    out, err = process.communicate("name: piped\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "piped" in out


def test_ctrl_c_ends_a_watch_at_once_and_leaves_the_job(serve: Serve) -> None:
    api = Api(job("job-1"))
    api.end = False
    node = serve(api)
    process = program("watch", "job-1", "--url", node.url)
    assert process.stdout is not None
    assert "all train" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 130
    assert "The job goes on" in result.err
    assert "Traceback" not in result.err
    assert {asked[0] for asked in node.asked} == {"GET"}


def test_a_reader_that_leaves_is_no_error(serve: Serve) -> None:
    url = serve(Api(*(job(f"job-{number}") for number in range(3000)))).url
    process = program("jobs", "--json", "--limit", "10000", "--url", url)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_start_up_leaves_out_what_is_heavy() -> None:
    code = "import sys, distroml.cli.main; print([m for m in ('aiohttp', 'torch', 'numpy', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
