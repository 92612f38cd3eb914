"""Lines of a growing file come out once and in order; its size on disk and what one look takes are bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distroml.runtime import log_tail
from distroml.runtime.log_tail import (
    LAST_LINE_CHARS,
    LAST_LINES,
    LogTail,
    log_path,
    remove_logs,
    stale_logs,
)


class Output:
    """What a worker writes, appended as it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail = LogTail(path)

    def write(self, data: str | bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data.encode() if isinstance(data, str) else data)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "rank-0.log")


def test_a_file_that_is_not_there_yet_has_no_lines(output: Output) -> None:
    assert output.tail.poll() == []
    assert output.tail.poll(final=True) == []
    output.write("a\n")
    assert output.tail.poll() == ["a"]


def test_a_line_is_told_when_it_is_complete_and_the_last_one_at_the_end(output: Output) -> None:
    output.write("one\ntw")
    assert output.tail.poll() == ["one"]
    output.write("o\nthree")
    assert output.tail.poll() == ["two"]
    assert output.tail.poll(final=True) == ["three"]
    assert output.tail.poll(final=True) == []
    assert output.tail.last_lines == ("one", "two", "three")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_any_cut_of_the_bytes_gives_the_same_lines(
    tmp_path: Path, text: str, cuts: list[int]
) -> None:
    output = Output(tmp_path / "any.log")
    output.path.unlink(missing_ok=True)
    data, begin, lines = text.encode(), 0, []
    for cut in [*sorted(cuts), len(data)]:
        output.write(data[begin:cut])
        begin = max(begin, cut)
        lines += output.tail.poll()
    lines += output.tail.poll(final=True)
    assert lines == [line.rstrip("\r") for line in text.removesuffix("\n").split("\n") if text]


def test_bytes_that_are_no_text_are_shown_as_such(output: Output) -> None:
    output.write(b"a\xffb\r\n")
    assert output.tail.poll() == ["a�b"]


def test_a_line_without_end_is_told_in_pieces(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tail, "MAX_LINE_CHARS", 10)
    output.write("x" * 30)
    assert output.tail.poll() == []
    output.write("x" * 30)
    assert output.tail.poll() == ["x" * 10 + " [line cut]"]


def test_the_last_lines_are_few_and_short(output: Output) -> None:
    output.write("".join(f"{number} {'y' * 1000}\n" for number in range(100)))
    output.tail.poll()
    assert len(output.tail.last_lines) == LAST_LINES
    assert output.tail.last_lines[-1].startswith("99 ")
    assert all(len(line) <= LAST_LINE_CHARS for line in output.tail.last_lines)


def test_one_look_takes_a_bounded_part(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_tail, "MAX_READ_BYTES", 10)
    output.write("1234\n5678\n90\n")
    assert output.tail.poll() == ["1234", "5678"]
    assert output.tail.poll() == ["90"]


def test_the_last_look_reaches_the_end_where_the_error_stands(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tail, "MAX_READ_BYTES", 10)
    output.write("".join(f"line {number}\n" for number in range(1000)) + "ValueError: boom\n")
    output.tail.poll()
    lines = output.tail.poll(final=True)
    assert lines[-1] == "ValueError: boom"
    assert len(lines) == 1000


def test_the_last_look_skips_to_the_end_where_too_much_is_left(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_tail, "FINAL_READ_BYTES", 40)
    output.write("x" * 1000 + "\nValueError: boom\n")
    skipped, _, *rest = output.tail.poll(final=True)
    assert skipped.startswith("[978 bytes of output skipped")
    assert rest == ["ValueError: boom"]


class TestBounds:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_tail, "MAX_READ_BYTES", 100)
        monkeypatch.setattr(log_tail, "MAX_BEHIND_BYTES", 1000)
        monkeypatch.setattr(log_tail, "MAX_FILE_BYTES", 3000)

    def test_a_file_that_was_read_is_cut_and_goes_on(self, output: Output) -> None:
        with output.path.open("ab", buffering=0) as worker:  # O_APPEND, as the forkserver opens it
            told: list[str] = []
            for number in range(400):
                worker.write(b"%09d\n" % number)
                told += output.tail.poll()
            assert told == [f"{number:09d}" for number in range(400)]
            assert output.path.stat().st_size < 3000

    def test_who_writes_faster_than_is_read_does_not_fill_the_disk(self, output: Output) -> None:
        with output.path.open("ab", buffering=0) as worker:
            largest, told = 0, []
            for _ in range(100):
                worker.write(b"%099d\n" % 7 * 10)  # ten times what a look takes
                told += output.tail.poll()
                largest = max(largest, output.path.stat().st_size)
        assert largest < 6000
        assert any("bytes of output skipped" in line for line in told)

    def test_a_file_that_somebody_else_cut_is_read_from_its_start(self, output: Output) -> None:
        output.write("a" * 50 + "\n")
        output.tail.poll()
        os.truncate(output.path, 0)
        output.write("b\n")
        assert output.tail.poll() == ["b"]


def prune(root: Path, runs: set[str], busy: set[tuple[str, int]]) -> None:
    remove_logs(stale_logs(root, runs, busy))


class TestOldLogs:
    def made(self, root: Path, run: str, *workers: int) -> None:
        for worker in workers:
            path = log_path(root, run, worker)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")

    def left(self, root: Path) -> dict[str, list[int]]:
        return {
            run.name: sorted(
                int(file.name.removeprefix("worker-").removesuffix(".log"))
                for file in run.iterdir()
            )
            for run in sorted(root.iterdir())
        }

    @pytest.fixture(autouse=True)
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_tail, "KEPT_FILES", 4)

    def test_a_run_goes_with_its_job_and_old_workers_go_before(self, tmp_path: Path) -> None:
        self.made(tmp_path, "gone", 1)
        self.made(tmp_path, "here", *range(1, 9))
        prune(tmp_path, {"here"}, set())
        assert self.left(tmp_path) == {"here": [5, 6, 7, 8]}

    def test_files_of_living_processes_stay(self, tmp_path: Path) -> None:
        self.made(tmp_path, "gone", 1, 2)
        self.made(tmp_path, "here", *range(1, 9))
        prune(tmp_path, {"here"}, {("gone", 2), ("here", 1)})
        assert self.left(tmp_path) == {"gone": [2], "here": [1, 5, 6, 7, 8]}

    def test_of_many_runs_the_most_recently_written_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(log_tail, "KEPT_RUNS", 2)
        for number, run in enumerate("abcd"):
            self.made(tmp_path, run, 1)
            os.utime(tmp_path / run, (number, number))
        prune(tmp_path, set("abcd"), {("a", 1)})
        assert sorted(self.left(tmp_path)) == ["a", "c", "d"]

    def test_a_worker_that_begins_meanwhile_keeps_its_file(self, tmp_path: Path) -> None:
        self.made(tmp_path, "gone", 1)
        stale = stale_logs(tmp_path, set(), set())
        self.made(tmp_path, "gone", 2)
        remove_logs(stale)
        assert self.left(tmp_path) == {"gone": [2]}

    def test_what_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        self.made(tmp_path, "here", 9)
        (tmp_path / "here" / "notes").mkdir()
        (tmp_path / "here" / "notes.log").touch()
        prune(tmp_path, {"here"}, set())
        prune(tmp_path, set(), set())
        assert (tmp_path / "file").exists()
        assert (tmp_path / "here" / "notes").exists()
        assert (tmp_path / "here" / "notes.log").exists()
        prune(tmp_path / "nowhere", set(), set())
