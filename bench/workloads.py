"""The training that both sides do: the same model, data, order, batch, optimizer and threads."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from distroml.spec import Checkpointing, Distributed, Hyperparameters, JobSpec, Resources

GLOBAL_BATCH = 64
STEPS_BEFORE_KILL = 50
"""Steps a run has completed before one of its ranks is killed."""
VICTIM_RANK = 2


class Workload(Struct, frozen=True):
    """A multi-layer perceptron on the synthetic dataset."""

    name: str
    hidden: int
    layers: int
    samples: int
    """Of one epoch. The first epoch generates the data, so measurements leave it out."""

    @property
    def epoch_steps(self) -> int:
        return self.samples // GLOBAL_BATCH

    def spec(
        self,
        workers: int,
        *,
        epochs: int,
        reduction: str = "deterministic",
        checkpoint_every: int | None = None,
    ) -> JobSpec:
        """The job; without ``checkpoint_every`` (steps) it saves nothing."""
        return JobSpec(
            name=f"bench-{self.name}".lower(),
            model="mlp",
            model_options={"hidden": self.hidden, "layers": self.layers},
            dataset="synthetic",
            dataset_options={"samples": self.samples},
            resources=Resources(workers=workers),
            distributed=Distributed(reduction=reduction),
            hyperparameters=Hyperparameters(batch_size=GLOBAL_BATCH, epochs=epochs),
            checkpointing=Checkpointing(
                enabled=checkpoint_every is not None, every_n_steps=checkpoint_every or 1
            ),
            seed=7,
            max_restarts=10,
        )


class TrainedRun(Struct, frozen=True):
    """What a finished run left."""

    stamps: list[float]
    """When each step ended, from the first on; seconds from any origin."""
    loss: float
    """Mean over the last global batch."""


SMALL = Workload("26k", hidden=128, layers=2, samples=8192)
"""26 thousand parameters: what a step costs beside its arithmetic."""
MILLION = Workload("1M", hidden=960, layers=2, samples=2048)
"""995 thousand parameters: gradients of 4 MB per step."""
TWENTY_FIVE_MILLION = Workload("25M", hidden=4960, layers=2, samples=512)
"""25 million parameters: gradients of 100 MB per step."""


def steps_per_s(stamps: Sequence[float], epoch_steps: int) -> float:
    """Steady rate: over each whole epoch but the first, from the end of its first step to that of its last.

    What happens between epochs (evaluation on our side) is left out.

    Args:
        stamps: when each step ended, from the first step of the run, in seconds.

    Raises:
        ValueError: there are fewer than two whole epochs, or epochs of one step.
    """
    steps, seconds = 0, 0.0
    for first in range(epoch_steps, len(stamps) - epoch_steps + 1, epoch_steps):
        steps += epoch_steps - 1
        seconds += stamps[first + epoch_steps - 1] - stamps[first]
    if steps == 0 or seconds <= 0:
        raise ValueError(f"{len(stamps)} steps hold no steady epoch of {epoch_steps}")
    return steps / seconds
