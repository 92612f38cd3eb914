"""torchft's side of a training run: what ``bench.torchrun_ddp`` trains, as one replica group of one rank.

Run by ``bench.torchft`` as ``python -m torch.distributed.run ... -m bench.torchft_ddp --spec FILE``, once for each
group, after torchft's own example: its Manager, its Gloo group, its DistributedDataParallel, a fixed share of the data for
each group (``DistributedSampler``), and no checkpoints, since the state comes from a group that lives.

Lines of JSON on standard output tell of completed steps: by which group, of how many groups, and how many batches
(one for each group that took part) the weights have seen so far.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, ProcessGroupGloo

from bench.processes import die_with_parent
from bench.torchrun_ddp import ANNOUNCE_EVERY, Training, tell
from distroml.spec import parse_spec


class Surviving(DistributedDataParallel):  # type: ignore[misc]  # it has no types
    """torchft's wrapper, whose own hook in 0.2.0 fails an assertion where a Gloo collective did.

    With that hook a kill during a collective ends the survivors too. This one leaves the failure to the manager, which
    was told of it by ``wait`` and discards the step.
    """

    @staticmethod
    def _comm_hook(state: Manager, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        state.allreduce(bucket.buffer()).wait()
        reduced: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        reduced.set_result(bucket.buffer())
        return reduced


def main() -> None:
    """Train ``--spec`` as the group that the environment names, until killed."""
    arguments = _parse()
    die_with_parent()
    spec = parse_spec(arguments.spec.read_bytes())
    torch.set_num_threads(1)
    group, groups = (int(os.environ[name]) for name in ("REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    tell(pid=os.getpid(), rank=group, attempt=attempt)
    training = Training(spec, group, groups)
    model, optimizer = training.model, training.optimizer

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optim"])

    timeout = timedelta(milliseconds=arguments.timeout_ms)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load_state_dict,
        state_dict=lambda: {"model": model.state_dict(), "optim": optimizer.state_dict()},
        min_replica_size=arguments.min_groups,
        replica_id=f"group_{group}",
        hostname="127.0.0.1",
        timeout=timeout,
        heartbeat_interval=timedelta(milliseconds=arguments.heartbeat_ms),
        init_sync=False,  # all start from the same seed
    )
    module = Surviving(manager, model)

    told, discarded = 0, 0
    while manager.current_step() < training.total_steps:
        # torchft's optimizer wrapper does these very calls, but does not tell whether the step counted.
        manager.start_quorum()
        optimizer.zero_grad(set_to_none=True)
        # A discarded step is done again with its own samples, which is kinder than going on in the data.
        training.loss(module, manager.current_step()).backward()
        if not manager.should_commit():
            discarded += 1
            told = 0
            continue
        optimizer.step()
        step, taking_part = manager.current_step(), manager.num_participants()
        if taking_part != told or step % ANNOUNCE_EVERY == 0:
            told = taking_part
            tell(
                step=step,
                rank=group,
                attempt=attempt,
                groups=taking_part,
                batches=manager.batches_committed(),
                discarded=discarded,
            )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="torchft's DDP on a DistroML job specification")
    parser.add_argument("--spec", type=Path, required=True, help="JobSpec as JSON")
    parser.add_argument("--timeout-ms", type=int, required=True, help="of a collective")
    parser.add_argument("--heartbeat-ms", type=int, required=True, help="between heartbeats")
    parser.add_argument("--min-groups", type=int, required=True, help="least groups of a step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
