"""A convolution module's options as the operators take them."""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ConvOptions(NamedTuple):
    """A convolution's options as the operators take them, and what padding is left for F.pad in front of it: a mode other
    than zeros, and the odd value of "same", which stands at the end."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    pad: list[int]
    pad_mode: str

    @classmethod
    def of(cls, conv: nn.Module) -> "ConvOptions":
        if conv.padding == "same":
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        elif conv.padding == "valid":
            total = [0] * len(conv.stride)
        else:
            total = [2 * p for p in conv.padding]
        padding = [t // 2 for t in total]
        ends = [(0, t % 2) for t in total]
        mode = "constant"
        if conv.padding_mode != "zeros":
            mode = conv.padding_mode
            ends = [(t // 2, t - t // 2) for t in total]
            padding = [0] * len(total)
        pad = [value for end in reversed(ends) for value in end]
        return cls(
            list(conv.stride),
            padding,
            list(conv.dilation),
            list(conv.output_padding),
            pad if any(pad) else [],
            mode,
        )


def refuse_lazy(where: str, name: str, module: Any) -> None:
    """A lazy module has no parameters, and what it becomes is not known, before its first call."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(
            f"{where}: expected {name} with parameters, got a lazy {type(module).__name__}: call it, or its model, once"
        )
