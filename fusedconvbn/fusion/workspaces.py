"""What kernels allocate for themselves on the CPU, as far as it matters. The rules were read from
the allocator's events on a CPU with AVX-512, in a process of one thread."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import cuda_libraries

_BLOCK = 16  # channels in a block of oneDNN's own formats, with AVX-512


def workspace(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """The most bytes that an operator has beyond its arguments and results while it runs."""
    if func in cuda_libraries.CONVOLUTIONS and args[0].is_cuda:
        return cuda_libraries.workspace(func, args)
    rule = _RULES.get(func)
    return rule(args, kwargs, result) if rule and args[0].is_cpu else 0


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _batch_norm_backward(args: Sequence[Any], _: Any, __: Any) -> int:
    dout, x = args[:2]
    if (dout.is_contiguous() and x.is_contiguous()) or (_is_last(dout) and _is_last(x)):
        return _nbytes(x)
    return 0 if _is_last(dout) else _in_float(dout)


def _sum(args: Sequence[Any], kwargs: Mapping[str, Any], _: Any) -> int:
    t, dims = args[:2]
    dims = dims or range(t.dim())
    per_channel = 0 in dims and 1 not in dims and not _is_last(t)
    return _in_float(t) if per_channel or kwargs.get("dtype") == torch.float32 else 0


def _mean(args: Sequence[Any], _: Any, __: Any) -> int:
    return _in_float(args[0])


def _in_float(t: Tensor) -> int:
    """The copy of a map of a half type from which it is summed in float."""
    return 4 * t.numel() if t.element_size() == 2 else 0


def _max_pool(_: Any, __: Any, result: Any) -> int:
    return 8 * int(result[0].numel())  # PyTorch's indices


def _max_pool_backward(args: Sequence[Any], _: Any, __: Any) -> int:
    return 8 * int(args[0].numel())


class _OneDNN:
    """The copies that oneDNN makes of the tensors of a convolution, in formats of its own.

    Attributes:
        last: whether it reads and writes the maps themselves, which are channels last.
        x, y, weight: bytes of the copies of the maps and of the weight.
        twice: whether the gradient of the input exists in two formats.
        sums: bytes in which the weight's gradient of a half type is summed.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, y: Tensor, options: Sequence[Any], backward: bool = False
    ) -> None:
        stride, groups = options[0][-1], options[5]
        size, taps = weight.element_size(), prod(weight.shape[2:])
        into, out = weight.size(1), weight.size(0) // groups
        self.last = _is_last(x) or _is_last(weight)
        depthwise = groups > 1 and into == out == 1
        if depthwise and not (backward and self.last and _is_grouped(x, weight, stride)):
            values = _padded(groups)
        elif groups > 1 and not (backward and self.last):
            values = weight.numel() // taps
        else:
            values = groups * (into if into == 3 else _padded(into)) * _padded(out)
            depthwise = False
        self.weight = values * taps * size
        self.x, self.y = (0 if self.last or t.size(1) in (1, 3) else _blocked(t) for t in (x, y))
        self.twice = not self.last and stride > 1 and (groups == 1 or (depthwise and size == 2))
        self.sums = 0
        if size == 2 and backward:  # in float, from a sample of both maps at a time
            wider = _padded(into) // into if groups > 1 else 1
            if depthwise or (taps == 1 and not self.last):
                wider = 0
            self.sums = 2 * self.weight + wider * (_nbytes(x) + _nbytes(y)) // x.size(0)


def _padded(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


def _is_last(t: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim())
    return last is not None and t.is_contiguous(memory_format=last) and not t.is_contiguous()


def _blocked(t: Tensor) -> int:
    return _nbytes(t) // t.size(1) * _padded(t.size(1))


def _is_grouped(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether oneDNN computes the gradient of a depthwise weight, channels last, as that of any
    grouped one, with 16 channels in each group."""
    return weight.size(-1) > 3 or 1 < x.size(-1) < 2 + stride


def _is_mkldnn(x: Tensor, weight: Tensor, bias: Tensor | None, options: Sequence[Any]) -> bool:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    given = dict(zip(names, options, strict=False))
    backends: Any = torch._C  # torch's types have another name for one of the two
    found = backends._select_conv_backend(x, weight, bias, **given)
    return bool(found == backends._ConvBackend.Mkldnn)


def _convolution(args: Sequence[Any], _: Any, y: Tensor) -> int:
    x, weight, bias, *options = args
    if not _is_mkldnn(x, weight, bias, options):
        return 0
    of = _OneDNN(x, weight, y, options)
    return of.weight if of.last else max(of.x + of.weight + of.y - _nbytes(y), of.y)


def _convolution_backward(args: Sequence[Any], _: Any, __: Any) -> int:
    y, x, weight, _, *options, mask = args
    if not _is_mkldnn(x, weight, None, options):
        return 0
    of = _OneDNN(x, weight, y, options, backward=True)
    din, dweight = (
        _nbytes(t) if needed else 0 for t, needed in zip((x, weight), mask, strict=False)
    )
    found = [0]
    if mask[0]:  # the weight's gradient is computed later
        found += [of.weight + of.x + of.y - (0 if of.last else din) - dweight, of.x - dweight]
        if of.twice:
            found.append(of.x + din - dweight)
    if mask[1]:
        plain = options[5] > 1 and 1 < weight.size(1) < _BLOCK and weight.element_size() == 2
        found.append(of.weight + of.sums + (0 if plain else of.x + of.y) - dweight)
        found.append(of.weight + (dweight if of.last else 0))
    return max(found)


_aten, _ops = torch.ops.aten, torch.ops.fusedconvbn
_RULES = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.dim: _mean,
    _ops._max_pool2d.default: _max_pool,
    _ops._max_pool2d_backward.default: _max_pool_backward,
}
