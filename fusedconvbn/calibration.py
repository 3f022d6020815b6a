"""How long the maps of a model take to remake on its device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .links import CONVOLUTIONS
from .planning import InnerMap
from .profiling import Profile, device_of


def measured_seconds(maps: list[InnerMap], model: nn.Module, eager: Profile) -> list[InnerMap]:
    """The maps with the seconds that one convolution, or one pass in place, takes. Equal ones are measured once."""
    modules = dict(model.named_modules())
    known: dict[object, float] = {}
    result = []
    for m in maps:
        if m.path not in eager.shapes:
            result.append(m)
            continue
        module, shape = modules[m.path], eager.shapes[m.path]
        key: object = shape
        if isinstance(module, CONVOLUTIONS):
            key = (shape, str(module), eager.inputs[m.path])
        if key not in known:
            known[key] = _seconds(module, shape, eager.inputs.get(m.path), model, m)
        result.append(replace(m, seconds=known[key]))
    return result


@torch.no_grad()
def _seconds(
    module: nn.Module,
    shape: tuple[int, ...],
    input_shape: tuple[int, ...] | None,
    model: nn.Module,
    m: InnerMap,
) -> float:
    device = device_of(model)
    itemsize = m.nbytes // max(torch.Size(shape).numel(), 1)
    dtype = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}[itemsize]
    last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and p.size(1) > 1
        for p in model.parameters()
    )

    def draw(size: tuple[int, ...]) -> Tensor:
        t = torch.rand(size, device=device, dtype=dtype)
        return t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t

    if isinstance(module, CONVOLUTIONS):
        x, weight = draw(input_shape), module.weight.to(dtype)
        options = (module.stride, module.padding, module.dilation)
        output_padding = module.output_padding

        def run() -> Tensor:
            return torch.convolution(
                x, weight, None, *options, module.transposed, output_padding, module.groups
            )

        if isinstance(module.padding, str):
            return _median(lambda: module._conv_forward(x, weight, None), device)
        return _median(run, device)
    x = draw(shape)
    return _median(lambda: x.mul_(1.0), device)


def _median(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
