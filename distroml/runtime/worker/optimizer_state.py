"""An optimizer's state by parameter *name*, so that it can be cut, hashed and compared like the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distroml.errors import DistroMLError


def dump(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Slots as ``<parameter>.<slot>`` tensors, and JSON-able hyperparameters.

    Raises:
        DistroMLError: the optimizer holds parameters that are not the model's, or values JSON cannot hold.
    """
    names = _names(optimizer, model)
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}.{slot}"] = value
            elif value is not None:
                plain.setdefault(names[index], {})[slot] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[index] for index in group["params"]]}
        for group in optimizer.state_dict()["param_groups"]
    ]
    return tensors, {"groups": groups, "plain": plain}


def load(
    optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put back what ``dump`` took out, for the same parameters.

    Raises:
        DistroMLError: the saved parameter names are not those of this optimizer.
    """
    names = _names(optimizer, model)
    index_of = {name: index for index, name in enumerate(names)}
    saved = [name for group in values["groups"] for name in group["params"]]
    if sorted(saved) != sorted(names):
        different = sorted(set(saved) ^ set(names))[:5]
        raise DistroMLError(f"The checkpoint's optimizer has other parameters: {different}")
    state: dict[int, dict[str, Any]] = {
        index_of[name]: dict(slots) for name, slots in values["plain"].items()
    }
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition(".")
        state.setdefault(index_of[name], {})[slot] = tensor
    groups = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        | {"params": [index_of[name] for name in group["params"]]}
        for group in values["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in the order of its indices."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = []
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params" and isinstance(value, torch.Tensor):
                raise DistroMLError(
                    f"The optimizer's '{key}' is a tensor; use a plain number, which can be saved."
                )
        for parameter in group["params"]:
            if parameter not in name_of:
                raise DistroMLError("The optimizer holds a parameter that is not in the model.")
            names.append(name_of[parameter])
    return names
