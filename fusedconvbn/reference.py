"""Readable reference in Python: what every fused operator is checked against.

Three autograd functions lead from two layers to one, with the arithmetic of PyTorch's tutorial
*Fusing Convolution and Batch Norm using Custom Function*: :class:`Conv2D`, :class:`BatchNorm`, and
:class:`FusedConvBN2DFunction`, which joins the two and saves one feature map for backward. They are
for a 2-d convolution with stride 1 and no padding. :func:`conv_bn` is the unfused pair in ordinary
operations, for every option of the operator of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from .activations import activation_module

__all__ = [
    "BatchNorm",
    "Conv2D",
    "FusedConvBN2DFunction",
    "batch_norm_backward",
    "conv_bn",
    "convolution_backward",
]


def convolution_backward(
    dout: Tensor, input: Tensor, weight: Tensor, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``F.conv2d(input, weight)``.

    With ``Y[n,o,p] = Σ_{c,k} input[n,c,p+k]·weight[o,c,k]``, ``p`` a position in the output and
    ``k`` one in the kernel::

        grad_input[n,c,q]  = Σ_{o,k} dout[n,o,q−k]·weight[o,c,k]
        grad_weight[o,c,k] = Σ_{n,p} dout[n,o,p]·input[n,c,p+k]

    Args:
        dout: Gradient of the output, ``[N, Cout, H−kH+1, W−kW+1]``.
        input: ``[N, Cin, H, W]``.
        weight: ``[Cout, Cin, kH, kW]``.
        needs: Whether the gradients of input and of weight are needed; otherwise they are None.

    Returns:
        ``(grad_input, grad_weight)``.
    """
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        dout,
        input,
        weight,
        bias_sizes=None,
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[*needs, False],
    )
    return grad_input, grad_weight


class Conv2D(Function):
    """``F.conv2d(input, weight)``; saves its input and its weight for backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return F.conv2d(input, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        return convolution_backward(dout, input, weight, ctx.needs_input_grad)


def batch_norm_backward(dout: Tensor, y: Tensor, mean: Tensor, std: Tensor, eps: float) -> Tensor:
    """Gradient of ``(y − μ)/(s + eps)`` with respect to ``y``, where μ and s depend on ``y`` too.

    Of the R values of a channel, μ is the mean and ``s = √(Σ(y − μ)²/(R − 1))``. Since
    ``∂s/∂y_i = (y_i − μ)/((R − 1)·s)``, with ``r = 1/(s + eps)``::

        S1 = Σ dout        S2 = Σ dout·(y − μ)
        dy = r·dout − (r/R)·S1 − r²/((R − 1)·s)·S2·(y − μ)

    Args:
        dout: Gradient of the output, ``[N, C, ...]``.
        y: Input of the normalisation, same shape.
        mean: μ, ``[C]``.
        std: s, ``[C]``.
        eps: Added to s.

    Returns:
        ``dy``, the shape of ``y``.
    """
    dims, size = _over_channels(y), y.numel() // y.size(1)
    r = 1 / (std + eps)
    centred = y - _per_channel(mean, y)
    sum_dout = dout.sum(dims)
    sum_dout_centred = (dout * centred).sum(dims)
    # In a constant channel S2 is zero as well as s, and the last term vanishes.
    kappa = torch.where(std > 0, r.square() / ((size - 1) * std), 0)
    dy = centred.mul_(_per_channel(-kappa * sum_dout_centred, y))
    dy += dout * _per_channel(r, y)
    return dy.sub_(_per_channel(r * sum_dout / size, y))


class BatchNorm(Function):
    """``(input − μ)/(s + eps)`` per channel, not affine; saves its input, μ and s for backward.

    μ is the mean of the channel, and s the root of its *unbiased* variance; eps is added outside
    the root. ``nn.BatchNorm2d`` differs in both respects.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, eps: float = 1e-3) -> Tensor:
        mean, std = _mean_std(input)
        ctx.save_for_backward(input, mean, std)
        ctx.eps = eps
        return _normalise_(input.clone(), mean, std, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return batch_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None


class FusedConvBN2DFunction(Function):
    """``BatchNorm(Conv2D(input, weight))`` that does not save the convolution's output ``Y``.

    ``Y`` is only needed to differentiate the normalisation. Backward recomputes it by one more
    convolution, from the input and the weight that the convolution's own backward needs anyway. The
    forward normalises ``Y`` in place, and saves input, weight and two values per channel.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor, eps: float = 1e-3) -> Tensor:
        y = F.conv2d(input, weight)
        mean, std = _mean_std(y)
        ctx.save_for_backward(input, weight, mean, std)
        ctx.eps = eps
        return _normalise_(y, mean, std, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs = ctx.needs_input_grad[:2]
        if not any(needs):
            return None, None, None
        input, weight, mean, std = ctx.saved_tensors
        # Y is an argument only, and so freed before the convolution's gradients are computed.
        dy = batch_norm_backward(dout, F.conv2d(input, weight), mean, std, ctx.eps)
        return *convolution_backward(dy, input, weight, needs), None


CONVOLUTIONS = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    activation: str = "none",
    arithmetic: str = "batchnorm",
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution, batch normalisation and activation, one after another and differentiable.

    ``Y = conv(input, weight, bias)``, ``U = bn_weight·(Y − μ)·r + bn_bias``,
    ``act(U [+ residual])``. In training μ and the variance are those of ``Y``, otherwise the
    running ones. ``arithmetic`` sets r:

    - ``"batchnorm"``: ``1/√(biased variance + eps)``, as in ``nn.BatchNorm``.
    - ``"tutorial"``: ``1/(√(unbiased variance) + eps)``.

    Training moves the running statistics by ``momentum`` towards μ and the unbiased variance.

    Args:
        input: ``[N, Cin, ...]`` with one, two or three further dimensions.
        weight: ``[Cout, Cin/groups, ...]``; if transposed ``[Cin, Cout/groups, ...]``.
        bias: The convolution's, ``[Cout]``.
        bn_weight: ``[Cout]``, 1 if None.
        bn_bias: ``[Cout]``, 0 if None.
        running_mean: ``[Cout]``.
        running_var: ``[Cout]``.
        training: Whether to normalise by the statistics of the batch.
        momentum: Weight of the batch in the running statistics.
        eps: Keeps the divisor from zero.
        stride: Of the convolution, as the next five.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel's elements.
        transposed: Whether the convolution is a transposed one.
        output_padding: Added to one side of a transposed convolution's output.
        groups: Groups of channels.
        activation: The operator's name of it.
        arithmetic: ``"batchnorm"`` or ``"tutorial"``.
        residual: Added before the activation, of the result's shape.

    Returns:
        ``[N, Cout, ...]``.
    """
    act = activation_module(activation)
    if arithmetic not in ("batchnorm", "tutorial"):
        raise ValueError(
            f"conv_bn: arithmetic must be 'batchnorm' or 'tutorial', got '{arithmetic}'"
        )
    convolution = CONVOLUTIONS[input.dim() - 2, transposed]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = output_padding
    y = convolution(input, weight, bias, **options)

    batch_norm = F.batch_norm if arithmetic == "batchnorm" else _tutorial_batch_norm
    u = batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return act(u if residual is None else u + residual)


def _tutorial_batch_norm(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` with the tutorial's arithmetic and the same arguments."""
    u = y.to(torch.promote_types(y.dtype, torch.float32))
    if training:
        if y.numel() == y.size(1):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {y.size()}"
            )
        mean, std = _mean_std(u)
        for running, batch in ((running_mean, mean), (running_var, std.square())):
            if running is not None:
                running.lerp_(batch.detach().to(running.dtype), momentum)
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must be given when training=False")
    else:
        mean, std = running_mean, running_var.sqrt()
    u = (u - _per_channel(mean, y)) / _per_channel(std + eps, y)
    if weight is not None:
        u = u * _per_channel(weight, y)
    if bias is not None:
        u = u + _per_channel(bias, y)
    return u.to(y.dtype)


def _over_channels(y: Tensor) -> list[int]:
    """The dimensions over which a per-channel reduction runs: all but dimension 1."""
    return [dim for dim in range(y.dim()) if dim != 1]


def _per_channel(vector: Tensor, y: Tensor) -> Tensor:
    """``vector`` shaped so that it broadcasts along the channels of ``y``."""
    return vector.reshape(-1, *[1] * (y.dim() - 2))


def _mean_std(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and root of the unbiased variance, per channel."""
    # Where std is zero, its gradient is zero too; the root of var has none there.
    std, mean = torch.std_mean(y, _over_channels(y), correction=1)
    return mean, std


def _normalise_(y: Tensor, mean: Tensor, std: Tensor, eps: float) -> Tensor:
    return y.sub_(_per_channel(mean, y)).div_(_per_channel(std + eps, y))
