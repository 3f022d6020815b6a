"""What CUDA's libraries allocate for themselves, beside the tensors of a step."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

UNSPLIT = 0.01  # of a peak: the rests of blocks that the caching allocator does not split
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def always_held() -> int:
    """The workspaces of cuBLAS, by its defaults: one of the thread that runs forward, one of
    autograd's. From their first product on they are never freed. Those of a Hopper where CUDA is
    not in use."""
    is_known = torch.cuda.is_initialized()
    is_large = not is_known or torch.cuda.get_device_capability()[0] in (9, 10)  # or Blackwell
    return 2 * (32 * 2**20 if is_large else 4096 * 1024 * 2 + 16 * 1024 * 8)


def workspace(func: Any, args: Sequence[Any]) -> int:
    """The most bytes that one of CONVOLUTIONS has beyond its arguments and results while it runs; 0
    where CUDA is not in use, as all tensors are stand-ins. It depends on the GPU and on cuDNN, so
    it is measured."""
    if not torch.cuda.is_initialized():
        return 0
    cudnn = torch.backends.cudnn
    deterministic = torch.are_deterministic_algorithms_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, deterministic
    return _measured(func, tuple(map(_described, args)), flags)


class _Map(NamedTuple):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def tensor(self) -> Tensor:
        t = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return t.zero_()


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Map(tuple(argument.shape), argument.stride(), argument.dtype, argument.device)
    return tuple(argument) if isinstance(argument, list) else argument


@functools.cache
def _measured(func: Any, described: tuple[Any, ...], flags: tuple[bool, ...]) -> int:
    with unset_fake_temporarily(), torch.no_grad():
        device = described[0].device
        args = [d.tensor() if isinstance(d, _Map) else d for d in described]
        func(*args)  # with cudnn.benchmark it tries all algorithms
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = func(*args)
        most, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del results  # not before the memory is asked for
    return most - max(after, before)
