"""A small network of fused layers that the tests of compilers and exporters share."""

from typing import Optional

import torch
from torch import Tensor, nn

from fusedconvbn import FusedConvBN2d, FusedConvTransposeBN2d

ACTIVATIONS = (
    *("none", "relu", "relu6", "leaky_relu", "leaky_relu(0.2)", "elu(0.5)", "silu"),
    *("hardswish", "gelu", "gelu_tanh", "mish", "sigmoid", "tanh"),
)


class Network(nn.Module):
    """A residual tail with ReLU and a cumulative average, a frozen batch norm, and a transposed
    layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = FusedConvBN2d(3, 8, 3, padding="same", activation="silu")
        self.tail = FusedConvBN2d(8, 8, 3, padding=1, activation="relu", momentum=None)
        self.frozen = FusedConvBN2d(8, 6, (1, 2), bias=True, groups=2, activation="hardswish")
        self.up = FusedConvTransposeBN2d(6, 4, 2, stride=2, activation="leaky_relu(0.2)")
        random_statistics(self)
        self.train()

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        self.frozen.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.tail(x, x)
        return self.up(self.frozen(x))


class Activations(nn.Module):
    """A layer of each activation, every second one with a residual; transposed, and with a padding
    of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            FusedConvBN2d(4, 4, (3, 1), padding=(1, 0), activation=a) for a in ACTIVATIONS
        )
        self.up = FusedConvTransposeBN2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2)
        self.last = FusedConvBN2d(6, 5, (2, 3), padding="same", padding_mode="reflect")
        random_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        residual: Optional[Tensor] = None  # noqa: UP045 (TorchScript reads this annotation)
        for i, layer in enumerate(self.layers):
            residual = x if i % 2 == 1 else None
            x = layer(x, residual)
        return self.last(self.up(x))


@torch.no_grad()
def random_statistics(module: nn.Module) -> nn.Module:
    """Running statistics and affine parameters of which no two channels have the same."""
    for bn in module.modules():
        if isinstance(bn, nn.modules.batchnorm._NormBase):
            if bn.running_mean is not None:
                bn.running_mean.uniform_(-0.5, 0.5)
                bn.running_var.uniform_(0.5, 2)
            if bn.weight is not None:
                bn.weight.uniform_(0.5, 1.5)
                bn.bias.uniform_(-0.5, 0.5)
    return module
