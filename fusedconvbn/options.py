"""A convolution module's options as the operators take them; a lazy module, which has none yet, is
refused."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch.nn.modules.lazy import LazyModuleMixin


def same_padding(dilation: Sequence[int], kernel_size: Sequence[int]) -> list[tuple[int, int]]:
    """The values that padding "same" adds before and after each dimension; of an odd number the one
    more is added after."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


class ConvOptions(NamedTuple):
    """A convolution's options as the operators take them. `pad` and `pad_mode` are the arguments of
    an F.pad in front of the convolution, which adds what the operators cannot: padding that is not
    zeros, and the one more value after a dimension that padding "same" may have."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    pad: list[int]
    pad_mode: str

    @classmethod
    def of(cls, conv: Any) -> "ConvOptions":
        """Of a convolution module."""
        if conv.padding == "same":
            ends = same_padding(conv.dilation, conv.kernel_size)
        elif conv.padding == "valid":
            ends = [(0, 0)] * len(conv.stride)
        else:
            ends = [(p, p) for p in conv.padding]
        if conv.padding_mode == "zeros":
            mode, padding = "constant", [before for before, _ in ends]
        else:
            mode, padding = conv.padding_mode, [0] * len(ends)
        pad = pad_after(ends, padding)
        return cls(
            list(conv.stride),
            padding,
            list(conv.dilation),
            list(conv.output_padding),
            pad,
            mode,
        )


def pad_after(ends: Sequence[tuple[int, int]], padding: Sequence[int]) -> list[int]:
    """The argument of F.pad that adds what `ends` has more than the convolution's own `padding`; []
    where that is nothing."""
    left = [(before - p, after - p) for (before, after), p in zip(ends, padding, strict=True)]
    pad = [value for end in reversed(left) for value in end]  # F.pad begins with the last dimension
    return pad if any(pad) else []


def refuse_lazy(where: str, name: str, module: Any) -> None:
    """Refuses a lazy module, whose parameters and class are not known before its first call."""
    if isinstance(module, LazyModuleMixin) and cast(Any, module).has_uninitialized_params():
        raise TypeError(
            f"{where}: expected {name} with parameters, got a lazy {type(module).__name__}: "
            "call it, or its model, once"
        )
