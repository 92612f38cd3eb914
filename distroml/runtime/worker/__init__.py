"""Everything that imports torch: the life of one worker process.

``forkserver`` forks it, ``entry`` is its life, ``control_link`` its line to the agent, ``process_group`` and
``gradient_sync`` its line to the other ranks, ``adapter`` what a user may replace, ``train`` the step loop.
"""
