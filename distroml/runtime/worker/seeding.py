"""All random generators of the process, seeded from words that name the moment.

The seed of a step is a function of (seed, step, rank), so nothing a generator went through before matters:
a run that was resumed draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_all(*words: int | str) -> None:
    """Seed torch, numpy and ``random`` from ``words``."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(int.from_bytes(digest[8:12], "big"))
    random.seed(digest[12:20])
