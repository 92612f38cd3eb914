"""Fuzzing of everything that reads bytes which another process or a disk may have spoiled.

A *target* is a plain function of bytes with an oracle inside: it returns, or it raises AssertionError (or, as bad, what
its decoder does not document). `test_fuzz.py` runs each with seeded mutations of valid inputs; `python -m tests.fuzz`
does so for as long as wanted, guided by coverage where atheris is installed; `regressions` keeps the smallest input of
every find.
"""
