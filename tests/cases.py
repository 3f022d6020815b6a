"""One table of cases that the tests draw from, and how a case is made and run without fusion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedconvbn import reference

FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "reversed", "expanded")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def lay(t: Tensor, layout: str) -> Tensor:
    """The values of `t` in another memory order; "expanded" repeats its first entry in place of
    all."""
    if t.dim() == 0:
        return t
    if layout == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t
    if layout == "offset":
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    if layout == "sliced":
        return t.new_empty(*t.shape, 2)[..., 1].copy_(t)
    if layout == "reversed":
        return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() > 0 and t.size(0) > 0 else t
    return t


@dataclass(frozen=True)
class Case:
    """Shapes are small and all different, so that no two sizes can be mixed up unseen."""

    input: Sequence[int]
    weight: Sequence[int]
    bias: bool = False
    affine: bool = True
    stride: Sequence[int] = (1,)
    padding: Sequence[int] = (0,)
    dilation: Sequence[int] = (1,)
    transposed: bool = False
    output_padding: Sequence[int] = (0,)
    groups: int = 1
    activation: str = "relu"
    residual: bool = False
    arithmetic: str = "batchnorm"
    eps: float = 1e-5

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    @property
    def out_shape(self) -> torch.Size:
        tensors = {
            "input": torch.empty(self.input, device="meta"),
            "weight": torch.empty(self.weight, device="meta"),
        }
        return reference.conv_bn(**tensors, **self.options).shape

    @property
    def options(self) -> dict:
        names = "stride padding dilation transposed output_padding groups activation arithmetic eps"
        return {name: getattr(self, name) for name in names.split()}

    def tensors(
        self,
        dtype: torch.dtype = torch.float64,
        channels_last: bool = False,
        device: str = "cpu",
        requires_grad: bool = True,
    ) -> dict[str, Tensor]:
        """input, weight and what else the case has, drawn in float64 whatever `dtype` is.
        Parameters of the norm are float32 for half types."""
        narrow = dtype in (torch.bfloat16, torch.float16)
        vector_dtype = torch.float32 if narrow else dtype
        generator = torch.Generator().manual_seed(
            hash((tuple(self.input), tuple(self.weight))) % 2**31
        )

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            t = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return t.to(device, dtype)

        format = FORMATS[len(self.input)] if channels_last else torch.contiguous_format
        tensors = {
            "input": draw(*self.input).to(memory_format=format),
            "weight": draw(*self.weight).to(memory_format=format),
        }
        if self.bias:
            tensors["bias"] = draw(self.out_channels)
        if self.affine:
            tensors["bn_weight"] = draw(self.out_channels, dtype=vector_dtype)
            tensors["bn_bias"] = draw(self.out_channels, dtype=vector_dtype)
        if self.residual:
            tensors["residual"] = draw(*self.out_shape).to(memory_format=format)
        return {name: t.requires_grad_(requires_grad) for name, t in tensors.items()}

    def running(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
        c = torch.arange(self.out_channels, dtype=dtype)  # a GPU would divide differently
        found = {"running_mean": c / 7 - 0.3, "running_var": c / 5 + 0.6}
        return {name: value.to(device) for name, value in found.items()}


CASES = {
    "1d": Case((3, 4, 11), (6, 4, 3), bias=True, stride=(2,), padding=(1,)),
    "1d dilated groups": Case((2, 6, 13), (4, 3, 3), dilation=(3,), groups=2, activation="none"),
    "2d plain": Case((3, 2, 7, 5), (4, 2, 3, 2)),
    "2d bias": Case((3, 2, 7, 5), (5, 2, 2, 3), bias=True, activation="none"),
    "2d no affine": Case((3, 2, 6, 5), (4, 2, 3, 3), affine=False),
    "2d every option": Case(
        (2, 6, 9, 8),
        (8, 3, 3, 2),
        bias=True,
        stride=(2, 1),
        padding=(1, 2),
        dilation=(1, 3),
        groups=2,
    ),
    "2d 1x1": Case((3, 5, 4, 7), (6, 5, 1, 1)),
    "2d depthwise": Case((2, 5, 8, 7), (5, 1, 3, 3), padding=(1,), groups=5),
    "2d one position": Case((7, 3, 3, 2), (5, 3, 3, 2)),
    "2d one channel": Case((3, 2, 6, 7), (1, 2, 3, 3)),
    "2d one sample": Case((1, 3, 6, 5), (4, 3, 2, 2)),
    "2d wide": Case((2, 3, 9, 11), (70, 3, 3, 3), padding=(1,)),
    "2d large eps": Case((3, 2, 7, 5), (4, 2, 3, 2), eps=0.7, activation="none"),
    "3d": Case((2, 3, 5, 4, 6), (4, 3, 2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1)),
    "3d bias dilated": Case((2, 2, 6, 5, 4), (3, 2, 2, 2, 2), bias=True, dilation=(2, 1, 1)),
    "transposed 1d": Case(
        (3, 4, 7), (4, 5, 3), transposed=True, stride=(3,), padding=(1,), output_padding=(2,)
    ),
    "transposed 2d": Case(
        (2, 6, 5, 4),
        (6, 2, 3, 2),
        bias=True,
        transposed=True,
        stride=(2, 3),
        padding=(1, 0),
        output_padding=(1, 2),
        groups=2,
    ),
    "transposed 2d dilated": Case((2, 3, 4, 5), (3, 4, 2, 3), transposed=True, dilation=(2, 1)),
    "transposed 3d": Case((2, 3, 3, 4, 2), (3, 4, 2, 2, 3), transposed=True, stride=(2, 1, 2)),
    "relu, residual": Case((3, 2, 7, 5), (4, 2, 3, 2), residual=True),
    "none, residual": Case((3, 2, 7, 5), (4, 2, 3, 2), residual=True, activation="none"),
    "relu6": Case((3, 4, 7, 5), (6, 2, 3, 2), groups=2, activation="relu6"),
    "relu6, residual": Case((3, 2, 5), (4, 2, 2), residual=True, activation="relu6"),
    "leaky_relu": Case((3, 2, 7, 5), (4, 2, 2, 3), activation="leaky_relu"),
    "leaky_relu, residual": Case(
        (3, 2, 7, 5), (4, 2, 2, 3), residual=True, activation="leaky_relu(-0.3)"
    ),
    "elu": Case((3, 2, 7, 5), (4, 2, 2, 3), activation="elu(0.7)"),
    "elu, residual": Case(
        (2, 3, 4, 5), (3, 4, 2, 3), transposed=True, residual=True, activation="elu"
    ),
    "silu": Case((3, 2, 7, 5), (4, 2, 2, 3), activation="silu"),
    "silu, residual": Case(
        (2, 3, 5, 4, 6), (4, 3, 2, 3, 2), bias=True, residual=True, activation="silu"
    ),
    "hardswish": Case((3, 5, 6, 5), (5, 1, 3, 2), groups=5, activation="hardswish"),
    "hardswish, residual": Case(
        (3, 2, 7, 5), (4, 2, 2, 3), residual=True, activation="hardswish", affine=False
    ),
    "gelu": Case((3, 2, 9), (4, 2, 3), activation="gelu"),
    "gelu_tanh, residual": Case((3, 2, 7, 5), (4, 2, 2, 3), residual=True, activation="gelu_tanh"),
    "mish": Case((3, 2, 7, 5), (4, 2, 2, 3), activation="mish"),
    "mish, residual": Case((3, 2, 7, 5), (35, 2, 2, 3), residual=True, activation="mish"),
    "sigmoid": Case((3, 2, 7, 5), (4, 2, 2, 3), activation="sigmoid"),
    "tanh, residual": Case((3, 2, 7, 5), (4, 2, 2, 3), residual=True, activation="tanh"),
    # 1×1 and wide
    "pointwise": Case((3, 2, 7, 5), (8, 2, 1, 1), bias=True, activation="none"),
    "pointwise, residual": Case((2, 3, 5, 6), (10, 3, 1, 1), residual=True),
    "pointwise 1d": Case((3, 2, 17), (6, 2, 1), activation="none", residual=True),
    "pointwise 3d tutorial": Case(
        (2, 2, 3, 4, 5), (7, 2, 1, 1, 1), activation="none", arithmetic="tutorial", eps=0.1
    ),
    "tutorial": Case((3, 2, 7, 6), (4, 2, 3, 3), affine=False, arithmetic="tutorial", eps=1e-3),
    "tutorial affine": Case((3, 2, 7, 6), (4, 2, 3, 2), bias=True, arithmetic="tutorial", eps=0.1),
}


def unfused(tensors: dict[str, Tensor], case: Case, **more) -> Tensor:
    """The layers in a row: F.conv*, F.batch_norm, F.relu."""
    return reference.conv_bn(**tensors, **{**case.options, **more})
