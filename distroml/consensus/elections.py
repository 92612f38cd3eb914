"""Elections: pre-votes, loyalty to a live leader, votes that count once, leadership on request.

Replaces how the library starts an election and what it lets through to its vote handling; granting
a vote and counting to a majority stay the library's.
"""

from __future__ import annotations

from typing import Any, Final

from distroml.consensus.library_fields import CANDIDATE, FOLLOWER, LEADER, LibraryFields
from distroml.consensus.messages import PreVote, RequestVote, TimeoutNow, VoteGranted, VoteReply
from distroml.consensus.raft_log import FIRST_INDEX

_STICKY_SHARE: Final = 0.9
"""Share of the minimum election timeout for which a voter stays loyal to the leader it heard; below
1, so that the first follower whose timeout ends is not refused by one that heard a little later."""


class Elections(LibraryFields):
    """The candidate's and the voter's side; mixed into `hardening.HardenedRaft`."""

    heard_leader_at: float
    pre_vote_term: int | None
    """The term for which a round of pre-votes is under way."""
    pre_vote_rounds: int
    """How often this node has asked; each time it had heard no leader for an election timeout."""
    pre_vote_at: float
    supporters: set[str]
    """Who has granted the current pre-vote or vote, this node included."""
    founders: dict[str, int]
    """Who has granted the last pre-vote, with the nonce of its blank directory: they would found the cluster."""
    knowing: set[str]
    """Voters that have answered this one's questions from a directory that is proven."""

    def _majority(self, count: int) -> bool:
        return count > len(self.voters) // 2

    def retry_s(self) -> float:
        """Pause before the next round of pre-votes; they disturb nobody, so it may be short."""
        return self.settings.pre_vote_retry_s * self.rng.uniform(0.5, 1.5)

    def _may_campaign(self) -> bool:
        """A voter whose directory was emptied has forgotten its votes: it must not elect itself
        with what it has, except in a cluster where all is new."""
        return not self.learner and (self.log.proven or self.log.blank)

    def _founding(self) -> bool:
        """Nothing is known here, so an election could only found the cluster, and that takes all voters."""
        return self.log.blank and not self.log.proven

    def _enough(self) -> bool:
        supporters = len(self.supporters)
        if self._founding():
            return supporters == len(self.voters)
        return self._majority(supporters)

    def _counts(self, node: Any, unproven: int) -> bool:
        """Whether a voter with such a directory counts in this node's election: to found the cluster only those where
        all is new; else those that have forgotten nothing."""
        if self._founding():
            return unproven != 0
        return unproven in (0, self.founder_nonce(node.id))

    def awaited(self) -> str:
        """What has to happen before this voter may take part in elections; empty where it may."""
        if not self.unproven:
            return ""
        if self.leader_node is not None or not self.log.blank:
            return "this voter's data directory is new; it votes once a leader has proven that it has everything"
        if self.knowing:
            return (
                f"this voter's data directory is new, but not that of {', '.join(sorted(self.knowing))}: the cluster "
                "exists, and needs a majority of the voters that still have their data"
            )
        silent = [node.id for node in self.others if node not in self.connected]
        whom = f"; not heard yet: {', '.join(silent)}" if silent else ""
        return f"a new cluster is founded once by all of its voters{whom}"

    def seek_election(self) -> None:
        if self.peers and self.now - self.heard_leader_at > self.settings.election_max_s:
            self.leader_node = (
                None  # earlier it may only be late, and nobody has asked for votes yet
            )
        if not self._may_campaign():
            return
        self.founders = {self.name: self.log.nonce}
        if not self.peers:
            self.campaign(transfer=False)
            return
        self.pre_vote_rounds += 1
        self.pre_vote_term, self.pre_vote_at = self.term + 1, self.now
        self.supporters = {self.name}
        last_index, last_term = self.log.last_index, self.log.last_term
        for node in self.others:
            founded = self.founder_nonce(node.id)
            self.emit(node, PreVote(self.pre_vote_term, last_index, last_term, founded))

    def campaign(self, *, transfer: bool) -> None:
        """Starts a real election (Raft, section 5.2)."""
        self.pre_vote_term = None
        self.supporters = {self.name}
        self.election_deadline = self.now + self.election_timeout_s()
        self.leader_node = None
        self.set_role(CANDIDATE)
        self.adopt_term(self.term + 1, self.name)
        self.votes = 1
        last_index, last_term = self.log.last_index, self.log.last_term
        for node in self.others:
            founded = self.founder_nonce(node.id)
            self.emit(node, RequestVote(self.term, last_index, last_term, transfer, founded))
        if not self.peers:
            self.become_leader()

    def _loyal(self) -> bool:
        """Whether a live leader was heard so recently that no other may be elected (L4)."""
        window_s = self.settings.election_min_s * _STICKY_SHARE
        if self.role != LEADER:
            return self.now - self.heard_leader_at < window_s
        answered = sum(self.now - self.last_response_at[node] < window_s for node in self.peers)
        return self._majority(answered + 1)

    def _refuses_as_forgetful(self, question: PreVote | RequestVote) -> bool:
        """An emptied voter may have voted before; it helps only to found a cluster, and a candidate that knows it to
        have been there, with this very directory, when that was founded."""
        if self.log.proven or (question.founded and question.founded == self.log.nonce):
            return False
        blank_candidate = question.last_index == FIRST_INDEX and question.last_term == 0
        return not (self.log.blank and blank_candidate)

    def _yields_to_me(self, node: Any, question: PreVote) -> bool:
        """Of two voters with equal logs that ask each other in the same moment, the first by name
        goes on; if both did, they would split the votes and wait for a whole election timeout."""
        return (
            self.pre_vote_term == question.term
            and self.now - self.pre_vote_at < self.settings.pre_vote_retry_s / 2
            and (question.last_term, question.last_index)
            == (self.log.last_term, self.log.last_index)
            and self.name < node.id
        )

    def on_pre_vote(self, node: Any, question: PreVote) -> None:
        behind = (question.last_term, question.last_index) < (
            self.log.last_term,
            self.log.last_index,
        )
        granted = (
            question.term > self.term
            and not behind
            and not self._loyal()
            and self.role != LEADER
            and not self._refuses_as_forgetful(question)
            and not self._yields_to_me(node, question)
        )
        if granted:
            # Let this one have its election before we seek our own: two at once split the votes.
            soonest = self.now + self.retry_s()
            self.election_deadline = max(self.election_deadline, soonest)
        # Hazard L4: a refusal carries our term, else a candidate behind in terms never catches up.
        self.emit(node, VoteReply(question.term, granted, self.term, self.unproven))

    def on_vote_reply(self, node: Any, reply: VoteReply) -> None:
        if reply.unproven:
            self.knowing.discard(node.id)
        else:
            self.knowing.add(node.id)
        if reply.current_term > self.term:
            deadline = self.election_deadline
            self.step_down(reply.current_term)
            self.election_deadline = min(deadline, self.election_deadline)
            return
        if not reply.granted or reply.term != self.pre_vote_term or reply.term != self.term + 1:
            return
        if not self._counts(node, reply.unproven):
            return
        self.supporters.add(node.id)
        self.founders[node.id] = reply.unproven
        if self._enough() and self.role != LEADER:
            self.campaign(transfer=False)

    def on_request_vote(self, node: Any, request: RequestVote) -> None:
        if request.term < self.term:
            self.emit(node, VoteReply(request.term, False, self.term, self.unproven))
            return
        # Hazard L4: loyalty to a live leader, unless that leader itself wants the election.
        if request.term > self.term and not request.transfer and self._loyal():
            return
        if self._refuses_as_forgetful(request):
            if request.term > self.term:
                self.step_down(request.term)
            return
        if request.term == self.term and self.voted_for == node.id and self.role == FOLLOWER:
            self.grant(node, self.term)  # the first answer may have been lost
            return
        self.receive_in_library(
            node,
            {
                "type": "request_vote",
                "term": request.term,
                "last_log_index": request.last_index,
                "last_log_term": request.last_term,
            },
        )

    def on_vote_granted(self, node: Any, vote: VoteGranted) -> None:
        # Hazard S8: each voter counts once per term.
        if vote.term != self.term or self.role != CANDIDATE or node.id in self.supporters:
            return
        if not self._counts(node, vote.unproven):
            return
        if not self._founding():
            self.supporters.add(node.id)
            self.receive_in_library(node, {"type": "response_vote", "term": vote.term})
        elif vote.unproven == self.founders.get(node.id):
            # The same directory as in the pre-votes: so all were blank at once, between the two rounds. Once it asks
            # for pre-votes anew, the founders of this round are forgotten.
            self.supporters.add(node.id)
            if self._enough():
                self.become_leader()

    def on_timeout_now(self, node: Any, order: TimeoutNow) -> None:
        if order.term == self.term and node == self.leader_node and self.log.proven:
            self.campaign(transfer=True)

    def step_down(self, term: int) -> None:
        """Adopts a higher term without a vote in it (Raft, section 5.1)."""
        if term > self.term:
            self.adopt_term(term, None)
        self.set_role(FOLLOWER)
        self.leader_node = None
        self.pre_vote_term = None
        self.election_deadline = self.now + self.election_timeout_s()
