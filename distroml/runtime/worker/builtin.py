"""The adapter behind ``spec.model`` and ``spec.dataset``, and the import of a user's own adapter."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from distroml.errors import InvalidSpec
from distroml.runtime.worker import datasets
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import Dataset
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.models import CNN, MLP, Transformer
from distroml.runtime.worker.state import TrainState
from distroml.spec import DATASET_OPTIONS, MODEL_OPTIONS, JobSpec, option_value

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "transformer": Transformer,
}
_DATASETS: dict[str, Callable[..., tuple[Dataset, Dataset]]] = {
    "synthetic": datasets.synthetic,
    "digits": datasets.digits,
    "text": datasets.text,
}


class BuiltinAdapter(FrameworkAdapter):
    """Trains ``spec.model`` on ``spec.dataset``."""

    _parts: tuple[Dataset, Dataset] | None = None

    def build_model(self, spec: JobSpec) -> nn.Module:
        options = _options(spec, "model")
        if spec.dataset == "text":
            options["vocabulary"] = datasets.BYTE_VALUES
        else:
            options["inputs"], options["classes"] = _shape(spec)
        return _MODELS[spec.model](**options)

    def build_dataset(self, spec: JobSpec) -> Dataset:
        return self._split(spec)[0]

    def build_holdout(self, spec: JobSpec) -> Dataset:
        return self._split(spec)[1]

    def evaluate(self, state: TrainState, dist: Dist) -> dict[str, float]:
        metrics = super().evaluate(state, dist)
        if self.spec.dataset == "text":
            metrics.pop("accuracy", None)
            metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
        return metrics

    def _split(self, spec: JobSpec) -> tuple[Dataset, Dataset]:
        if self._parts is None:
            options = _options(spec, "dataset")
            if spec.dataset == "text":
                options["context"] = option_value(spec, "model", "context")
            self._parts = _DATASETS[spec.dataset](**options)
        return self._parts


def load_adapter(spec: JobSpec) -> FrameworkAdapter:
    """The adapter of a job: ``spec.entrypoint`` imported from ``sys.path``, else the built-in one.

    Raises:
        InvalidSpec: the module, the class or a method of it is missing; the message names which.
    """
    if spec.entrypoint is None:
        adapter: FrameworkAdapter = BuiltinAdapter()
    else:
        adapter = _user_class(spec.entrypoint)()
    adapter.spec = spec
    return adapter


def _user_class(entrypoint: str) -> type[FrameworkAdapter]:
    module_name, _, class_name = entrypoint.partition(":")
    where = f"entrypoint '{entrypoint}'"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        whose = (
            "is not on this node's Python path"
            if _within(module_name, error.name)
            else (f"imports '{error.name}', which is not installed on this node")
        )
        raise InvalidSpec(
            f"{where}: module '{module_name}' {whose}.", field="entrypoint"
        ) from error
    kind = getattr(module, class_name, None)
    if kind is None:
        raise InvalidSpec(
            f"{where}: module '{module_name}' has no '{class_name}'.", field="entrypoint"
        )
    if not (isinstance(kind, type) and issubclass(kind, FrameworkAdapter)):
        raise InvalidSpec(
            f"{where}: '{class_name}' is not a class derived from distroml.FrameworkAdapter.",
            field="entrypoint",
        )
    for needed in (("build_model",), ("build_dataset", "build_dataloader")):
        if all(getattr(kind, name) is getattr(FrameworkAdapter, name) for name in needed):
            raise InvalidSpec(
                f"{where}: class '{class_name}' must define {' or '.join(needed)}.",
                field="entrypoint",
            )
    return kind


def _within(module_name: str, missing: str | None) -> bool:
    """True where ``missing`` is the module itself or one of its packages."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _options(spec: JobSpec, part: str) -> dict[str, Any]:
    table = MODEL_OPTIONS[spec.model] if part == "model" else DATASET_OPTIONS[spec.dataset]
    return {
        name: type(option.default)(option_value(spec, part, name)) for name, option in table.items()
    }


def _shape(spec: JobSpec) -> tuple[int, int]:
    """Input values per sample and classes of the dataset."""
    if spec.dataset == "digits":
        return 64, datasets.DIGITS_CLASSES
    options = _options(spec, "dataset")
    return options["features"], options["classes"]
