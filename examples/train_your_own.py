"""Train your own model on your own data: a class with two or three methods is all it takes.

Start the nodes in a directory from which this file can be imported, then submit ``own.json``::

    distroml submit examples/own.json --follow

The data are real: 569 breast tumours, 30 measurements each, benign or malignant (Street, Wolberg and
Mangasarian, 1993), as they come with scikit-learn (``pip install 'distroml[digits]'``).
"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset

import distroml


class MyAdapter(distroml.FrameworkAdapter):
    """Tells benign tumours from malignant ones."""

    def build_model(self, spec: distroml.JobSpec) -> nn.Module:
        hidden = int(spec.model_options.get("hidden", 32))
        return nn.Sequential(nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def build_dataset(self, spec: distroml.JobSpec) -> TensorDataset:
        return tumours(slice(100, None))

    def build_holdout(self, spec: distroml.JobSpec) -> TensorDataset:
        return tumours(slice(0, 100))


def tumours(which: slice) -> TensorDataset:
    """Measurements float32 [n, 30], each scaled to mean 0 and variance 1, and classes int64 [n]."""
    measured, classes = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    scaled = (measured - measured.mean(0)) / measured.std(0)
    return TensorDataset(scaled.float()[which], classes[which])
