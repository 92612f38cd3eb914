"""The ``distroml`` command line: one file per noun, all of it through ``distroml.client``."""
