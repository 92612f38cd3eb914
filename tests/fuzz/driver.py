"""Runs a target on many inputs, and makes a find small and lasting.

The limits make "hangs" and "eats all memory" failures like any other: processor time per input (not the clock's, so
a busy machine does not matter), and the process's peak memory over a run.
"""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.fuzz import link_targets, log_targets, runtime_targets
from tests.fuzz.mutate import Mutator
from tests.fuzz.target import Target

INPUT_LIMIT_S: Final = 5.0
"""Processor time of one input."""
MEMORY_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""By which a run may raise the process's peak memory."""
REGRESSIONS: Final = Path(__file__).with_name("regressions")
TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for module in (link_targets, log_targets, runtime_targets)
    for target in module.TARGETS
}


class Hangs(Exception):
    """An input took more than INPUT_LIMIT_S."""


class Find(Exception):
    """A target failed; `data` is the smallest input that was found to do so."""

    def __init__(self, target: Target, data: bytes, error: BaseException) -> None:
        self.target, self.data = target, data
        super().__init__(f"{target.name} fails on {data!r} ({len(data)} bytes): {error!r}")


class Ran(msgspec.Struct, frozen=True):
    inputs: int
    seconds: float

    @property
    def per_s(self) -> float:
        return self.inputs / max(self.seconds, 1e-9)


@contextmanager
def _time_limit() -> Iterator[Callable[[], None]]:
    """Yields what is called before each input."""

    def stop(*_: object) -> None:
        raise Hangs(f"more than {INPUT_LIMIT_S:g} s of processor time for one input")

    before = signal.signal(signal.SIGPROF, stop)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_PROF, INPUT_LIMIT_S) and None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(target: Target, inputs: int, seed: int) -> Ran:
    """Runs the seeds and then `inputs` mutations of them. Raises Find."""
    seeds = target.seeds()
    mutator = Mutator(seeds, random.Random(f"{target.name}:{seed}"))
    memory = peak_bytes()
    started = time.perf_counter()
    with _time_limit() as begin:
        for number in range(-len(seeds), inputs):
            data = seeds[number] if number < 0 else mutator.next()
            begin()
            try:
                target.run(data)
            except Exception as error:
                raise Find(target, smallest(target, data, error), error) from error
    grown = peak_bytes() - memory
    if grown > MEMORY_LIMIT_BYTES:
        raise MemoryError(f"{target.name}: memory grew by {grown} bytes within {inputs} inputs")
    return Ran(inputs + len(seeds), time.perf_counter() - started)


def smallest(target: Target, data: bytes, error: BaseException) -> bytes:
    """Removes and zeroes spans for as long as the same kind of error comes."""

    def still_fails(candidate: bytes) -> bool:
        try:
            target.run(candidate)
        except Exception as again:
            return type(again) is type(error)
        return False

    if isinstance(error, Hangs):
        return data
    span = max(1, len(data) // 2)
    while span:
        at = 0
        while at < len(data):
            without = data[:at] + data[at + span :]
            zeroed = data[:at] + bytes(len(data[at : at + span])) + data[at + span :]
            if still_fails(without):
                data = without
            elif zeroed != data and still_fails(zeroed):
                data = zeroed
                at += span
            else:
                at += span
        span //= 2
    return data


def keep(find: Find) -> Path:
    """Writes the input where `test_fuzz.py` runs it from now on."""
    digest = hashlib.sha256(find.data).hexdigest()[:12]
    path = REGRESSIONS / f"{find.target.name}-{digest}.bin"
    REGRESSIONS.mkdir(exist_ok=True)
    path.write_bytes(find.data)
    return path
