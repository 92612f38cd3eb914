"""Fuzzing guided by coverage: each target in a process of its own under atheris (libFuzzer).

Only the product is instrumented. What libFuzzer finds worth keeping stays in `.fuzz/TARGET` for the next time.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.fuzz.target import MAX_INPUT_BYTES

CORPORA: Final = Path(".fuzz")
INPUT_LIMIT_S: Final = 10
MEMORY_LIMIT_MB: Final = 1024
_MODULES: Final = ("distroml",)


def available() -> bool:
    return importlib.util.find_spec("atheris") is not None


def fuzz_each(names: list[str], limit_s: float, seed: int) -> int:
    """Each target for `limit_s` seconds. Returns 1 where one failed; its input is kept as a regression."""
    failed, total = 0, 0
    for name in names:
        corpus = CORPORA / name
        corpus.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "tests.fuzz.guided", name, str(corpus)),
            f"-max_total_time={max(1, round(limit_s))}",
            f"-seed={seed % 2**31 or 1}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-timeout={INPUT_LIMIT_S}",
            f"-rss_limit_mb={MEMORY_LIMIT_MB}",
            f"-artifact_prefix={corpus}/../find-{name}-",
            "-print_final_stats=1",
            "-verbosity=1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = done.stdout + done.stderr
        count = re.search(r"number_of_executed_units: *(\d+)", told)
        rate = re.search(r"average_exec_per_sec: *(\d+)", told)
        inputs = int(count[1]) if count else 0
        total += inputs
        per_s = rate[1] if rate else "?"
        covered = re.findall(r"cov: (\d+)", told)[-1:] or ["?"]
        print(f"{name:20} {inputs:>10} inputs {per_s:>9} /s, coverage {covered[0]}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
    print(f"{total} inputs, {failed} targets failed")
    return 1 if failed else 0


def _fuzz(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=list(_MODULES), enable_loader_override=False):
        from tests.fuzz import driver
    target = driver.TARGETS[name]
    corpus = Path(arguments[0])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number:04}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except Exception as error:
            find = driver.Find(target, driver.smallest(target, data, error), error)
            print(f"{find}\n  kept as {driver.keep(find)}", flush=True)
            raise

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    _fuzz(sys.argv[1], sys.argv[2:])
