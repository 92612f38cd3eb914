"""Every golden script, and that a script can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from distroml.consensus.elections import Elections
from distroml.consensus.following import Following
from tests.golden import script
from tests.golden.script import SCRIPTS, BadScript, all_scripts, difference, play
from tests.golden.world import Violated

EXPECTED_AT_LEAST = 20


@pytest.mark.parametrize("path", all_scripts(), ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    changed = difference(path)
    assert not changed, (
        f"{path.name} happens otherwise. If Raft allows it: python -m tests.golden --rewrite "
        f"{path.stem}\n{changed}"
    )


def test_the_scripts_are_found() -> None:
    assert len(all_scripts()) >= EXPECTED_AT_LEAST


def test_playing_is_deterministic_and_ignores_the_expectations() -> None:
    for path in all_scripts():
        text = path.read_text()
        told = [line for line in text.splitlines() if line.startswith(("#", ">")) or not line]
        assert play("\n".join(told), path.name) == text


def test_a_wrong_expectation_fails_with_a_diff(tmp_path: Path) -> None:
    copy = tmp_path / "first_election.txt"
    right = (SCRIPTS / "first_election.txt").read_text()
    copy.write_text(right.replace("n1 is leader of term 1", "n1 is leader of term 2"))
    changed = difference(copy)
    assert "--- first_election.txt expects" in changed
    assert "-n1 is leader of term 2, vote n1" in changed
    assert "+n1 is leader of term 1, vote n1" in changed


def test_a_missing_and_a_superfluous_line_fail(tmp_path: Path) -> None:
    copy = tmp_path / "first_election.txt"
    lines = (SCRIPTS / "first_election.txt").read_text().splitlines(keepends=True)
    copy.write_text("".join(lines[:-1]))
    assert difference(copy)
    copy.write_text("".join([*lines, "n4 is down\n"]))
    assert difference(copy)


def test_another_protocol_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elections, "_loyal", lambda _self: False)
    changed = difference(SCRIPTS / "pre_vote_refused_by_loyalty.txt")
    assert "+  n2 -> n3: VoteReply yes for term 2" in changed
    assert "+!! pre_vote_refused_by_loyalty.txt:" in changed


def test_what_raft_forbids_cannot_be_blessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elections, "_refuses_as_forgetful", lambda _self, _question: False)
    monkeypatch.setattr(Elections, "_counts", lambda _self, _node, _unproven: True)
    with pytest.raises(Violated, match="leads term 2 without entry 3/1"):
        play((SCRIPTS / "emptied_voter_abstains.txt").read_text(), "emptied")


def test_a_core_that_stops_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Following._follow

    def deaf(self: Following, node: object, term: int) -> None:
        follow(self, node, term)
        self.commit_index = 99

    monkeypatch.setattr(Following, "_follow", deaf)
    with pytest.raises(
        Violated, match=r"first_election\.txt:\d+: '> deliver n1 n2': n2 broke: IndexError"
    ):
        difference(SCRIPTS / "first_election.txt")


def test_an_emptied_voter_founds_no_second_cluster_with_one_that_was_never_reached() -> None:
    told = play(
        "> voters n1 n2 n3\n> start all\n> elect n1 by n2 n3\n> propose n1 a\n> drop n1 n3\n> settle\n"
        "> crash n1 n2 n3\n> wipe n2\n> start n2 n3\n> tick n3 100ms\n> settle\n> tick n2 500ms\n> settle\n"
        "> status\n",
        "founding",
    )
    _, _, status = told.partition("> status")
    assert "n2 is follower of term 1, vote not given; log ends at 1/0" in status
    assert "n3 is follower of term 1, vote n1; log ends at 1/0" in status


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no command"),
        ("# only prose\n", "there is no command"),
        ("n1 leads\n", "bad:1: an expectation stands before any command"),
        ("> dance n1\n", "bad:1.*no such command; there are: compact, crash"),
        ("> voters n1\n> start n2\n", "bad:2.*'n2' is no node; nodes: n1"),
        ("> voters n1\n> tick n1 5ms\n", "bad:2.*'n1' does not run; running: nobody"),
        ("> voters n1\n> start n1\n> tick n1 5\n", "bad:3.*'5' is no duration, such as 60ms"),
        ("> voters n1 n2\n> start all\n> drop n1 n2\n", "nothing is in flight from n1 to n2"),
        ("> voters n1 heartbeat_s=9\n", "election_min_s is 0.3; it must exceed"),
        ("> voters n1 speed=9\n", "no such setting: speed"),
        ("> voters n1 n2\n> start n1\n> elect n1\n", "n1 is not elected within 2000 ms"),
        ("> voters n1\n> given n1\n", "bad:2.*usage: given NAME terms=1,1,2"),
    ],
)
def test_a_bad_script_says_where_and_why(text: str, why: str) -> None:
    with pytest.raises(BadScript, match=why):
        play(text, "bad")


def test_rewriting_makes_a_script_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("# Alone.\n> voters n1\n> start n1\nwrong\n")
    monkeypatch.setattr(script, "SCRIPTS", tmp_path)
    (path,) = all_scripts()
    assert difference(path)
    path.write_text(play(path.read_text(), path.name))
    assert not difference(path)
    assert "n1 is now leader of term 1, vote n1" in path.read_text()
