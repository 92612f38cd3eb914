"""What a node keeps of metrics and logs, and how any node answers for all.

``records`` (keys, encoding) → ``segments``, ``streams``, ``jobs``, ``writeback``, ``retention`` (on disk) →
``history.HistoryStore`` → ``subscriptions``, ``cursors``, ``following`` (live), ``series``, ``queries`` (questions),
``sync``, ``replication`` (between nodes).
"""
