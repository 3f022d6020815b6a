"""What a user writes, for `mypy --strict`, and to be run: test_types.py does both. Each line with
`type: ignore` has an error that has to be found."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fusedconvbn
from fusedconvbn import (
    ChainReport,
    Fit,
    FrontPoint,
    FusedConvBN,
    FusedConvBN2d,
    FusedConvBNSequential,
    FusedConvTransposeBN3d,
    MapReport,
    MemoryReport,
    PlanFit,
    Report,
    conv_bn,
    explain,
    fit,
    fuse,
    unfuse,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.classes = 8

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def models() -> None:
    images = torch.randn(2, 3, 16, 16)
    fused = fuse(Net(), images, memory="40%", optimizer="sgd")
    assert_type(fused, Net)
    assert_type(fused.classes, int)
    assert_type(unfuse(fused), Net)
    assert_type(fusedconvbn.is_fused(fused), bool)
    assert isinstance(fused, Net)
    assert_type(fuse(nn.Sequential(Net()), memory=0.5, example_inputs=(images,)), nn.Sequential)
    assert_type(fusedconvbn.revert_sync_batchnorm(Net()), Net)
    assert_type(fusedconvbn.fold(Net().eval()), nn.Module)

    def step(x: Tensor) -> Tensor:
        return fused(x).sum().detach()  # type: ignore[no-any-return]  # nn.Module's call is untyped

    rescued: Callable[[Tensor], Tensor] = fusedconvbn.rescue(fused, step)
    assert_type(rescued(images), Tensor)


def layers() -> None:
    x = torch.randn(2, 3, 8, 8)
    layer = FusedConvBN2d(3, 8, (3, 3), padding="same", activation=nn.SiLU(), dtype=torch.float32)
    assert_type(layer.conv, nn.Conv2d)
    assert_type(layer.bn.num_features, int)
    assert_type(layer.forward(x, residual=torch.zeros(2, 8, 8, 8)), Tensor)
    shared = FusedConvBN2d.from_modules(layer.conv, layer.bn, "relu")
    assert_type(shared, FusedConvBN2d)
    transposed = FusedConvTransposeBN3d(3, 8, 3, output_padding=0, device="cpu")
    assert_type(transposed.conv, nn.ConvTranspose3d)
    assert_type(transposed.forward(torch.randn(2, 3, 4, 4, 4), [6, 6, 6]), Tensor)
    assert_type(FusedConvBN(3, 8, 3).forward(x), Tensor)
    block = FusedConvBNSequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), memory="min")
    assert_type(block.forward([x[:, :1], x[:, 1:]]), Tensor)
    weight = torch.randn(8, 3, 3, 3)
    assert_type(conv_bn(x, weight, stride=2, padding=[1, 1], activation="leaky_relu(0.2)"), Tensor)


def reports() -> None:
    report = explain(Net(), torch.randn(2, 3, 16, 16), memory="min")
    assert_type(report, Report)
    chains: list[ChainReport] = report.chains
    maps: list[MapReport] = chains[0].maps
    front: list[FrontPoint] = report.front
    assert_type(maps[0].nbytes + front[0].saved, int)
    assert_type(report.to_dict(), dict[str, Any])
    found = fit(Net, "64MiB", sample=(3, 16, 16), optimizer="adamw", device="cpu")
    assert_type(found, Fit)
    plans: list[PlanFit] = found.plans
    assert_type(plans[0].batch, int)
    with fusedconvbn.track_memory() as memory:
        Net()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert_type(memory, MemoryReport)
    assert_type(memory.peak, int)
    assert_type(fusedconvbn.build_info(), dict[str, Any])


def refused(model: Net, x: Tensor) -> None:
    """Never run."""
    fuse(model, x, optimizer="lion")  # type: ignore[arg-type]
    fuse("resnet50", x)  # type: ignore[type-var]
    fuse(model, x, memory=None)  # type: ignore[arg-type]
    explain(model)  # type: ignore[call-arg]
    fit(model, "1GiB", device="tpu")  # type: ignore[arg-type]
    FusedConvBN2d(3, 8, 3, padding="big")  # type: ignore[arg-type]
    FusedConvBN2d(3, 8, 3, padding_mode="mirror")  # type: ignore[arg-type]
    FusedConvTransposeBN3d(3, 8, 3, padding="same")  # type: ignore[arg-type]
    FusedConvBNSequential(nn.ReLU(), memory=0.5)  # type: ignore[arg-type]
    conv_bn(x, x, stride="2")  # type: ignore[arg-type]
    FusedConvBN2d(3, 8, 3).missing_method()  # type: ignore[operator]
    unfuse(model).missing_method()  # type: ignore[operator]
