"""A learning-rate scheduler of torch: one move per step, and its state as JSON-able values."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distroml.errors import DistroMLError
from distroml.runtime.worker.plain_values import from_plain, to_plain


def advance(scheduler: LRScheduler | None, loss: float) -> None:
    """After a step: the rates of the next one.

    Args:
        loss: mean over the global batch, for schedulers that go by it.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif scheduler is not None:
        scheduler.step()


def dump(scheduler: LRScheduler) -> dict[str, Any]:
    """Its state; what JSON cannot hold is tagged.

    Raises:
        DistroMLError: it holds something that is no plain value; names it.
    """
    try:
        values: dict[str, Any] = to_plain(scheduler.state_dict(), "")
    except TypeError as error:
        raise DistroMLError(
            f"In the learning-rate scheduler {error}, which a checkpoint cannot hold; use plain numbers, or functions "
            "instead of objects."
        ) from None
    return values


def load(scheduler: LRScheduler, values: dict[str, Any]) -> None:
    """Put back what ``dump`` took out of a scheduler that was built in the same way."""
    scheduler.load_state_dict(_over(scheduler.state_dict(), from_plain(values)))


def _over(built: Any, told: Any) -> Any:
    """``told``, but what did not change stays what it was built as: a Counter, say, rather than a dict that equals it."""
    if built == told:
        return built
    if isinstance(built, dict) and isinstance(told, dict):
        return {key: _over(built.get(key), value) for key, value in told.items()}
    if isinstance(built, list) and isinstance(told, list) and len(built) == len(told):
        return [_over(one, other) for one, other in zip(built, told, strict=True)]
    return told
