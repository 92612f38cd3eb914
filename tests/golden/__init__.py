"""Golden scripts: protocol scenarios as text that a person reads as a story and a test replays.

Each file in `scripts` gives commands to the product's own `RaftCore`s (`> tick n1 100ms`) and shows below each
command all that it made them send, store and become. `python -m tests.golden --rewrite` prints the files anew; what
it changes is to be read against Raft's rules, and a script that breaks an invariant of Raft cannot be blessed at
all. The idea is that of etcd's interaction-driven tests.
"""
