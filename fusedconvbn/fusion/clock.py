"""How long a training step of a captured graph takes on a device, without computing its values."""

import math
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from ..chain import Conv, Norm
from ..flops import Chain, backward_links
from ..recomputation import has_batch_statistics
from .plan import Device, group_channels, is_winograd
from .step import loss_of, stand_in


def step_seconds(
    module: Callable[..., Any], example_inputs: Sequence[Any], device: Device
) -> float:
    """The seconds of one forward and backward of the sum of the results.

    An estimate by one rule, for an unfused and a fused graph: a kernel takes its launch and the
    longer of its FLOPs and of the bytes that it reads and writes, at the rates of the device.
    Arithmetic on vectors takes no time. It is as if no cache held anything and no two kernels
    overlapped.
    """
    clock, mode = _Clock(device), FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [stand_in(t, mode) for t in example_inputs]
    with mode, clock:
        loss = loss_of(module(*inputs))
        if loss.requires_grad:
            loss.backward()
    return clock.seconds


class _Kernel(NamedTuple):
    nbytes: float
    flops: float = 0.0
    channels: float = math.inf  # that a group of a convolution reads
    winograd: bool = False  # whether Winograd's algorithm takes it in float, channels last


class _Clock(TorchDispatchMode):
    """Adds up the seconds of the kernels that run."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.fusedconvbn._chain_forward.default:
            self._add(result[0], self._chain_forward(result[0].element_size(), *args))
        elif func is torch.ops.fusedconvbn._chain_backward.default:
            self._add(args[0], self._chain_backward(*args))
        else:
            written = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            if any(t.dim() > 1 for t in written):
                self._add(written[0], _kernels(func, args, kwargs, result, written))
        return result

    def _add(self, map: Tensor, kernels: Iterator[_Kernel]) -> None:
        itemsize = map.element_size()
        for nbytes, flops, channels, winograd in kernels:
            speed = self.device.conv_flops(itemsize, channels)
            if channels < math.inf and map.is_contiguous():
                nbytes *= 1 + self.device.reorder.get(itemsize, 0.0)
            elif winograd and itemsize == 4:
                speed *= self.device.winograd
            self.seconds += self.device.launch + max(nbytes / self.device.bandwidth, flops / speed)

    def _chain_forward(
        self,
        itemsize: int,
        tensors: Any,
        links: Any,
        scalars: Any,
        process_group: Any,
        saved: Sequence[int],
        statistics: Tensor | None = None,
    ) -> Iterator[_Kernel]:
        chain = Chain(tensors, links, scalars)
        given = 0 if statistics is None else statistics.size(1)  # of the channels of first norms
        if not chain.whole:
            yield _Kernel(2 * itemsize * prod(chain.maps[0]))
        for i in range(len(chain.links)):
            if has_batch_statistics(chain.links, i):
                channels = chain.maps[i][1]
                if given < channels:
                    yield from (_Kernel(itemsize * prod(chain.maps[i])), _Kernel(0))
                given -= channels
            yield self._forward_of(chain, i, itemsize)

    def _chain_backward(
        self,
        dout: Tensor,
        tensors: Any,
        saved_maps: Any,
        statistics: Any,
        links: Any,
        scalars: Any,
        process_group: Any,
        saved: Sequence[int],
        needs_grad: Sequence[int],
    ) -> Iterator[_Kernel]:
        chain, itemsize = Chain(tensors, links, scalars), dout.element_size()
        gradients, recomputed = backward_links(chain, saved, needs_grad)
        if recomputed and not chain.whole:
            yield _Kernel(2 * itemsize * prod(chain.maps[0]))
        for i in recomputed:
            yield self._forward_of(chain, i, itemsize)
        for i, input_needs_grad in gradients:
            if isinstance(chain.links[i], Conv):
                # Winograd's gradient of the weight gains little.
                yield _convolution(chain, i, itemsize)
                if input_needs_grad:
                    yield self._forward_of(chain, i, itemsize)
                continue
            nbytes = itemsize * prod(chain.maps[i])
            if has_batch_statistics(chain.links, i):
                yield from (_Kernel(2 * nbytes), _Kernel(0))
            yield _Kernel((4 if _has_residual(chain, i) else 3) * nbytes)

    def _forward_of(self, chain: Chain, i: int, itemsize: int) -> _Kernel:
        link = chain.links[i]
        if not isinstance(link, Conv):
            return _Kernel((2 + _has_residual(chain, i)) * itemsize * prod(chain.maps[i]))
        takes = is_winograd(link, chain.weights[i])
        return _convolution(chain, i, itemsize)._replace(winograd=takes)


def _kernels(
    func: Any, args: Any, kwargs: Any, result: Any, written: Sequence[Tensor]
) -> Iterator[_Kernel]:
    """The kernels of an operator of PyTorch's."""
    read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata for t in read}
    is_view = all(t.untyped_storage()._cdata in storages for t in written)
    if (is_view and not func._schema.is_mutable) or "empty" in func.name():
        return
    if func is torch.ops.aten.convolution_backward.default:
        dout, x, weight = args[:3]
        forward = conv_flop_count(x.shape, weight.shape, dout.shape, transposed=args[7])
        channels = group_channels(weight.shape, args[7], args[9])
        kernel = _Kernel(dout.nbytes + x.nbytes + weight.nbytes, forward, channels)
        yield from [kernel] * sum(args[-1][:2])  # one for each gradient
        return
    if "batch_norm" in func.name():  # it reads its maps twice, first for sums over them
        yield from (_Kernel(sum(t.nbytes for t in read)), _Kernel(0))
    count = flop_registry.get(func.overloadpacket)
    flops = count(*args, **kwargs, out_val=result) if count else 0
    channels = math.inf
    if func is torch.ops.aten.convolution.default:
        channels = group_channels(args[1].shape, args[6], args[8])
    yield _Kernel(sum(t.nbytes for t in (*read, *written)), flops, channels)


def _convolution(chain: Chain, i: int, itemsize: int) -> _Kernel:
    """A convolution, or one of its gradients, which reads, writes and computes as much."""
    weight, link = chain.weights[i], chain.links[i]
    values = sum(map(prod, (chain.maps[i], weight, chain.maps[i + 1])))
    channels = group_channels(weight, link.transposed, link.groups)
    return _Kernel(itemsize * values, chain.forward(i), channels)


def _has_residual(chain: Chain, i: int) -> bool:
    return isinstance(chain.links[i], Norm) and chain.links[i].residual is not None
