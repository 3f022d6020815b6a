"""Conversions of models with fused layers."""

import copy
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .activations import activation_module
from .modules import FusedConvBN, _ConvBN
from .synchronised import NOT_SYNCHRONISED


class ConvActivation(nn.Sequential):
    """A folded layer with an activation: the convolution, then the activation, both plain modules."""

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        output = self[0](input)
        return self[1](output if residual is None else output + residual)


def fold(module: nn.Module) -> nn.Module:
    r"""The network that ``module.eval()`` computes, with each fused layer folded into one plain convolution.

    .. math::
        W' = W \cdot \frac{\gamma}{\sqrt{\mathrm{running\_var} + \mathrm{eps}}}, \qquad
        b' = \beta + (b - \mathrm{running\_mean}) \cdot \frac{\gamma}{\sqrt{\mathrm{running\_var} + \mathrm{eps}}}

    per output channel, computed in float32 (float64 for such parameters) and rounded once to the dtype of the weight.

    Args:
        module: a fused layer, or a model with fused layers anywhere. It is not changed.

    Returns:
        For a layer an ``nn.Conv*`` or ``nn.ConvTranspose*`` with a bias, and behind it its activation, if it has one, in an
        ``nn.Sequential``; for a model a copy with such modules in the place of its fused layers. A layer that is used
        in several places is folded once. All in eval mode.

    Raises:
        ValueError: a layer has no running statistics; the message names it.
    """
    layers = {m: name for name, m in module.named_modules() if isinstance(m, _ConvBN | FusedConvBN)}
    for layer, name in layers.items():
        where = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
        if isinstance(layer, FusedConvBN) or layer.bn.running_mean is None:
            raise ValueError(f"fold: expected {where} to have running statistics, got none")
    # deepcopy takes what its memo has for an object as its copy
    memo: dict[int, Any] = {id(layer): _folded(layer) for layer in layers}
    return copy.deepcopy(module, memo).eval()


@torch.no_grad()
def _folded(layer: _ConvBN) -> nn.Module:
    old, bn = layer.conv, layer.bn
    conv = type(layer).conv_class(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        groups=old.groups,
        padding_mode=old.padding_mode,
        **({"output_padding": old.output_padding} if old.transposed else {}),
        device="meta",
    )
    weight = old.weight.detach()
    wide = torch.promote_types(bn.running_var.dtype, torch.float32)
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean.to(wide)
    if old.bias is not None:
        shift = shift + old.bias
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    # The output channels: dimension 0, or, transposed, (groups, dimension 1).
    per_channel = [1] * (weight.dim() - 2)
    if old.transposed:
        by_group = weight.to(wide).unflatten(0, (old.groups, -1))
        scaled = (by_group * scale.reshape(old.groups, 1, -1, *per_channel)).flatten(0, 1)
    else:
        scaled = weight.to(wide) * scale.reshape(-1, 1, *per_channel)
    conv.weight = nn.Parameter(scaled.to(weight.dtype), old.weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight.dtype), old.weight.requires_grad)
    if layer.activation == "none":
        return conv.eval()
    return ConvActivation(conv, activation_module(layer.activation)).eval()


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Makes the statistics of every synchronised fused layer in `module` those of one process again, in place: the way back
    from ``nn.SyncBatchNorm.convert_sync_batchnorm``, which takes models with fused layers as they are.

    Parameters and buffers are the same objects afterwards. An ``nn.SyncBatchNorm`` elsewhere in the model is left
    alone: what dimensions its input has cannot be seen from it.

    Args:
        module: a model or a layer.

    Returns:
        `module`.
    """
    for layer in module.modules():
        if isinstance(layer, _ConvBN):
            layer._synchronised = NOT_SYNCHRONISED
    return module
