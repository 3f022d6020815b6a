"""The operator as layers. A layer owns real `conv` and `bn` children, so that initialisation,
`state_dict`, parameter groups and conversion are those of `torch.nn`. The children are never
called; only their forward pre-hooks run, which may compute their parameters."""

import inspect
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import activation_name
from .batch_norm import batch_norm_call
from .functional import conv_bn
from .hooks import (
    PARAMETER_HOOKS,
    compute_parameters,
    refuse_hooks_in_script,
    refuse_other_hooks,
)
from .options import ConvOptions, refuse_lazy
from .synchronised import NOT_SYNCHRONISED, Synchronised, plain_batch_norm

if TYPE_CHECKING:
    from typing_extensions import Self

Extents = int | tuple[int, ...]  # one for all spatial dimensions, or one for each
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Device = torch.device | str | int | None


class _ConvBN(nn.Module):
    """The base of the six layers, which differ in `transposed` and in the classes of their
    children."""

    conv_class: ClassVar[type[nn.Module]]
    bn_class: ClassVar[type[nn.Module]]
    if TYPE_CHECKING:  # TorchScript, which reads annotations too, takes children as they are
        conv: Any
        bn: Any

    # Read by TorchScript.
    activation: str
    process_group: str
    transposed: bool
    _stride: list[int]
    _padding: list[int]
    _dilation: list[int]
    _output_padding: list[int]
    _pad: list[int]
    _pad_mode: str

    def __init__(self, conv: nn.Module, bn: nn.Module, activation: str | nn.Module | None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.activation = activation_name(activation)
        self.process_group = ""  # set when the layer is scripted

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._accepted(name, value))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, self._accepted(name, module))

    def _accepted(self, name: str, module: Any) -> Any:
        """What the layer stores for an attribute. A new child is checked first: one that the layer
        cannot run is refused, and a convolution's options are read here, once. An nn.SyncBatchNorm
        is replaced by a plain batch norm with its parameters and buffers, as TorchScript and, on
        CPU, DDP refuse a model that has one."""
        if name not in ("conv", "bn"):
            return module
        layer, expected = type(self).__name__, self.conv_class if name == "conv" else self.bn_class
        refuse_lazy(layer, name, module)
        synchronised = name == "bn" and isinstance(module, nn.SyncBatchNorm)
        if not (isinstance(module, expected) or synchronised):
            raise TypeError(
                f"{layer}: expected {name} to be an nn.{expected.__name__}, got "
                f"{type(module).__name__}"
            )
        children = {**self._modules, name: module}
        if len(children) == 2 and children["bn"].num_features != children["conv"].out_channels:
            raise ValueError(
                f"{layer}: expected bn with the out_channels of conv "
                f"({children['conv'].out_channels}) as num_features, got "
                f"{children['bn'].num_features}"
            )
        if name == "conv":
            self._read_options(module)
            return module
        if synchronised:
            self._synchronised = Synchronised(True, module.process_group)
            return plain_batch_norm(module, self.bn_class)
        if module is not self._modules.get("bn"):
            self._synchronised = NOT_SYNCHRONISED
        return module

    def _read_options(self, conv: nn.Module) -> None:
        self.transposed = bool(conv.transposed)
        options = ConvOptions.of(conv)
        self._stride = options.stride
        self._padding = options.padding
        self._dilation = options.dilation
        self._output_padding = options.output_padding
        self._pad = options.pad
        self._pad_mode = options.pad_mode

    @classmethod
    def from_modules(
        cls, conv: nn.Module, bn: nn.Module, activation: str | nn.Module | None = None
    ) -> "Self":
        """The layer for a convolution and the batch norm behind it. Both become its children, so
        that their parameters and buffers are shared, not copied. An ``nn.SyncBatchNorm`` makes the
        layer synchronised; the child is then a plain batch norm with its parameters and buffers."""
        layer = cls.__new__(cls)
        _ConvBN.__init__(layer, conv, bn, activation)
        return layer

    @torch.jit.unused
    def _has_pre_hooks(self) -> bool:
        return bool(self.conv._forward_pre_hooks or self.bn._forward_pre_hooks)

    @torch.jit.unused
    def _before_forward(self, input: Tensor) -> Tensor:
        """Runs the children's forward pre-hooks, and returns the convolution's input."""
        refuse_other_hooks(type(self).__name__, "bn", self.bn)
        compute_parameters((self.conv, self.bn))
        conv = self.conv
        for key, hook in conv._forward_pre_hooks.items():
            if isinstance(hook, PARAMETER_HOOKS):
                continue
            if key in conv._forward_pre_hooks_with_kwargs:
                changed = hook(conv, (input,), {})
                (input,) = (input,) if changed is None else changed[0]
            else:
                changed = hook(conv, (input,))
                input = input if changed is None else changed
                (input,) = input if isinstance(input, tuple) else (input,)
        return input

    def __prepare_scriptable__(self) -> "_ConvBN":
        """For TorchScript, which takes a process group by its name and has no hooks."""
        refuse_hooks_in_script(type(self).__name__, (self.conv, self.bn))
        self.process_group = self._synchronised.group_name()
        return self

    def _run(
        self,
        input: Tensor,
        residual: Optional[Tensor],  # noqa: UP045 (TorchScript reads this annotation)
        output_padding: Optional[list[int]],  # noqa: UP045
    ) -> Tensor:
        conv = self.conv  # looked up once: each access to a child is a search
        bn = self.bn
        if not torch.jit.is_scripting() and self._has_pre_hooks():
            input = self._before_forward(input)
        batch_statistics, momentum, running_mean, running_var, num_batches_tracked = (
            batch_norm_call(
                bn.training,
                bn.track_running_stats,
                bn.momentum,
                bn.running_mean,
                bn.running_var,
                bn.num_batches_tracked,
            )
        )
        process_group = self.process_group
        if not torch.jit.is_scripting():
            process_group = self._synchronised.group_name()
        if len(self._pad) > 0:
            input = F.pad(input, self._pad, self._pad_mode)
        return conv_bn(
            input,
            conv.weight,
            conv.bias,
            bn.weight,
            bn.bias,
            running_mean,
            running_var,
            training=batch_statistics,
            momentum=momentum,
            eps=bn.eps,
            stride=self._stride,
            padding=self._padding,
            dilation=self._dilation,
            transposed=self.transposed,
            output_padding=output_padding,
            groups=conv.groups,
            activation=self.activation,
            residual=residual,
            num_batches_tracked=num_batches_tracked,
            process_group=process_group if bn.training else "",
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}" + (", synchronised" if self._synchronised.on else "")


_LAYER_DOC = """{conv} → {bn} → activation that saves one feature map for backward.

    The numbers and the `state_dict` keys (``conv.*``, ``bn.*``) are those of the two modules in a
    row, the mathematics is that of :func:`fusedconvbn.conv_bn`.

    Arguments up to ``padding_mode`` are those of ``nn.{conv}``, from ``eps`` those of ``nn.{bn}``,
    with two differences: ``bias`` is off by default, as batch norm subtracts any bias, and
    ``activation`` is None, a name that :func:`fusedconvbn.conv_bn` knows, or an ``nn.Module`` of
    such a kind, as ``nn.LeakyReLU(0.2)``. `from_modules(conv, bn, activation)` builds the layer
    from two existing modules; ``bn`` may be an ``nn.SyncBatchNorm``. Whether batch or running
    statistics are used depends on ``bn.training``, as without fusion.

    ``forward({arguments})``: a residual is added before the activation.

    Shape:
        input and result as for ``nn.{conv}``, batched; a residual as the result.
    """


Layer = TypeVar("Layer", bound=type[_ConvBN])


def _documented(layer: Layer) -> Layer:
    layer.__doc__ = _LAYER_DOC.format(
        conv=layer.conv_class.__name__,
        bn=layer.bn_class.__name__,
        arguments=", ".join(list(inspect.signature(layer.forward).parameters)[1:]),
    )
    return layer


class _FusedConvBN(_ConvBN):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents = 1,
        padding: Extents | Literal["same", "valid"] = 0,
        dilation: Extents = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: PaddingMode = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = self.conv_class(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        bn = self.bn_class(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        super().__init__(conv, bn, activation)

    def forward(
        self,
        input: Tensor,
        residual: Optional[Tensor] = None,  # noqa: UP045 (TorchScript reads this annotation)
    ) -> Tensor:
        return self._run(input, residual, None)


class _FusedConvTransposeBN(_ConvBN):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents = 1,
        padding: Extents = 0,
        output_padding: Extents = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: Extents = 1,
        padding_mode: Literal["zeros"] = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | nn.Module | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        conv = self.conv_class(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        bn = self.bn_class(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        super().__init__(conv, bn, activation)

    def forward(
        self,
        input: Tensor,
        output_size: Optional[list[int]] = None,  # noqa: UP045 (TorchScript reads this annotation)
        residual: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        output_padding = self._output_padding
        if output_size is not None:
            output_padding = self.conv._output_padding(
                input,
                output_size,
                self._stride,
                self._padding,
                self.conv.kernel_size,
                len(self._stride),
                self._dilation,
            )
        return self._run(input, residual, output_padding)


@_documented
class FusedConvBN1d(_FusedConvBN):
    conv_class = nn.Conv1d
    bn_class = nn.BatchNorm1d
    if TYPE_CHECKING:
        conv: nn.Conv1d
        bn: nn.BatchNorm1d


@_documented
class FusedConvBN2d(_FusedConvBN):
    conv_class = nn.Conv2d
    bn_class = nn.BatchNorm2d
    if TYPE_CHECKING:
        conv: nn.Conv2d
        bn: nn.BatchNorm2d


@_documented
class FusedConvBN3d(_FusedConvBN):
    conv_class = nn.Conv3d
    bn_class = nn.BatchNorm3d
    if TYPE_CHECKING:
        conv: nn.Conv3d
        bn: nn.BatchNorm3d


@_documented
class FusedConvTransposeBN1d(_FusedConvTransposeBN):
    conv_class = nn.ConvTranspose1d
    bn_class = nn.BatchNorm1d
    if TYPE_CHECKING:
        conv: nn.ConvTranspose1d
        bn: nn.BatchNorm1d


@_documented
class FusedConvTransposeBN2d(_FusedConvTransposeBN):
    conv_class = nn.ConvTranspose2d
    bn_class = nn.BatchNorm2d
    if TYPE_CHECKING:
        conv: nn.ConvTranspose2d
        bn: nn.BatchNorm2d


@_documented
class FusedConvTransposeBN3d(_FusedConvTransposeBN):
    conv_class = nn.ConvTranspose3d
    bn_class = nn.BatchNorm3d
    if TYPE_CHECKING:
        conv: nn.ConvTranspose3d
        bn: nn.BatchNorm3d


class FusedConvBN(nn.Module):
    r"""The layer of the PyTorch tutorial *Fusing Convolution and Batch Norm using Custom Function*.

    Convolution with stride 1 and neither padding nor bias; then, for each channel with mean
    :math:`\mu` and unbiased variance :math:`s^2` of the batch (in eval mode too: there are no
    running statistics),

    .. math:: \mathrm{out} = (Y - \mu) / (s + \mathrm{eps}).

    ``nn.BatchNorm2d`` normalises differently; :class:`FusedConvBN2d` is the layer for it.

    Args:
        in_channels, out_channels, kernel_size: as in ``nn.Conv2d``, with a square kernel.
        exp_avg_factor: has no effect, as in the tutorial, since there are no running statistics.
        eps: added to the standard deviation.

    Shape:
        :math:`(N, C_\mathrm{in}, H, W)` to :math:`(N, C_\mathrm{out}, H - k + 1, W - k + 1)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        exp_avg_factor: float = 0.1,
        eps: float = 1e-3,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.exp_avg_factor = exp_avg_factor
        self.eps = eps
        self.conv_weight = nn.Parameter(
            torch.empty(
                out_channels, in_channels, kernel_size, kernel_size, device=device, dtype=dtype
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of ``nn.Conv2d``."""
        nn.init.kaiming_uniform_(self.conv_weight, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return conv_bn(input, self.conv_weight, eps=self.eps, arithmetic="tutorial")

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.conv_weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={kernel_size}, eps={self.eps}"
