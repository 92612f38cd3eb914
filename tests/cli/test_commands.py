"""Each command in this process: what it prints, as tables and as JSON, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distroml.cli.main import _COMMANDS, EPILOGUE
from tests.cli.api import LINES, METRIC, PLAIN_FILE, STATE, Api, job
from tests.cli.conftest import Cli
from tests.fake_nodes import Answer, FakeNode, problem

Serve = Callable[[Answer], FakeNode]
ONE = job("job-1", "alpha")
END = {"type": "end", "status": "COMPLETED", "reason": "", "cursor": "9"}


@pytest.fixture
def url(serve: Serve) -> str:
    return serve(Api(ONE)).url


def lines(text: str) -> list[object]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["jobs"], ["job-1", "alpha", "RUNNING", "5/10", "because"]),
        (["job", "job-1"], ["job-1", "because", "TRAINING"]),
        (["logs", "job-1"], ["[0] first", "[1] second"]),
        (["checkpoint", "list", "job-1"], ["2.0 KiB", "COMMITTED", "0.125", "job-1/run-1/x"]),
        (["checkpoint", "show", "job-1"], ["model.weight", "[2, 2]", "worker_0", "next batch 5"]),
        (["checkpoint", "verify", "job-1"], ["as committed"]),
        (["checkpoint", "now", "job-1"], ["Step 5 is committed", "2.0 KiB"]),
        (["checkpoint", "now", "job-1", "--no-wait"], ["Asked", "5 steps"]),
        (["checkpoint", "rm", "job-1", "--step", "5"], ["step 5", "is removed"]),
        (["checkpoint", "import", "local"], ["job-7", "run-7", "20"]),
        (
            ["incidents", "job-1"],
            ["worker 2 exited by SIGKILL", "200.25", "31.5", "1 → 2", "rank 3"],
        ),
        (["drain", "b"], ["b", "DRAINING"]),
        (["drain", "b", "--undo"], ["b", "ALIVE"]),
        (["nodes"], ["leader", "1/2", "http://a:1", "12%"]),
        (["cluster"], ["a, term 4", "1 of 1 alive", "1 of 2 in use", "1 RUNNING"]),
        (["leader"], ["a, term 4, http://a:1"]),
        (["leader", "b"], ["b, term 5"]),
        (["cancel", "job-1"], ["job-1 (alpha) is cancelled"]),
        (["stop", "job-1"], ["job-1 (alpha) stops"]),
    ],
)
def test_people_see_what_matters(cli: Cli, url: str, tokens: list[str], shown: list[str]) -> None:
    result = cli(*tokens, "--url", url)
    assert (result.code, result.err) == (0, "")
    for part in shown:
        assert part in result.out


@pytest.mark.parametrize(
    ("tokens", "document"),
    [
        (["jobs"], {"jobs": [ONE], "next_cursor": None}),
        (["job", "job-1"], ONE),
        (["logs", "job-1", "--rank", "1"], {"job_id": "job-1", "lines": LINES[1:]}),
        (["cancel", "job-1"], {**ONE, "status": "CANCELLED"}),
        (["stop", "job-1"], {**ONE, "status": "STOPPING"}),
    ],
)
def test_programs_get_the_document_of_the_api(
    cli: Cli, url: str, tokens: list[str], document: object
) -> None:
    result = cli("--json", "--url", url, *tokens)
    assert result.code == 0
    assert json.loads(result.out) == document


def test_a_job_goes_by_id_prefix_or_name(cli: Cli, serve: Serve) -> None:
    url = serve(Api(job("job-11", "x"), job("job-12", "y"), job("other", "y"))).url
    for reference, job_id in (("job-11", "job-11"), ("ot", "other"), ("x", "job-11")):
        assert json.loads(cli("job", reference, "--json", "--url", url).out)["job_id"] == job_id
    for reference in ("job-1", "y"):
        result = cli("job", reference, "--url", url)
        assert result.code == 2
        assert "ambiguous" in result.err
        assert "job-12" in result.err
    assert cli("job", "nothing", "--url", url).code == 3


def test_conflicts_exit_4(cli: Cli, serve: Serve) -> None:
    url = serve(Api(job("job-1", status="COMPLETED"), job("job-2"))).url
    finished, active = cli("cancel", "job-1", "--url", url), cli("rm", "job-2", "--url", url)
    assert (finished.code, active.code) == (4, 4)
    assert "COMPLETED" in finished.err
    assert cli("rm", "job-1", "--url", url).code == 0


@pytest.mark.parametrize(
    "tokens", [["nope"], ["jobs", "--nope"], ["job"], ["jobs", "--limit", "0"], ["jobs", "--limit", "x"],
               ["jobs", "--status", "LATE"], ["jobs", "--url", "ftp://x"], ["jobs", "--timeout", "0"],
               ["job", ""]],
)  # fmt: skip
def test_wrong_usage_exits_2_with_one_line(cli: Cli, tokens: list[str]) -> None:
    result = cli(*tokens)
    assert result.code == 2
    assert result.err.startswith("distroml: ")
    assert result.err.count("\n") == 1


def test_no_node_exits_5_and_names_it(cli: Cli) -> None:
    result = cli("jobs", "--url", "http://127.0.0.1:1")
    assert result.code == 5
    assert "http://127.0.0.1:1" in result.err


def test_a_refusal_of_the_api_names_its_field(cli: Cli, serve: Serve) -> None:
    url = serve(problem("invalid-request", 400, "That is wrong.", field="cursor")).url
    result = cli("jobs", "--url", url)
    assert result.code == 2
    assert result.err == "distroml: That is wrong. (at cursor)\n"


@pytest.mark.parametrize(("final", "code"), [("COMPLETED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_watching_ends_with_the_job(cli: Cli, serve: Serve, final: str, code: int) -> None:
    url = serve(Api(ONE, final=final)).url
    result = cli("watch", "job-1", "--url", url)
    assert result.code == code
    assert "all train" in result.out
    assert "loss 0.2500" in result.out
    assert result.out.splitlines()[-1].startswith(final)


def test_watching_as_json_is_one_event_per_line(cli: Cli, url: str) -> None:
    assert lines(cli("watch", "job-1", "--json", "--url", url).out) == [STATE, METRIC, END]


def test_following_logs_shows_each_line_once(cli: Cli, serve: Serve) -> None:
    api = Api(ONE)
    late = {**LINES[0], "line": "late"}
    api.events = [STATE, {"type": "log", **LINES[1]}, {"type": "log", **late}]
    url = serve(api).url
    assert cli("logs", "job-1", "-f", "--url", url).out == "[0] first\n[1] second\n[0] late\n"
    api.jobs["job-1"] = ONE
    assert cli("logs", "job-1", "-f", "--rank", "0", "--url", url).out == "first\nlate\n"


def test_submit_and_follow(cli: Cli, url: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text('{"name": "beta"}')
    result = cli("submit", spec, "--set", "steps=5", "--url", url)
    assert (result.code, result.out) == (0, "Submitted job job-new (beta): QUEUED\n")
    result = cli("submit", spec, "--follow", "--json", "--url", url)
    assert result.code == 0
    assert lines(result.out) == [job("job-new", "beta", "QUEUED"), STATE, METRIC, END]


class TestExport:
    def test_the_file_is_what_the_node_sent(self, cli: Cli, url: str, tmp_path: Path) -> None:
        target = tmp_path / "model.safetensors"
        result = cli("checkpoint", "export", "job-1", "-o", target, "--url", url)
        assert (result.code, result.err) == (0, "")
        assert target.read_bytes() == PLAIN_FILE
        assert cli("checkpoint", "export", "job-1", "-o", target, "--url", url).code == 2
        assert cli("checkpoint", "export", "job-1", "-o", target, "--force", "--url", url).code == 0
        assert list(tmp_path.iterdir()) == [target], "litter"

    def test_a_file_of_torch_save_holds_weights_only(
        self, cli: Cli, url: str, tmp_path: Path
    ) -> None:
        import torch

        target = tmp_path / "model.pt"
        assert cli("checkpoint", "export", "job-1", "-o", target, "--url", url).code == 0
        loaded = torch.load(target, weights_only=True)
        assert loaded["weight"].tolist() == [1.0, 2.0]
        assert list(tmp_path.iterdir()) == [target], "litter"

    @pytest.mark.parametrize(
        ("tokens", "code", "said"),
        [
            (["-o", "model.bin"], 2, ".safetensors or .pt"),
            (["-o", "x.safetensors", "--step", "99"], 3, "no checkpoint"),
            (["-o", "/nonexistent/x.safetensors"], 74, "cannot be written"),
        ],
    )
    def test_what_cannot_be(
        self, cli: Cli, url: str, tokens: list[str], code: int, said: str
    ) -> None:
        result = cli("checkpoint", "export", "job-1", *tokens, "--url", url)
        assert result.code == code
        assert said in result.err
        assert result.err.count("\n") == 1


def test_what_is_not_as_committed_exits_74(cli: Cli, serve: Serve) -> None:
    api = Api(ONE)
    api.problem = "has SHA-256 00, committed was 11"
    result = cli("checkpoint", "verify", "job-1", "--step", "5", "--url", serve(api).url)
    assert result.code == 74
    assert "committed was 11" in result.out
    assert "step 5" in result.err


def test_a_request_that_nobody_answers_is_given_up(cli: Cli, serve: Serve) -> None:
    api = Api(ONE)
    api.saved_request = 0
    url = serve(api).url
    result = cli("checkpoint", "now", "job-1", "--wait-s", "0.1", "--url", url)
    assert result.code == 5
    assert "goes on trying" in result.err
    api.jobs["job-1"] = job("job-1", "alpha", "FAILED")
    result = cli("checkpoint", "now", "job-1", "--url", url)
    assert result.code == 4
    assert "saved no checkpoint" in result.err


def test_help_lists_commands_exit_codes_and_variables(cli: Cli) -> None:
    out = cli("--help").out
    assert "Exit codes" in EPILOGUE
    assert "DISTROML_URL" in EPILOGUE
    for line in EPILOGUE.splitlines():
        assert line.strip() in out
    for target, text in _COMMANDS.items():
        assert text.split()[0] in out
        assert cli(target.partition(":")[2], "--help").code == 0
    for verb in ("list", "show", "verify", "now", "export", "import", "rm"):
        assert verb in cli("checkpoint", "--help").out
        assert cli("checkpoint", verb, "--help").code == 0


def test_spec_shows_every_field_and_gives_a_schema(cli: Cli) -> None:
    out = cli("spec").out
    for part in ("hyperparameters.lr", "above 0.0 to 1,000.0", "model_options.heads", "0.001"):
        assert part in out
    assert "JobSpec" in json.loads(cli("spec", "--json").out)["$defs"]
