"""What the benchmarks of whole models run: the models, in which layouts, and one training step."""

import argparse
import importlib
import math
import resource
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from common import FORMATS, Row, Step, measure_memory, time_interleaved
from torch import Tensor, nn
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import _torchvision

Budget = str | float

MODELS = ["resnet50", "resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0"]


@dataclass(frozen=True)
class Configuration:
    dtype: str  # "bfloat16" means autocast
    format: str
    threads: int | None  # None on a GPU
    rivals: bool = False  # whether the rivals are measured too, or only eager and fused

    def __str__(self) -> str:
        threads = [] if self.threads is None else [f"{self.threads} threads"]
        return ", ".join([self.dtype, self.format, *threads])


ON_GPU = [
    Configuration(dtype, "channels last", None, rivals=True) for dtype in ("float32", "bfloat16")
]
ON_CPU = [
    Configuration(dtype, format, threads, rivals=(format, threads) == ("channels last", 2))
    for threads in (2, 1)
    for format in ("channels last", "contiguous")
    for dtype in ("float32", "bfloat16")
]


def definition(name: str) -> nn.Module:
    """A torchvision model with random weights; of timm:NAME timm's, which must be installed, and of
    segmentation_models_pytorch:unet that library's."""
    models = _torchvision.models()
    library, _, own = name.rpartition(":")
    if library:
        options = {"encoder_weights": None} if library == "segmentation_models_pytorch" else {}
        return importlib.import_module(library).create_model(own, **options)
    options: Row = {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    if name.startswith(("deeplabv3_", "fcn_")):
        options = {"weights_backbone": None, "aux_loss": True}
    return models.get_model(name, weights=None, **options)


@dataclass
class Workload:
    """The unfused model, and the images of a step."""

    name: str
    model: nn.Module
    images: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls, name: str, arguments: argparse.Namespace, configuration: Configuration
    ) -> "Workload":
        torch.manual_seed(0)
        if configuration.threads is not None:
            torch.set_num_threads(configuration.threads)
        format = FORMATS[configuration.format]
        model = definition(name)
        images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        model, images = (t.to(arguments.device, memory_format=format) for t in (model, images))
        return cls(name, model, images, getattr(torch, configuration.dtype))

    def autocast(self) -> AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.images.device.type, self.dtype, enabled=enabled)

    def step(self, net: nn.Module) -> Step:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            with self.autocast():
                loss = net(self.images).sum()
            loss.backward()

        return run

    def memory(self, net: nn.Module) -> dict[str, int]:
        return measure_memory(self.step(net), net, self.images.device)

    def fused(self, memory: Budget) -> tuple[nn.Module, Row]:
        """The fused model, how long fusing took, and what it found."""
        with self.autocast():
            start = time.perf_counter()
            net = fusedconvbn.fuse(self.model, self.images, memory=memory)
            seconds = time.perf_counter() - start
            report = fusedconvbn.explain(self.model, self.images, memory=memory)
        return net, {
            "fuse_seconds": seconds,
            "added_flops": report.added_share,
            "pairs": [report.fused_pairs, report.pairs],
        }

    def all_fused(self, memories: Sequence[Budget]) -> tuple[dict[str, nn.Module], dict[str, Row]]:
        """The fused model at each budget that can be reached, and what `fused` says of each."""
        nets, facts = {}, {}
        for memory in memories:
            try:
                nets[f"fuse {memory}"], facts[f"fuse {memory}"] = self.fused(memory)
            except ValueError as error:  # the budget is out of reach
                tqdm.write(f"{self.name}: left out: {error}")
        return nets, facts

    def rows(self, nets: dict[str, nn.Module], rounds: int) -> dict[str, Row]:
        """Memory, page faults and the seconds of each round, for each net."""
        steps = {name: self.step(net) for name, net in nets.items()}
        memory = {
            name: {**self.memory(net), "faults": page_faults(steps[name])}
            for name, net in nets.items()
        }
        times = time_interleaved(steps, self.images.device, rounds, self.name, math.inf)
        return {name: {**memory[name], "seconds": times[name]} for name in nets}


def page_faults(step: Step) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def ratios(memory: dict[str, int], eager: dict[str, int]) -> dict[str, float]:
    return {key: memory[key] / eager[key] for key in ("saved", "end_of_forward", "peak")}
