"""Trains a model with every kind of layer for many steps, with calls that fail in between, and
exits with 1 when memory grows. `python tests/operator/leak.py [STEPS]`"""

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fusedconvbn
from fusedconvbn import (
    FusedConvBN,
    FusedConvBN1d,
    FusedConvBN2d,
    FusedConvBN3d,
    FusedConvTransposeBN1d,
    FusedConvTransposeBN2d,
    FusedConvTransposeBN3d,
)

STEPS = 2000
HEAP_BYTES_PER_STEP = 16  # the smallest block of malloc is larger
RESIDENT_GROWTH = 4 << 20  # of all steps: the heap's fragments come and go


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((f"field{i}", ctypes.c_size_t) for i in range(10))


def heap() -> int:
    """Bytes that malloc has given out; 0 where this libc cannot tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.field7 + info.field4  # uordblks, and hblkhd: what is mapped


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Layers(nn.Module):
    """All layer classes, one after another, on maps of one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(
            FusedConvBN1d(3, 4, 3, activation="silu"), FusedConvTransposeBN1d(4, 3, 3)
        )
        self.two = nn.Sequential(
            FusedConvBN2d(3, 4, 3, bias=True, momentum=None, activation="elu(0.5)"),
            FusedConvTransposeBN2d(4, 3, 3, activation="mish"),
            FusedConvBN(3, 3, 3),
        )
        self.three = nn.Sequential(
            FusedConvBN3d(3, 4, 2, padding_mode="circular", padding=1),
            FusedConvTransposeBN3d(4, 3, 2, activation="hardswish"),
        )
        self.joined = FusedConvBN2d(3, 3, 3, padding=1, activation="relu")
        self.frozen = FusedConvBN2d(3, 3, 1, activation="gelu")
        self.frozen.bn.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        two = self.two(x)
        two = self.frozen(self.joined(two, two))
        return self.one(x.flatten(2)).sum() + two.sum() + self.three(x[:, :, None]).sum()


class Stop(Exception):
    pass


def stop(*_: object) -> None:
    raise Stop


def steps() -> Callable[[int], None]:
    """A function that runs the i-th step."""
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 3, 8, 7)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def fails(error: type[Exception], function: Callable[[], object]) -> None:
        try:
            function()
        except error:
            return
        raise AssertionError(f"expected {error.__name__}")

    def step(i: int) -> None:
        optimiser.zero_grad()
        model(x).backward()
        optimiser.step()
        if i % 3 == 0:
            fails(ValueError, lambda: model.joined(x[:, :2]))
            fails(TypeError, lambda: model.joined(x.int()))
            fails(ValueError, lambda: model.joined(x, x[:1]))
            fails(ValueError, lambda: fusedconvbn.conv_bn(x, x, activation="swish"))
        if i % 3 == 1:  # in the middle of forward, of backward, and behind autograd's back
            hook = model.joined.register_forward_hook(stop)
            fails(Stop, lambda: model(x))
            hook.remove()
            hook = model.two[1].register_full_backward_hook(stop)
            loss = model(x)
            fails(Stop, loss.backward)
            hook.remove()
            fusedconvbn.check_recompute(True)
            loss = model(x)
            model.joined.conv.weight.data.mul_(1.01)
            fails(RuntimeError, loss.backward)
            fusedconvbn.check_recompute(False)
        if i % 10 == 2:
            model.eval()
            with torch.no_grad():
                model(x)
            fusedconvbn.fold(model.joined)
            model.train()
            model.frozen.bn.eval()
            first = torch.autograd.grad(model(x), model.joined.conv.weight, create_graph=True)[0]
            first.square().sum().backward()

    return step


def slope(values: list[int], every: int) -> float:
    """Bytes per step, by least squares."""
    n = len(values)
    at = [i - (n - 1) / 2 for i in range(n)]
    return sum(a * v for a, v in zip(at, values, strict=True)) / sum(a * a for a in at) / every


def measure(count: int) -> tuple[float, int]:
    """The growth of the heap per step and of the resident memory in all, over the last three
    quarters of `count` steps."""
    step, every = steps(), max(30, count // 60)
    heaps, residents = [], []
    for i in range(count):
        step(i)
        if i >= count // 4 and i % every == 0:
            gc.collect()
            heaps.append(heap())
            residents.append(resident())
    half = len(residents) // 2
    return slope(heaps, every), min(residents[half:]) - max(residents[:half])


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    per_step, growth = measure(count)
    print(f"{count} steps: heap {per_step:+.1f} bytes a step, resident {growth / 2**20:+.2f} MiB")
    if per_step > HEAP_BYTES_PER_STEP or growth > RESIDENT_GROWTH:
        sys.exit("memory grows")


if __name__ == "__main__":
    main()
