"""How messages, entries and changes of a node read in a script."""

from __future__ import annotations

from typing import Any

from distroml.consensus.messages import (
    NO_OP,
    Append,
    AppendReply,
    Entry,
    Message,
    PreVote,
    ReadEcho,
    ReadProbe,
    ReadReply,
    ReadRequest,
    RequestVote,
    SnapshotChunk,
    SnapshotReply,
    TimeoutNow,
    TransferRequest,
    VoteGranted,
    VoteReply,
)
from distroml.consensus.proofs import nonces_in
from distroml.consensus.raft_log import FIRST_INDEX


def entry(item: Entry) -> str:
    """`5/2 "x"`: index, term, content."""
    command, index, term = item
    if command[:1] == NO_OP:
        named = " ".join(nonces_in(command))
        what = "of founders" if index == FIRST_INDEX + 1 else "that proves"
        return f"{index}/{term} no-op" + (f" {what} {named}" if named else "")
    return f'{index}/{term} "{command[1:].decode()}"'


def message(item: Message) -> str:
    unproven, founded = getattr(item, "unproven", 0), getattr(item, "founded", 0)
    about = f", unproven {unproven}" if unproven else f", to founder {founded}" if founded else ""
    return f"{type(item).__name__} {_details(item)}{about}"


def _details(item: Message) -> str:
    match item:
        case PreVote():
            return f"for term {item.term}, log ends at {item.last_index}/{item.last_term}"
        case VoteReply():
            verdict = "yes" if item.granted else "no"
            return f"{verdict} for term {item.term}, from term {item.current_term}"
        case RequestVote():
            wish = ", as the leader wishes" if item.transfer else ""
            return f"for term {item.term}, log ends at {item.last_index}/{item.last_term}{wish}"
        case VoteGranted() | TimeoutNow():
            return f"in term {item.term}"
        case Append():
            entries = ", ".join(map(entry, item.entries)) or "nothing"
            place = f"after {item.prev_index}/{item.prev_term}: {entries}"
            return f"in term {item.term} {place}; committed {item.commit_index}"
        case AppendReply():
            verdict = "accepted" if item.accepted else "refused"
            return f"in term {item.term} {verdict}, send {item.next_index} next"
        case SnapshotChunk():
            end = item.offset + len(item.data)
            span = f"bytes {item.offset} to {end} of {item.size_bytes}"
            return f"in term {item.term} of snapshot {item.index}/{item.snapshot_term}, {span}"
        case SnapshotReply():
            return (
                f"in term {item.term} of snapshot {item.index}, send byte {item.next_offset} next"
            )
        case ReadProbe() | ReadEcho():
            return f"in term {item.term}, nonce {item.nonce}"
        case ReadRequest():
            return f"number {item.token}"
        case ReadReply():
            return f"number {item.token} " + (f"at {item.index}" if item.index else "refused")
        case TransferRequest():
            return f"to {item.target or 'anyone'}"


class View:
    """What is seen of one node between two turns."""

    def __init__(self, core: Any) -> None:
        raft = core.raft
        self.standing = (core.role.value, raft.term, raft.voted_for)
        self.leader = core.leader
        self.entries: list[Entry] = list(raft.log.entries)
        self.commit: int = raft.commit_index
        self.proven: bool = raft.log.proven
        self.snapshot = raft.snapshot
        self.successor: str | None = core._successor

    def role_line(self) -> str:
        role, term, vote = self.standing
        return f"{role} of term {term}, vote {vote or 'not given'}"

    def log_line(self) -> str:
        anchor, *entries = self.entries
        behind = f"behind {anchor[1]}/{anchor[2]}"
        return f"{behind}: {', '.join(map(entry, entries)) or 'nothing'}"


def changes(before: View, after: View) -> list[str]:
    """What became of a node in one turn, a line each."""
    lines = []
    if before.standing != after.standing:
        lines.append(f"is now {after.role_line()}")
    if before.leader != after.leader and after.standing[0] != "leader":
        lines.append(f"follows {after.leader}" if after.leader else "knows no leader")
    lines += _log_changes(before.entries, after.entries)
    if before.snapshot is not after.snapshot:
        taken = after.snapshot
        lines.append(f"stores a snapshot up to {taken.index}/{taken.term}")
    if before.commit != after.commit:
        lines.append(f"commits up to {after.commit}")
    if after.proven and not before.proven:
        lines.append("may vote from now on")
    if before.successor != after.successor:
        lines.append(
            f"hands over to {after.successor}" if after.successor else "hands over no more"
        )
    return lines


def _log_changes(before: list[Entry], after: list[Entry]) -> list[str]:
    lines = []
    anchor = after[0]
    if anchor[1] != before[0][1]:
        lines.append(f"its log starts behind {anchor[1]}/{anchor[2]}")
    known = {item[1]: item for item in before if item[1] > anchor[1]}
    kept = {item[1]: item for item in after[1:]}
    removed = [item for index, item in known.items() if kept.get(index) != item]
    added = [item for index, item in kept.items() if known.get(index) != item]
    if removed:
        lines.append(f"removes {', '.join(map(entry, removed))}")
    if added:
        lines.append(f"appends {', '.join(map(entry, added))}")
    return lines
