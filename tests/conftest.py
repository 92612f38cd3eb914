"""What holds for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Machines are shared and noisy, so no example has a deadline; on the build machine each run sees the same examples.
settings.register_profile("shared", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shared")
