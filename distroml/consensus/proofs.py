"""Entries that prove a voter: who founded the cluster, and who has lost its data directory and may count again.

A voter with an empty directory may have lost one. It has forgotten its votes and what it acknowledged, so until it is
**proven** it counts for nothing, in no commit, election, read or leader's quorum, except to found a cluster. Each
directory has a random nonce, on disk before it is told, and an unproven voter adds it to what it answers. There are two
proofs, both no-ops that name nonces:

*The founding entry* is the first of a cluster. A candidate whose log is blank needs the pre-vote and then the vote of
every voter, each time from the same blank directories. A directory that has left blank does not return to it, so between
the two rounds all were blank at once. As long as no majority of the directories is lost at once, nothing can have been
acknowledged before that instant. Whoever still has the directory that the entry names has therefore forgotten nothing
since the cluster exists. It is proven by holding the entry, committed or not. Until then it votes for those who have it.

*The proof of one voter*, v, is appended by a leader after v's new directory has spoken to it. v is proven once the
leader of its term says that this entry is committed, and v has the log up to the commit index it tells, where an
entry of the leader's own term is. Why that is enough:

1. The entry was committed by a majority Q without v, after the loss. Say the leader L of term t committed it.
2. Suppose v had helped, before the loss, to elect or to follow a leader N of a term n above t. N's other voters meet Q
   in some voter q. Had q voted for N first, it could not have acknowledged the entry in the older term t. Had it
   acknowledged first, it would have refused N: N asked for its votes before the loss, thus before the entry existed, so
   N's log lacks it. Nor has N anything of a term between t and n, for the same holds for the leader that would have
   written it. (If q itself was emptied between the two, the same holds for its own proof, which is older.) So there is
   no such leader, nor can one still be made of v's old vote.
3. So every entry that v had helped to commit is of a term up to t. L has them all, below the proof if v acknowledged
   them in L's own term. v holds all of L's log up to the proof, thus all of them, as if it had never lost anything.
4. v may have forgotten its vote in term t itself. v's log now has an entry of term t, and no other candidate of that term
   has one, so v can not be made to vote twice in it.

A deposed leader that does not know it yet gets nowhere with v: it can commit no proof without v's acknowledgements, for
a majority of the others is in a newer term. An entry that was there before v spoke proves nothing: it may have been
committed with the very acknowledgements that v has forgotten, by a leader that has been replaced since.
"""

from __future__ import annotations

from typing import Final

import msgspec

from distroml.consensus.messages import NO_OP, Number
from distroml.errors import UNDECODABLE

PROOF_PAUSE_S: Final = 0.5
"""Between two proofs of the same voter, at least."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[str, Number])


def proof(nonces: dict[str, int]) -> bytes:
    """The command of an entry that proves these directories; `nonces` by the name of their voter."""
    return NO_OP + _encoder.encode(dict(sorted(nonces.items())))


def nonces_in(command: bytes) -> dict[str, int]:
    """What an entry proves, by name of voter; empty where it is no proof."""
    if len(command) == 1 or command[:1] != NO_OP:
        return {}
    try:
        return _decoder.decode(command[1:])
    except UNDECODABLE:
        return {}
