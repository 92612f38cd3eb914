"""The deterministic simulator: whole clusters of the product's own classes in one process and virtual time.

Only clock, sockets and disk are replaced. One seed gives one run, bit for bit:

    world (time, events, trace) ── loop (asyncio of one process) ── process (RaftNode, Proposer, Replica)
                                ├─ disk (what survives kill and power loss)
                                ├─ streams | lossy (the network under PeerLinks, or in its place)
                                ├─ faults (the schedule is data, so it shrinks) ── nemesis
                                └─ invariants + workload (what must hold, and clients that check it)

`python -m tests.sim` runs many seeds; one that failed is run again by the command it prints. `--mutant` takes a
fix out of the product first, to see that it is missed. `tests.consensus.lone` is one core alone, its peers played
by the test.
"""
