"""``python -m chaos.under_test.forkserver``: the product's forkserver with what ``chaos.under_test.node`` puts in."""

from __future__ import annotations

from chaos.under_test import deaths, edits, failpoints


def main() -> None:
    """The process."""
    failpoints.install_if_asked()
    edits.install_if_asked()
    from distroml.runtime.worker.forkserver import main as forkserver

    deaths.install_if_asked(deaths.WORKER_POINTS)
    forkserver()


if __name__ == "__main__":
    main()
