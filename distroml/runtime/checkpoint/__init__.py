"""Checkpoints: layout and manifest (pure), stores, what a worker writes and reads, what the agent commits.

Nothing in this package imports torch or numpy: a shard is named byte ranges. ``worker.snapshot`` turns tensors
into them and back.
"""
