"""``python -m distroml.node`` is ``distroml-node``."""

from distroml.node.process import main

main()
