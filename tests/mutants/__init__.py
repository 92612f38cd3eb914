"""Every fix of a consensus hazard can be taken out again, and something must notice.

`table` names each fix as a change of the product's source, with the rule that is lost and the test that must fail.
`engine` applies one change in a process of its own. `python -m tests.mutants [NAME ...]` runs them by hand.
"""
