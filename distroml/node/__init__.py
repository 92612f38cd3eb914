"""One node: what it is made of (``composition``), how it comes into the cluster and leaves (``registration``), and
the process that it is (``process``)."""

from distroml.node.process import main

__all__ = ["main"]
