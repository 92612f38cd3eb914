"""Which sample is seen when: deterministic order (and, later, placement of data shards)."""
