"""The operator as a function.

TorchScript reads the signature. It does not support `X | None`, nor a list as default.
"""

from numbers import Integral
from typing import TYPE_CHECKING, Any, Optional, TypeVar, Union

import torch
from torch import Tensor

if TYPE_CHECKING:
    # For type checkers; TorchScript reads this name: an int, or one for each spatial dimension.
    T = TypeVar("T")
    BroadcastingList1 = Union[T, list[T], tuple[T, ...]]  # noqa: UP007
else:
    from torch._jit_internal import BroadcastingList1

# Looked up once: the look-up takes as long as a small layer's statistics.
_operator = torch.ops.fusedconvbn.conv_bn
_ACCEPTED = frozenset((type(None), int, list, tuple))  # by the dispatcher


def _spatial(name: str, value: Any) -> Any:
    """Converts an integer of NumPy, which the dispatcher accepts only inside a list."""
    if isinstance(value, str):
        raise TypeError(
            f"conv_bn: expected {name} to be an int, or one for each spatial dimension, got "
            f"{value!r}. (A layer, as FusedConvBN2d, takes padding by name.)"
        )
    return int(value) if isinstance(value, Integral) else value


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    bn_weight: Optional[Tensor] = None,  # noqa: UP045
    bn_bias: Optional[Tensor] = None,  # noqa: UP045
    running_mean: Optional[Tensor] = None,  # noqa: UP045
    running_var: Optional[Tensor] = None,  # noqa: UP045
    training: bool = True,
    momentum: Optional[float] = 0.1,  # noqa: UP045
    eps: float = 1e-5,
    stride: Optional[BroadcastingList1[int]] = None,  # noqa: UP045
    padding: Optional[BroadcastingList1[int]] = None,  # noqa: UP045
    dilation: Optional[BroadcastingList1[int]] = None,  # noqa: UP045
    transposed: bool = False,
    output_padding: Optional[BroadcastingList1[int]] = None,  # noqa: UP045
    groups: int = 1,
    activation: str = "none",
    arithmetic: str = "batchnorm",
    residual: Optional[Tensor] = None,  # noqa: UP045
    num_batches_tracked: Optional[Tensor] = None,  # noqa: UP045
    process_group: str = "",
) -> Tensor:
    r"""Convolution, batch normalisation and activation that save one feature map for backward.

    With :math:`Y = \mathrm{conv}(X, W) + \mathrm{bias}`, and for each channel the mean :math:`\mu`,
    the biased variance :math:`v` and the number of values :math:`R` of :math:`Y`,

    .. math::
        \mathrm{out} = \mathrm{act}\left(\gamma\,\frac{Y - \mu}{\sqrt{v + \mathrm{eps}}} + \beta
            \;[+\,\mathrm{residual}]\right),

    which is ``act(F.batch_norm(F.conv*d(input, weight, bias, …), …) + residual)``. Saved for
    backward are ``input``, the parameters and a few vectors. Backward recomputes :math:`Y` by a
    second convolution, and from it the activation's slope. With a residual, ReLU's slope is read
    from the result, as in PyTorch; for any other activation the residual is saved, too. In training
    the running statistics become :math:`(1 - m)\,\mathrm{running} + m\,\mathrm{batch}` once, with
    the unbiased variance :math:`v R / (R - 1)`. A bias in front of batch statistics only shifts the
    running mean; its gradient is zero.

    With ``training=False`` the running statistics are folded into the weight, and one convolution
    runs. Autograd saves its input, and the result of a ReLU; for any other activation backward
    recomputes the slope by a second convolution.

    Args:
        input: :math:`(N, C_\mathrm{in}, *)` with 1 to 3 spatial dimensions; float64, float32,
            bfloat16 or float16.
        weight: :math:`(C_\mathrm{out}, C_\mathrm{in} / \mathrm{groups}, *)`, or, transposed,
            :math:`(C_\mathrm{in}, C_\mathrm{out} / \mathrm{groups}, *)`; of the dtype of ``input``.
        bias: :math:`(C_\mathrm{out})`, of the convolution.
        bn_weight: :math:`\gamma`, :math:`(C_\mathrm{out})`; 1 when absent.
        bn_bias: :math:`\beta`, :math:`(C_\mathrm{out})`; 0 when absent.
        running_mean: :math:`(C_\mathrm{out})`, updated in place in training, read otherwise.
        running_var: likewise. The last four may be float32 when ``input`` is bfloat16 or float16.
        training: normalise by the statistics of this batch, else by the running ones.
        momentum: :math:`m` above; None for the average over all batches,
            :math:`m = 1 / \mathrm{num\_batches\_tracked}`.
        eps: added to the variance; above 0 in training, otherwise at least 0, as in
            ``torch.nn.functional.batch_norm``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``; an int, or one for
            each spatial dimension. None stands for 1, 0 and 1. Only the layers take padding by name
            (``"same"``).
        transposed: run ``conv_transpose*d`` instead, which also takes ``output_padding`` (None: 0).
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``,
            ``"hardswish"``, ``"gelu"``, ``"gelu_tanh"``, ``"mish"``, ``"sigmoid"`` or ``"tanh"``. A
            slope or an α stands in parentheses: ``"leaky_relu(0.2)"`` (default 0.01),
            ``"elu(0.5)"`` (default 1).
        arithmetic: ``"batchnorm"``, or ``"tutorial"``, which divides by
            :math:`\sqrt{v R / (R - 1)} + \mathrm{eps}`.
        residual: of the shape of the result (it is not broadcast) and the dtype of ``input``.
        num_batches_tracked: an int64 scalar; a training call adds 1 to it.
        process_group: the name of a group of ``torch.distributed`` (``group.group_name``): batch
            statistics are then taken over the samples of all its processes, by one all-reduce in
            forward and one in backward. All processes must call; a process may have no samples. Not
            read when ``training`` is False.

    Returns:
        A tensor of the shape, dtype and memory format of the convolution's result. With the same
        inputs and the same number of threads the result is the same to the bit.

    Raises:
        ValueError, TypeError: an argument breaks a rule above; the message names the argument and
            what was found. Nothing was computed or updated. As in ``nn.BatchNorm``, training needs
            more than one value per channel.

    Under autocast ``input``, ``weight``, ``bias`` and ``residual`` are cast as for a convolution.
    Second derivatives, forward-mode AD and ``torch.func`` give the right numbers, but compute and
    save what the unfused layers would; with a ``process_group`` they are refused.

    Source:
        S. Ioffe, C. Szegedy, *Batch Normalization*, arXiv:1502.03167. The idea of recomputing
        :math:`Y` in backward is from the PyTorch tutorial *Fusing Convolution and Batch Norm using
        Custom Function*.

    Example:
        >>> x, w = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3, requires_grad=True)
        >>> conv_bn(x, w, padding=1, activation="relu").shape
        torch.Size([8, 16, 32, 32])
    """
    # TorchScript skips a block only if its condition is nothing but this call.
    if not torch.jit.is_scripting():  # noqa: SIM102
        if not (
            type(stride) in _ACCEPTED
            and type(padding) in _ACCEPTED
            and type(dilation) in _ACCEPTED
            and type(output_padding) in _ACCEPTED
        ):
            stride, padding = _spatial("stride", stride), _spatial("padding", padding)
            dilation = _spatial("dilation", dilation)
            output_padding = _spatial("output_padding", output_padding)
    result: Tensor = _operator(
        input,
        weight,
        bias,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        training,
        momentum,
        eps,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        activation,
        arithmetic,
        process_group,
    )
    return result
