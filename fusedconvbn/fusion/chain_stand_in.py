"""A chain run with stand-ins. It allocates, overwrites and frees its maps in the order of csrc,
under the same names."""

import functools
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..chain import Conv, Gate, Norm, Prelu, unpack
from ..recomputation import (
    backward_reads,
    bias_cancels,
    has_batch_statistics,
    has_result,
    only_residual,
    recomputation,
)

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_HALF = (torch.bfloat16, torch.float16)
_CHEAP = ("none", "relu", "relu6", "leaky_relu", "hardswish")  # Cheap in kernels/activation.h


class _State:
    def __init__(
        self,
        tensors: Sequence[Tensor],
        links: Sequence[int],
        scalars: Sequence[float],
        group: str,
        saved: Sequence[int],
    ) -> None:
        parts, self.links = unpack(range(len(tensors)), links, scalars)
        self.tensors, self.parts, self.group = tensors, len(parts), group
        self.maps: list[Tensor | None] = [None] * (len(self.links) + 1)
        if self.parts == 1:
            self.maps[0] = tensors[0]
        self.saved = {*saved, *([0] if self.parts == 1 else [])}
        self.statistics: list[Tensor | None] = [None] * len(self.links)
        self.known: Tensor | None = None  # those of the first norms, side by side
        self.cast_weights: dict[int, Tensor] = {}

    def weight(self, i: int) -> Tensor:
        return self.cast_weights.get(i, self.tensors[self.links[i].weight])

    def residual(self, i: int, y: Tensor) -> Tensor | None:
        index = self.links[i].residual
        return None if index is None else _dense_like(self.tensors[index], y)

    def make_input(self) -> None:
        if self.maps[0] is None:
            self.maps[0] = torch.cat(self.tensors[: self.parts], 1)

    def _statistics(self, i: int, y: Tensor) -> Tensor:
        of_batch = has_batch_statistics(self.links, i)
        if of_batch and self.known is not None and self.known.size(1) > 0:
            found, self.known = self.known.tensor_split([y.size(1)], 1)
            return found.clone()
        rows = 5 if self.group and of_batch else 2
        return y.new_empty((rows, y.size(1)), dtype=_statistics_dtype(y))

    def run_links(self, first: int, last: int, retained: set[int]) -> None:
        for i in range(first, last):
            self._run(i, i in retained, i not in retained and (i > first or i not in self.saved))

    def _run(self, i: int, retained: bool, overwrites: bool) -> None:
        link, x = self.links[i], self.maps[i]
        if not retained:
            self.maps[i] = None
        if isinstance(link, Conv):
            bias = link.bias if not bias_cancels(self.links, i) else None
            added = None if bias is None else self.tensors[bias]
            self.maps[i + 1] = _convolution(link, x, self.weight(i), added)
            return
        y = _dense_input(x, i)
        if isinstance(link, Prelu):
            self.maps[i + 1] = torch.empty_like(y)
            return
        if self.statistics[i] is None and _normalises(link):
            self.statistics[i] = self._statistics(i, y)
        self.maps[i + 1] = y if overwrites or y is not x else torch.empty_like(y)
        if isinstance(link, Norm):
            self.residual(i, y)


def chain_forward(
    tensors: Sequence[Tensor],
    links: Sequence[int],
    scalars: Sequence[float],
    group: str,
    saved: Sequence[int],
    known: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    state = _State(tensors, links, scalars, group, saved)
    state.known = known
    state.make_input()
    state.run_links(0, len(state.links), state.saved)
    inner = [state.maps[i] for i in saved if i < len(state.links)]
    return state.maps[-1], inner, [s for s in state.statistics if s is not None]


class Backward(_State):
    """Set `grad`, the gradient of the result, and whether it may be overwritten, before `run`."""

    grad: Tensor | None
    owned: bool

    def __init__(
        self,
        tensors: Sequence[Tensor],
        saved_maps: Sequence[Tensor],
        statistics: Sequence[Tensor],
        links: Sequence[int],
        scalars: Sequence[float],
        group: str,
        saved: Sequence[int],
        needs_grad: Sequence[int],
    ) -> None:
        super().__init__(tensors, links, scalars, group, saved)
        for i, t in zip(saved, saved_maps, strict=True):
            self.maps[i] = t
        found = iter(statistics)
        self.statistics = [next(found) if _normalises(link) else None for link in self.links]
        self.needs_grad = needs_grad
        self.map_needs_grad, self.is_read = backward_reads(self.links, saved, needs_grad)
        self.recomputed: set[int] = set()
        self.grads: dict[int, Tensor] = {}

    def run(self) -> list[Tensor]:
        for i in reversed(range(len(self.links))):
            if not self.map_needs_grad[i + 1]:
                break
            if self.is_read[i] and self.maps[i] is None:
                self._recompute(i)
            self._link_backward(i)
        if 0 in self.needs_grad:
            self.grads[0] = self.grad if self.owned else self.grad.clone()
            self.grad = None
        return [
            self.grads[t] if t in self.grads else torch.zeros_like(self.tensors[t])
            for t in self.needs_grad
        ]

    def _recompute(self, i: int) -> None:
        available = [m for m, t in enumerate(self.maps) if t is not None]
        first, kept = recomputation(self.links, i, available, self.saved, self.is_read)
        self.make_input()
        for m in range(first, i):
            if isinstance(self.links[m], Conv):
                self.cast_weights[m] = self.weight(m).to(self.maps[first].dtype)
        self.run_links(first, i, kept)
        begin = first + 1 if first in self.saved else first
        self.recomputed = {m for m in range(begin, i + 1) if self.maps[m] is not None}

    def _link_backward(self, i: int) -> None:
        link = self.links[i]
        x, self.maps[i] = self.maps[i], None
        if isinstance(link, Conv):
            self._conv_backward(i, x)
        elif isinstance(link, Gate):
            self._gate_backward(i, x)
        elif isinstance(link, Prelu):
            self._prelu_backward(i, x)
        elif link.arithmetic != "none" and not only_residual(
            self.links, i, self.saved, self.needs_grad, self.map_needs_grad[i]
        ):
            self._norm_backward(i, x)
        else:
            self._activation_backward(i, x)

    def _result(self, i: int) -> Tensor | None:
        return self.maps[i + 1] if has_result(self.links, i, self.saved) else None

    def _set_vector_grad(self, index: int | None) -> None:
        if index in self.needs_grad:
            self.grads[index] = torch.empty_like(self.tensors[index])

    def _share_with_residual(self, i: int) -> None:
        index = self.links[i].residual
        if index in self.needs_grad:
            self.grads[index] = self.grad if self.owned else self.grad.clone()
            self.owned = False

    def _pass_on(self, gradient: Tensor | None, i: int) -> None:
        self.grad = gradient if self.map_needs_grad[i] else None
        self.owned = True

    def _conv_backward(self, i: int, x: Tensor) -> None:
        link, index = self.links[i], self.links[i].weight
        bias = link.bias in self.needs_grad and not bias_cancels(self.links, i)
        if bias and x.dtype in _HALF:
            _dense(self.grad)
        if bias:
            self._set_vector_grad(link.bias)
        mask = [self.map_needs_grad[i], index in self.needs_grad, bias and x.dtype not in _HALF]
        din, dweight = _convolution_backward(link, self.grad, x, self.weight(i), mask)
        self.cast_weights.pop(i, None)
        if dweight is not None:
            self.grads[index] = dweight.to(self.tensors[index].dtype)
        self._pass_on(din, i)

    def _gate_backward(self, i: int, x: Tensor) -> None:
        if self.links[i].weight in self.needs_grad:
            _dense_like(self.grad, _dense_input(x, i))
            self._set_vector_grad(self.links[i].weight)
        if not self.map_needs_grad[i]:
            self.grad = None
            return
        dout = _dense(self.grad)
        overwrites = self.owned or dout is not self.grad
        self._pass_on(dout if overwrites else torch.empty_like(dout), i)

    def _prelu_backward(self, i: int, x: Tensor) -> None:
        y = _dense_input(x, i)
        dout = _dense_like(self.grad, y)
        din, slopes = torch.empty_like(y), torch.empty_like(y)
        del dout
        index = self.links[i].weight
        if index in self.needs_grad:
            of = self.tensors[index]
            dims = [d for d in range(y.dim()) if d != 1 or of.size(0) == 1]
            self.grads[index] = slopes.sum(dims, keepdim=True).to(of.dtype).view(of.shape)
        del slopes
        self._pass_on(din, i)

    def _norm_backward(self, i: int, x: Tensor) -> None:
        link = self.links[i]
        y = _dense_input(x, i)
        y_owned = i in self.recomputed or y is not x
        dout = _dense_like(self.grad, y)
        self.owned |= dout is not self.grad
        source = None
        if link.residual is not None and link.activation != "none":
            out = self._result(i)
            source = self.residual(i, y) if out is None else _dense_like(out, y)
        writes_du = source is not None or (y.is_cpu and link.activation not in _CHEAP)
        if writes_du and not self.owned:
            dout = torch.empty_like(y)
            self.owned = True
        self._set_vector_grad(link.weight)
        self._set_vector_grad(link.bias)
        self.grad = dout
        self._share_with_residual(i)
        if not self.map_needs_grad[i]:
            self.grad = None
            return
        self._pass_on(y if y_owned else dout if self.owned else torch.empty_like(y), i)

    def _activation_backward(self, i: int, x: Tensor | None) -> None:
        if self.links[i].activation != "none":
            u, owned = self._result(i), False
            if u is None:
                u = _dense_input(x, i)
                owned = i in self.recomputed or u is not x
                if self.residual(i, u) is not None and not owned:
                    u, owned = torch.empty_like(u), True
            u = _dense(u)
            dout = _dense_like(self.grad, u)
            dout_owned = self.owned or dout is not self.grad
            self.grad = dout if dout_owned else u if owned else torch.empty_like(u)
            self.owned = True
        self._share_with_residual(i)
        if not self.map_needs_grad[i]:
            self.grad = None


# ------------------------------------------------------------------------------------------- maps.h


def _normalises(link: Any) -> bool:
    return isinstance(link, Norm) and link.arithmetic != "none"


def _statistics_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _format(t: Tensor) -> torch.memory_format:
    """``suggest_memory_format``."""
    return torch._prims_common.suggest_memory_format(t)


def _is_last(t: Tensor) -> bool:
    if t.dim() in _LAST:
        return t.is_contiguous(memory_format=_LAST[t.dim()])
    return t.movedim(1, -1).is_contiguous()


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() or _is_last(t) else t.contiguous(memory_format=_format(t))


def _dense_input(t: Tensor, i: int) -> Tensor:
    return _dense(_contiguous(t, _format(t)) if i == 0 else t)


def _contiguous(t: Tensor, format: torch.memory_format) -> Tensor:
    # (The call would give another object for the same tensor.)
    return t if t.is_contiguous(memory_format=format) else t.contiguous(memory_format=format)


def _dense_like(t: Tensor, like: Tensor) -> Tensor:
    same = (like.is_contiguous() and t.is_contiguous()) or (_is_last(like) and _is_last(t))
    return t if same else torch.empty_like(like)


# ------------------------------------------------------------------------------------ convolution.h

_TILE = 16  # winograd_positions
_MOST_VALUES = 2**20


def _conv_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    if x.dim() < 4 or (x.dim() == 5 and x.dtype == torch.float64):
        return torch.contiguous_format
    found = _format(x)
    return _format(weight) if found == torch.contiguous_format else found


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _is_depthwise(conv: Conv, x: Tensor, weight: Tensor) -> bool:
    channels, k = x.size(1), weight.size(2)
    return (
        x.is_cpu
        and x.dim() == 4
        and not conv.transposed
        and conv.groups == channels == weight.size(0)
        and weight.size(1) == 1
        and channels >= 16
        and k in (3, 5)
        and weight.size(3) == k
        and list(conv.stride) in ([1, 1], [2, 2])
        and list(conv.dilation) == [1, 1]
        and max(conv.padding) < k
        and _is_last(x)
        and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    )


def _depthwise_applies(conv: Conv, x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.float32 and _is_depthwise(conv, x, weight)


def _winograd_tiles(conv: Conv, x: Tensor, weight: Tensor) -> int:
    """The tiles of a Winograd convolution, 0 where another one runs."""
    takes = (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and _is_last(x)
        and max(conv.padding) <= 2
        and torch.ops.fusedconvbn._winograd_takes(
            weight.shape, conv.stride, conv.dilation, conv.transposed, conv.groups
        )
    )
    if not takes:
        return 0
    tiles = x.size(0) * prod(-(-(x.size(d + 2) + 2 * conv.padding[d] - 2) // 2) for d in (0, 1))
    return tiles if tiles >= 64 * torch.get_num_threads() else 0


def _filters_at_a_time(channels: int, filters: int) -> int:
    return min(max(_MOST_VALUES // (_TILE * channels) // 32 * 32, 32), filters)


def _winograd(tiles: int, shape: Sequence[int], x: Tensor, weight: Tensor) -> Tensor:
    """The result, of `shape`, of the convolution of `x` with the weight, as given or rotated."""
    kernel = _contiguous(weight, torch.channels_last)
    result = _new(x, shape, torch.channels_last)
    channels = x.size(1)
    some = _filters_at_a_time(channels, shape[1])
    threads = min(max(tiles // 8, 1), torch.get_num_threads())
    most = min(max(2**15 // (channels + some), 16), 64)
    rounds = _over(tiles, threads * most)
    block = _over(_over(tiles, threads * rounds), 8) * 8
    u = x.new_empty(_TILE * channels * some)
    own = x.new_empty(threads * _TILE * (block * (channels + some) + 64))
    del kernel, u, own
    return result


def _winograd_grad_weight(tiles: int, x: Tensor, weight: Tensor) -> Tensor:
    result = torch.empty_like(weight, memory_format=torch.channels_last)
    most = _filters_at_a_time(x.size(1), weight.size(0))
    size = _TILE * most * x.size(1)
    slices = min(max(min(_MOST_VALUES // size, tiles // 256), 1), 8)
    count = 64
    if slices == 1:
        count = min(max(_MOST_VALUES // 16 // (x.size(1) + most) // 64 * 64, 64), 256)
    sums = x.new_empty(slices * size)
    spread = x.new_empty(slices * _TILE * count * (x.size(1) + most))
    del sums, spread
    return result


def _new(like: Tensor, shape: Sequence[int], format: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def _over(a: int, b: int) -> int:
    return -(-a // b)


def _slice(x: Tensor, values: int) -> int:
    """How many samples a convolution in float takes at a time; `values` are those of its result."""
    return min(max(x.size(0) * 2**23 // max((x.numel() + values) * 4, 1), 1), x.size(0))


def _convolution(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    format, shape = _conv_format(x, weight), conv.result_shape(x.shape, weight.shape)
    if bias is None and (tiles := _winograd_tiles(conv, x, weight)):
        return _winograd(tiles, shape, x, weight)
    if bias is None and _depthwise_applies(conv, x, weight):
        result, taps = _new(x, shape, torch.channels_last), torch.empty_like(weight)
        del taps
        return result
    if not _runs_in_float(x):
        added = None if bias is None else bias.to(x.dtype)
        return _contiguous(torch.convolution(x, weight.to(x.dtype), added, *conv.options), format)
    result = _new(x, shape, format)
    weight, bias = weight.to(x.dtype).float(), None if bias is None else bias.float()
    _convolution(conv, x[: _slice(x, result.numel())].float(), weight, bias)
    return result


def _convolution_backward(
    conv: Conv, dout: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the weight. That of the bias is left out: it is small."""
    format, din, dweight = _conv_format(x, weight), None, None
    if not mask[2] and (tiles := _winograd_tiles(conv, x, weight)):
        gradient = _contiguous(dout, torch.channels_last)
        if mask[0]:
            outputs = x.size(0) * _over(x.size(2), 2) * _over(x.size(3), 2)
            din = _winograd(outputs, x.shape, gradient, weight)
        if mask[1]:
            dweight = _winograd_grad_weight(tiles, x, weight)
        return din, dweight
    if not mask[2] and _depthwise_applies(conv, x, weight):
        gradient = _contiguous(dout, torch.channels_last)
        if mask[0]:
            din, taps = torch.empty_like(x), torch.empty_like(weight)
            del taps
        if mask[1]:
            dweight = torch.empty_like(weight, memory_format=torch.channels_last)
        del gradient
        return din, dweight
    if not _runs_in_float(x) and not (x.dtype in _HALF and _is_depthwise(conv, x, weight)):
        sizes = [dout.size(1)] if mask[2] else None
        din, dweight, _ = torch.ops.aten.convolution_backward(
            dout, x, weight.to(x.dtype), sizes, *conv.options, mask
        )
        din = _contiguous(din, format) if mask[0] else None
        return din, _contiguous(dweight, format) if mask[1] else None
    weight = weight.to(x.dtype).float()
    if mask[0]:
        din = _new(x, x.shape, format)
    count = _slice(x, dout.numel())
    some, values = dout[:count].float(), x[:count].float()
    of_slice, dweight = _convolution_backward(conv, some, values, weight, mask)
    if count < x.size(0):  # the next slice has a gradient of the weight too, to be added
        del some, values, of_slice
        some, values = dout[:count].float(), x[:count].float()
        _convolution_backward(conv, some, values, weight, mask)
    return din, dweight


def _runs_in_float(x: Tensor) -> bool:
    return x.is_cpu and not _cpu_has(x.dtype)
