"""Consensus: one replicated log for the whole cluster, on every node, with no special node.

Raft proper: `raft` (driver) → `raft_core` (I/O-free turn) → `hardening`, `elections`, `following`,
`replication` (PySyncObj and what had to be replaced in it) → `raft_log`. On disk: `sync_thread` →
`storage` → `wal`, `snapshot` → `disk`. Between nodes: `peers` → `connections` → `frames`, and
`messages` for what Raft says. What is replicated: `state`, `machine`, `replica`, `proposer`.
"""
