"""The built-in models: a multi-layer perceptron, a small convolutional net, a small GPT."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL_STD = 0.02


class MLP(nn.Module):
    """Linear layers with ReLU between them: [n, inputs] to [n, classes]."""

    def __init__(self, inputs: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * layers]
        blocks: list[nn.Module] = []
        for before, after in pairwise(widths):
            blocks += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*blocks, nn.Linear(widths[-1], classes))

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.net(inputs.flatten(1))
        return scores


class CNN(nn.Module):
    """Two convolutions with BatchNorm, pooling and a linear head: [n, pixels] to [n, classes].

    The pixels of one sample are laid out as a square; what is missing to one is zero.
    """

    def __init__(self, inputs: int, channels: int, dropout: float, classes: int) -> None:
        super().__init__()
        self.side = math.isqrt(inputs - 1) + 1
        pooled = max(1, self.side // 2)
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.MaxPool2d(2) if self.side > 1 else nn.Identity(),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * channels * pooled**2, classes)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        pixels = inputs.flatten(1)
        missing = self.side**2 - pixels.shape[1]
        if missing:
            pixels = functional.pad(pixels, (0, missing))
        scores: Tensor = self.head(self.features(pixels.view(-1, 1, self.side, self.side)))
        return scores


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each normalised before and added after."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + functional.dropout(
            self.project(attended.transpose(1, 2).reshape(n, length, width)),
            self.dropout,
            self.training,
        )
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class Transformer(nn.Module):
    """A decoder-only transformer (Radford et al., 2019): tokens int64 [n, length] to scores
    [n, length, vocabulary].

    Args:
        tied: share the token embedding with the output layer (Press and Wolf, EACL 2017).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.dropout = dropout
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # residual outputs start smaller the deeper the stack
                deep = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=INITIAL_STD / (math.sqrt(2 * layers) if deep else 1))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores
