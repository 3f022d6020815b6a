"""Conversions of models with fused layers."""

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Optional, TypeVar

import torch
from torch import Tensor, nn

from .activations import activation_module
from .hooks import compute_parameters
from .modules import FusedConvBN, _ConvBN, _FusedConvBN, _FusedConvTransposeBN
from .synchronised import NOT_SYNCHRONISED


class ConvActivation(nn.Sequential):
    """A folded layer: ``conv`` and ``activation``, both plain modules, with the fused layer's
    arguments."""

    if TYPE_CHECKING:  # TorchScript would read this, too
        conv: Any
        activation: Any

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        output = self.conv(input)
        result: Tensor = self.activation(output if residual is None else output + residual)
        return result


class ConvTransposeActivation(nn.Sequential):
    """The same with a transposed convolution."""

    if TYPE_CHECKING:
        conv: Any
        activation: Any

    def forward(
        self,
        input: Tensor,
        output_size: Optional[list[int]] = None,  # noqa: UP045
        residual: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        output = self.conv(input, output_size)
        result: Tensor = self.activation(output if residual is None else output + residual)
        return result


M = TypeVar("M", bound=nn.Module)
_FORWARDS = (_FusedConvBN.forward, _FusedConvTransposeBN.forward)
_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def fold(module: nn.Module, keep_signature: bool = False) -> nn.Module:
    r"""The network that ``module.eval()`` computes, with each fused layer folded into one plain
    convolution.

    .. math::
        W' = W \cdot \frac{\gamma}{\sqrt{\mathrm{running\_var} + \mathrm{eps}}}, \qquad
        b' = \beta + (b - \mathrm{running\_mean})
            \cdot \frac{\gamma}{\sqrt{\mathrm{running\_var} + \mathrm{eps}}}

    per output channel, computed in float32 (float64 for such parameters) and rounded once to the
    dtype of the weight.

    Args:
        module: a fused layer, or a model with fused layers anywhere. It is not changed.
        keep_signature: for a model that calls a layer with a residual, or a transposed one with an
            ``output_size``, neither of which ``nn.Sequential`` takes.

    Returns:
        A module of ``torch.nn`` for a layer, a copy with such modules in place of its fused layers
        for a model: an ``nn.Conv*`` or ``nn.ConvTranspose*`` with a bias or, where the layer has an
        activation, an ``nn.Sequential`` of this ``conv`` and the ``activation``. Nothing of
        fusedconvbn is needed to load or run it. With `keep_signature` it is a subclass of
        ``nn.Sequential`` from this package, also where there is no activation. Forward hooks stay;
        a layer that is used several times is folded once. All modules are in eval mode.

    Raises:
        ValueError: a layer has no running statistics, or a ``forward`` of its own; the message
            names the layer.
        TypeError: something in ``module`` is scripted: fold first, then script.
    """
    for name, child in module.named_modules():
        where = f"{type(child).__name__} {name!r}" if name else type(child).__name__
        fused = isinstance(child, _ConvBN)
        if isinstance(child, torch.jit.ScriptModule):
            raise TypeError(
                f"fold: expected a model to script afterwards, got the scripted {where}"
            )
        if isinstance(child, FusedConvBN) or (fused and child.bn.running_mean is None):
            raise ValueError(f"fold: expected {where} to have running statistics, got none")
        if fused and getattr(child.forward, "__func__", None) not in _FORWARDS:
            raise ValueError(
                f"fold: expected {where} to run the forward of a fused layer, got its own"
            )
    # In eval mode before any layer is replaced: a model's `train` may access its layers, and a
    # parametrized weight may depend on the mode.
    original = copy.deepcopy(module).eval()
    layers = [child for child in original.modules() if isinstance(child, _ConvBN)]
    for layer in layers:
        compute_parameters((layer.conv, layer.bn))
    # deepcopy takes an object's copy from its memo, where it is there.
    memo: dict[int, Any] = {id(t): t for t in (*original.parameters(), *original.buffers())}
    memo.update({id(layer): _folded(layer, keep_signature) for layer in layers})
    result = copy.deepcopy(original, memo)
    for layer in layers:
        for name in _FORWARD_HOOKS:
            setattr(memo[id(layer)], name, copy.deepcopy(getattr(layer, name), memo))
    return result


@torch.no_grad()
def _folded(layer: _ConvBN, keep_signature: bool) -> nn.Module:
    old, bn = layer.conv, layer.bn
    padding = old.padding
    # Padding in numbers where that is possible: not every optimiser reads names.
    if isinstance(padding, str) and not layer._pad:
        padding = tuple(layer._padding)
    conv: Any = type(layer).conv_class(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=padding,
        dilation=old.dilation,
        groups=old.groups,
        padding_mode=old.padding_mode,
        **({"output_padding": old.output_padding} if old.transposed else {}),
        device="meta",
    )
    weight, bias = torch.ops.fusedconvbn._fold(
        old.weight,
        old.bias,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        old.transposed,
        old.groups,
    )
    dtype = old.weight.dtype
    # Of all parameters, since a parametrized weight is not among them.
    trained = any(p.requires_grad for p in old.parameters())
    conv.weight = nn.Parameter(weight.to(dtype), trained)
    conv.bias = nn.Parameter(bias.to(dtype), trained)
    if not keep_signature and layer.activation == "none":
        plain: nn.Module = conv.eval()
        return plain
    kind: type[nn.Sequential] = nn.Sequential
    if keep_signature:
        kind = ConvTransposeActivation if old.transposed else ConvActivation
    activation = activation_module(layer.activation)
    return kind(OrderedDict(conv=conv, activation=activation)).eval()


def revert_sync_batchnorm(module: M) -> M:
    """Makes every synchronised fused layer in `module` use the statistics of its own process again,
    in place: the inverse of ``nn.SyncBatchNorm.convert_sync_batchnorm``, which takes models with
    fused layers.

    Parameters and buffers stay the same objects. An ``nn.SyncBatchNorm`` elsewhere in the model is
    left alone: the number of dimensions of its input is not known.

    Args:
        module: a model or a layer.

    Returns:
        `module`.
    """
    for layer in module.modules():
        if isinstance(layer, _ConvBN):
            layer._synchronised = NOT_SYNCHRONISED
    return module
