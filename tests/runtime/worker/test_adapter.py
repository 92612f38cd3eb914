from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import distroml
from distroml.errors import DistroMLError
from distroml.runtime.worker.adapter import FrameworkAdapter
from distroml.runtime.worker.batches import LocalBatch
from distroml.runtime.worker.builtin import load_adapter
from distroml.runtime.worker.digest import state_digest
from distroml.runtime.worker.dist import Dist
from distroml.runtime.worker.process_group import RankGroup
from distroml.runtime.worker.rendezvous import CollectiveBroken
from distroml.runtime.worker.state import StateBlob
from distroml.runtime.worker.tensor_bytes import as_tensor, buffer_bytes, copy_into
from distroml.runtime.worker.train import take_step
from distroml.spec import convert_spec
from tests.runtime.worker.stub_adapters import Normalised, Regression

MODELS = {
    "mlp": {"model": "mlp", "model_options": {"layers": 3}},
    "cnn": {"model": "cnn", "dataset_options": {"features": 50}},
    "transformer": {
        "model": "transformer",
        "dataset": "text",
        "dataset_options": {"max_bytes": 8192},
        "model_options": {"width": 16, "heads": 2, "context": 32},
    },
}
OPTIMIZERS = {
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
}


def alone() -> Dist:
    return Dist(RankGroup(1, 0, 1, "127.0.0.1", lambda key, value: None))


def test_one_rank_alone_has_agreed_with_itself() -> None:
    dist = alone()
    dist.barrier("dataset")
    assert dist.agree("size", 7) == 7
    with pytest.raises(ValueError, match="characters"):
        dist.barrier("")
    with pytest.raises(TypeError):
        dist.agree("size", 7.5)  # type: ignore[arg-type]
    dist.group.abort("generation 1 is over")
    with pytest.raises(CollectiveBroken, match="is over"):
        dist.barrier("dataset")


def step(adapter: FrameworkAdapter, state, dist: Dist, number: int):  # type: ignore[no-untyped-def]
    dataset = adapter.build_dataset(adapter.spec)
    batch = dataset.batch(torch.arange(8 * number, 8 * number + 8).numpy())
    part = LocalBatch(batch, samples=8, batch_samples=8, epoch=0, ends_epoch=False)
    state.step = number
    return take_step(adapter, state, dist, [part])[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_comes_back_and_trains_on_as_if_never_stored(model: str, optimizer: str) -> None:
    adapter = load_adapter(convert_spec(MODELS[model] | {"hyperparameters": OPTIMIZERS[optimizer]}))
    dist = alone()
    state = step(adapter, adapter.new_state(), dist, 0)
    blob = adapter.serialize_state(state)
    copies = copy_into(memoryview(bytearray(buffer_bytes(blob.tensors))), blob.tensors)
    stored = StateBlob({piece.name: as_tensor(piece) for piece in copies}, blob.values)
    again = adapter.deserialize_state(stored)
    assert state_digest(adapter.serialize_state(again)) == state_digest(blob)
    digests = {
        state_digest(adapter.serialize_state(step(adapter, s, dist, 1))) for s in (state, again)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("model", MODELS)
def test_models_have_the_shapes_of_their_data(model: str) -> None:
    adapter = load_adapter(convert_spec(MODELS[model]))
    built = adapter.build_model(adapter.spec)
    batch = adapter.build_dataset(adapter.spec).batch(torch.arange(4).numpy())
    outputs = adapter.forward(built, batch)
    assert outputs.shape[:-1] == batch[1].shape
    assert adapter.loss(outputs, batch).shape == ()


def test_the_transformer_sees_no_later_token() -> None:
    adapter = load_adapter(convert_spec(MODELS["transformer"]))
    model = adapter.build_model(adapter.spec).eval()
    tokens = torch.arange(32).view(1, 32)
    other = tokens.clone()
    other[0, 20:] = 7
    with torch.no_grad():
        assert torch.equal(model(tokens)[0, :20], model(other)[0, :20])
    assert model.head.weight is model.tokens.weight


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_metrics(model: str) -> None:
    adapter = load_adapter(convert_spec(MODELS[model]))
    state = adapter.new_state()
    before = state_digest(adapter.serialize_state(state))
    metrics = adapter.evaluate(state, alone())
    assert set(metrics) == {"eval_loss", "perplexity" if model == "transformer" else "accuracy"}
    assert state.model.training
    assert state_digest(adapter.serialize_state(state)) == before


def test_without_held_out_samples_there_is_no_evaluation() -> None:
    adapter = Regression()
    adapter.spec = convert_spec({"entrypoint": "stub_adapters:Regression"})
    assert adapter.evaluate(adapter.new_state(), alone()) == {}


def test_digest_depends_on_name_type_shape_and_bytes_only() -> None:
    base = StateBlob({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}, {"lr": 1})
    same = StateBlob({"b": torch.tensor(3), "a": torch.tensor([1.0, 2.0])}, {"lr": 2})
    assert state_digest(base) == state_digest(same)
    others = [
        {"c": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor(3)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.int32)},
    ]
    digests = {state_digest(StateBlob(tensors, {})) for tensors in others}
    assert len(digests) == 4
    assert state_digest(base) not in digests


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([True, False]),
        torch.randn(5).bfloat16(),
        torch.randn(3, 2).half(),
        torch.arange(3, dtype=torch.uint8),
    ],
    ids=str,
)
def test_every_kind_of_tensor_survives_as_bytes(tensor: torch.Tensor) -> None:
    tensors = {"first": torch.tensor([1], dtype=torch.uint8), "it": tensor}
    copies = copy_into(memoryview(bytearray(buffer_bytes(tensors))), tensors)
    back = as_tensor(copies[1])
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_tensors_that_cannot_be_saved_are_named() -> None:
    with pytest.raises(DistroMLError, match=r"torch\.complex64 cannot be saved"):
        state_digest(StateBlob({"x": torch.zeros(1, dtype=torch.complex64)}, {}))


class Foreign(Normalised):
    def build_optimizer(self, spec: distroml.JobSpec, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    adapter = Foreign()
    adapter.spec = convert_spec({"entrypoint": "stub_adapters:Foreign"})
    with pytest.raises(DistroMLError, match="holds a parameter that is not in the model"):
        adapter.serialize_state(adapter.new_state())


def test_importing_distroml_does_not_import_torch() -> None:
    code = (
        "import sys, distroml; assert 'torch' not in sys.modules; "
        "distroml.FrameworkAdapter, distroml.TrainState, distroml.StateBlob; "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
