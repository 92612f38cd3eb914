"""Breaks a real cluster of real processes on purpose, and judges what came of it.

``cluster`` and ``network`` hold the nodes under test, ``schedule`` draws the faults from a seed, ``faults`` inflict them,
``workload`` drives the cluster as clients would, ``observers`` watch it. All of them write ``records`` into one history;
``checkers`` judge that history, and ``report`` shows it. A history on disk can be judged again without a cluster.
"""
