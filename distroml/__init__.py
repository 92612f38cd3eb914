"""DistroML: fault-tolerant distributed training with no special node.

What a user's training code imports. Names that need torch are loaded when first used, so that importing this
package never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distroml.spec import JobSpec

if TYPE_CHECKING:
    from distroml.runtime.worker.adapter import FrameworkAdapter as FrameworkAdapter
    from distroml.runtime.worker.checkpoint_manager import CheckpointManager as CheckpointManager
    from distroml.runtime.worker.meetings import BarrierTimeout as BarrierTimeout
    from distroml.runtime.worker.rendezvous import CollectiveBroken as CollectiveBroken
    from distroml.runtime.worker.state import StateBlob as StateBlob
    from distroml.runtime.worker.state import TrainState as TrainState

__version__ = "0.1.0"

_LAZY = {
    "BarrierTimeout": "distroml.runtime.worker.meetings",
    "CollectiveBroken": "distroml.runtime.worker.rendezvous",
    "CheckpointManager": "distroml.runtime.worker.checkpoint_manager",
    "FrameworkAdapter": "distroml.runtime.worker.adapter",
    "StateBlob": "distroml.runtime.worker.state",
    "TrainState": "distroml.runtime.worker.state",
}

__all__ = [
    "BarrierTimeout",
    "CheckpointManager",
    "CollectiveBroken",
    "FrameworkAdapter",
    "JobSpec",
    "StateBlob",
    "TrainState",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'distroml' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
