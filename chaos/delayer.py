"""Delays what a network namespace sends, in user space: for kernels that have no netem.

``python -m chaos.delayer DEVICE DELAY_MS JITTER_MS`` runs inside the namespace. Packets that leave by the device are
redirected to a tap, wait here, and go out by the device again with a mark that tells the filter to let them pass. They stay
in order. Prints a line once it works; the delay ends with the process, which takes the filter with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

TAP = "slow0"
MARK = 0xC4A05
MAX_PACKETS = 20_000
"""What waits; more are lost, as in a queue of any router."""
FRAME_BYTES = 65_536
BATCH = 64
"""Frames that are read before those that are due are sent."""
SO_MARK = 36
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x1002
_LOAD_MARK = 0xFFFFF000 + 20
_ALL = 0xFFFFFFFF
_PASS_MARKED = f"4,32 0 0 {_LOAD_MARK},21 0 1 {MARK},6 0 0 0,6 0 0 {_ALL}"
"""Classic BPF: load the mark, and match only where it is not ours."""


def main() -> None:
    """The process."""
    device, delay_ms, jitter_ms = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", TAP.encode(), _IFF_TAP_NO_PI))
    _run("ip", "link", "set", "dev", TAP, "up")
    with _wire(device) as wire, _redirected(device):
        print("ready", flush=True)
        _forward(tap, wire, delay_ms / 1000, jitter_ms / 1000)


def _forward(tap: int, wire: socket.socket, delay_s: float, jitter_s: float) -> None:
    waiting: deque[tuple[float, bytes]] = deque()
    while True:
        pause_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([tap], [], [], pause_s)
        now_s = time.monotonic()
        if readable:
            with contextlib.suppress(BlockingIOError):
                for _ in range(BATCH):
                    frame = os.read(tap, FRAME_BYTES)
                    due_s = now_s + max(0.0, delay_s + random.uniform(-jitter_s, jitter_s))
                    if len(waiting) < MAX_PACKETS:
                        waiting.append((max(due_s, waiting[-1][0] if waiting else 0.0), frame))
        while waiting and waiting[0][0] <= now_s:
            with contextlib.suppress(OSError):  # no room in the device: lost, as on any link
                wire.send(waiting.popleft()[1])


@contextlib.contextmanager
def _wire(device: str) -> Iterator[socket.socket]:
    """Sends whole frames by the device, marked."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
        wire.bind((device, 0))
        yield wire


@contextlib.contextmanager
def _redirected(device: str) -> Iterator[None]:
    """Everything that leaves by the device goes to the tap, but for what is marked."""
    _run("tc", "qdisc", "add", "dev", device, "clsact")
    try:
        _run(
            *("tc", "filter", "add", "dev", device, "egress", "bpf", "bytecode", _PASS_MARKED),
            *("action", "mirred", "egress", "redirect", "dev", TAP),
        )
        yield
    finally:
        _run("tc", "qdisc", "del", "dev", device, "clsact")


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
