"""One node: what it is made of (``composition``), how it comes into the cluster and leaves (``registration``), the
process that it is (``process``) and how that ends (``endings``)."""

from distroml.node.process import main

__all__ = ["main"]
