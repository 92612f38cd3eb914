"""``python -m distroml.demo``: three nodes on this machine train on real data, are hurt twice, and finish.

``story`` is what happens in which order, ``report`` what is printed and judged, ``leftovers`` that nothing stays.
"""
