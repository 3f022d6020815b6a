"""What test_fuzz.py and test_fuzz_errors.py draw, and how a valid call is compared.

FUZZ_EXAMPLES is the number of examples of all tests together. Without it there are 300, the same
ones every time; with it they are drawn anew.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, lay
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import fusedconvbn
from fusedconvbn import chain, reference
from fusedconvbn.activations import ACTIVATIONS, activation_module

ops = torch.ops.fusedconvbn


def remember(example: object) -> None:
    """Writes an example down before it is run: what ends the process is not reported by it."""
    if path := os.environ.get("FUZZ_LAST"):
        Path(path).write_text(f"{example!r}\n")


def described(value: object) -> object:
    """A tensor by its looks."""
    if isinstance(value, list):
        return [described(v) for v in value]
    if isinstance(value, Tensor):
        with contextlib.suppress(Exception):  # one that is nested or sparse has no strides
            return value.dtype, value.device.type, tuple(value.shape), value.stride()
        return type(value).__name__
    return value


def examples(share: float) -> settings:
    """`share` of all the examples."""
    given = os.environ.get("FUZZ_EXAMPLES")
    return settings(
        max_examples=max(1, round(int(given or 300) * share)),
        derandomize=given is None,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# ------------------------------------------------------------------------------------ what is drawn

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
ARITHMETICS = ("batchnorm", "tutorial", "none", "running")
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "elu": (0,), "hardswish": (-3, 3)}


@dataclass(frozen=True)
class Geometry:
    """A convolution that fits its input."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def options(self) -> dict:
        names = "stride padding dilation transposed output_padding groups"
        return {
            name: list(v) if type(v := getattr(self, name)) is tuple else v
            for name in names.split()
        }

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]

    @property
    def out_shape(self) -> tuple[int, ...]:
        sizes = []
        for d, size in enumerate(self.input[2:]):
            reach = (self.weight[d + 2] - 1) * self.dilation[d] + 1
            if self.transposed:
                size = (size - 1) * self.stride[d] + reach + self.output_padding[d]
                sizes.append(size - 2 * self.padding[d])
            else:
                sizes.append((size + 2 * self.padding[d] - reach) // self.stride[d] + 1)
        return (self.input[0], self.out_channels, *sizes)


BATCHES, DIMS = st.integers(0, 4), st.integers(1, 3)


@st.composite
def geometries(draw, batch=BATCHES, dims=DIMS, channels=None):
    d = draw(dims)
    transposed = draw(st.booleans())

    def lists(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    stride, padding, dilation = lists(1, 3), lists(0, 2), lists(1, 3)
    kernel = lists(1, 3)
    output_padding = (0,) * d
    if transposed:
        output_padding = tuple(
            draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True)
        )
    width = st.sampled_from((1, 2, 3, 17))  # 17: more than a vector register holds
    if channels is None:
        groups = draw(st.integers(1, 3))
        channels = groups * draw(st.integers(1, 3))
    else:
        groups = draw(st.sampled_from([g for g in (1, channels) if channels % g == 0]))
    per_group = draw(width)
    weight = (channels, per_group) if transposed else (groups * per_group, channels // groups)
    sizes = []
    for k, s, p, e, o in zip(kernel, stride, padding, dilation, output_padding, strict=True):
        reach = (k - 1) * e + 1
        least = max(1, 1 - (reach + o - 2 * p - 1) // s if transposed else reach - 2 * p)
        sizes.append(least + draw(st.integers(0, 5)))
    input = (draw(batch), channels, *sizes)
    geometry = Geometry(
        input, (*weight, *kernel), stride, padding, dilation, transposed, output_padding, groups
    )
    assume(min(geometry.out_shape[1:]) > 0)
    return geometry


@st.composite
def activations(draw):
    name = draw(st.sampled_from([*ACTIVATIONS]))
    if ACTIVATIONS[name].parameter and draw(st.booleans()):
        return f"{name}({draw(st.floats(-2, 2, allow_subnormal=False))})"
    return name


@dataclass(frozen=True)
class Call:
    """A valid call of `conv_bn`, up to the values of its tensors."""

    geometry: Geometry
    given: frozenset[str]  # of the optional tensors
    requires_grad: frozenset[str]
    layouts: dict[str, str]
    activation: str
    arithmetic: str
    training: bool
    momentum: float | None
    eps: float
    dtype: torch.dtype
    own: float  # of the input's channels, beside what they have in common
    seed: int

    @property
    def options(self) -> dict:
        names = "activation arithmetic training eps"
        return self.geometry.options | {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What is differentiated, what is updated, and the gradient of the result; laid out as
        drawn, in float64."""
        generator = torch.Generator().manual_seed(self.seed)
        out_shape = self.geometry.out_shape
        vector = (self.geometry.out_channels,)
        shapes = {"input": self.geometry.input, "weight": self.geometry.weight}
        shapes |= {name: vector for name in ("bias", "bn_weight", "bn_bias")}
        shapes |= {"residual": out_shape, "dout": out_shape}
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
            if name in self.given or name in ("input", "weight", "dout")
        }
        x = drawn["input"]
        drawn["input"] = (1 - self.own) * x[:, :1] + self.own * x
        tensors = {name: lay(t, self.layouts[name]) for name, t in drawn.items()}
        running = {}
        if "running" in self.given:
            running["running_mean"] = lay(
                torch.randn(vector, generator=generator).double(), self.layouts["running"]
            )
            running["running_var"] = torch.rand(vector, generator=generator).double() + 0.5
        if "num_batches_tracked" in self.given:
            running["num_batches_tracked"] = torch.tensor(self.seed % 5)
        return tensors, running, tensors.pop("dout")


OPTIONAL = ("bias", "bn_weight", "bn_bias", "residual", "running", "num_batches_tracked")
DIFFERENTIABLE = ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")


@st.composite
def calls(draw):
    training = draw(st.booleans())
    given = draw(st.frozensets(st.sampled_from(OPTIONAL)))
    given |= set() if training else {"running"}
    momentum = draw(st.sampled_from((0.1, 0.0, 1.0, None)) | st.floats(0, 1))
    if momentum is None:
        given |= {"num_batches_tracked"}
    layout = st.sampled_from(LAYOUTS)
    writable = st.sampled_from(LAYOUTS[:-1])
    layouts = {name: draw(layout) for name in (*DIFFERENTIABLE, "dout")}
    return Call(
        geometry=draw(geometries()),
        given=frozenset(given),
        requires_grad=draw(st.frozensets(st.sampled_from(DIFFERENTIABLE))),
        layouts=layouts | {"running": draw(writable)},
        activation=draw(activations()),
        arithmetic=draw(st.sampled_from(("batchnorm", "batchnorm", "tutorial"))),
        training=training,
        momentum=momentum,
        eps=draw(st.sampled_from((1e-5, 1e-3, 0.7, 1e-12))),
        dtype=draw(st.sampled_from((torch.float64, torch.float64, torch.float32))),
        own=draw(st.sampled_from((1.0, 1.0, 0.3, 0.1))),
        seed=draw(st.integers(0, 2**16)),
    )


# --------------------------------------------------------------------------------- what is compared


def well_conditioned(y: Tensor, u: Tensor, activation: str, least: float = 1e-3) -> bool:
    """Whether rounding decides nothing: no channel of `y` is almost constant, and no value of `u`,
    to which the activation is applied, is next to one where the slope jumps."""
    if y.numel() == 0:
        return True
    if y.var([d for d in range(y.dim()) if d != 1], correction=0).min() < least:
        return False
    kinks = KINKS.get(activation.partition("(")[0], ())
    return all((u - kink).abs().min() > least * 1e-2 for kink in kinks)


def assert_close(actual, expected, rounding=1e-9):
    """Up to `rounding`, relative to the largest value: sums cancel."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        got = actual[name]
        if value is None or got is None:
            assert got is None and (value is None or not value.any()), name
            continue
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(
            got.double(),
            value.double(),
            rtol=0,
            atol=rounding * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor | None]:
    needs_grad = {name: t for name, t in leaves.items() if t.requires_grad}
    if not needs_grad:
        assert not out.requires_grad
        return {}
    grads = torch.autograd.grad(out, list(needs_grad.values()), dout, materialize_grads=True)
    return dict(zip(needs_grad, grads, strict=True))


def plain(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What `t` is in `dtype`, in float64 and contiguous."""
    return t.detach().to(dtype).double().contiguous()


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> Tensor:
    names = "stride padding dilation transposed output_padding groups"
    return torch.convolution(input, weight, bias, *(options[name] for name in names.split()))


def check_call(call: Call) -> None:
    tensors, running, dout = call.tensors()
    # The unfused layers get contiguous tensors: F.batch_norm's gradient in eval mode is wrong for
    # some others.
    rounded = {name: plain(t, call.dtype) for name, t in tensors.items()}
    count = running.get("num_batches_tracked")
    momentum = call.momentum if call.momentum is not None else 1 / (count.item() + 1)
    values = call.geometry.out_shape[0]
    for size in call.geometry.out_shape[2:]:
        values *= size

    expected_running = {
        n: plain(t, call.dtype).clone() for n, t in running.items() if n != "num_batches_tracked"
    }
    mine = {n: t if n == "num_batches_tracked" else t.to(call.dtype) for n, t in running.items()}
    mine = {
        n: lay(t, call.layouts["running"]) if n == "running_mean" else t for n, t in mine.items()
    }
    before = {n: t.clone() for n, t in mine.items()}
    fused_leaves = {
        name: lay(t.to(call.dtype), call.layouts[name]).requires_grad_(name in call.requires_grad)
        for name, t in tensors.items()
    }

    def fused():
        return fusedconvbn.conv_bn(**fused_leaves, **mine, **call.options, momentum=call.momentum)

    if call.training and values == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fused()
        assert all(torch.equal(mine[n], t) for n, t in before.items())
        return

    expected_leaves = {
        n: t.clone().requires_grad_(n in call.requires_grad) for n, t in rounded.items()
    }
    if call.training:
        least = 1e-3 if call.dtype == torch.float64 else 1e-2
        y = convolution(
            rounded["input"], rounded["weight"], rounded.get("bias"), call.geometry.options
        )
        u = reference.conv_bn(**rounded, **{**call.options, "activation": "none"})
        assume(well_conditioned(y, u, call.activation, least))
    else:
        u = reference.conv_bn(
            **rounded, **expected_running, **{**call.options, "activation": "none"}
        )
        kinks = KINKS.get(call.activation.partition("(")[0], ())
        assume(u.numel() == 0 or all((u - k).abs().min() > 1e-4 for k in kinks))
    kept = {n: t.clone() for n, t in expected_running.items()}
    expected = reference.conv_bn(
        **expected_leaves, **expected_running, **call.options, momentum=momentum
    )
    if values == 0:  # nothing is averaged
        expected_running = kept
    expected_grads = gradients(expected, expected_leaves, plain(dout, call.dtype))

    rounding = 1e-9 if call.dtype == torch.float64 else 3e-4
    out = fused()
    assert out.dtype == call.dtype
    grads = gradients(out, fused_leaves, lay(dout.to(call.dtype), call.layouts["dout"]))
    assert_close({"output": out.detach()}, {"output": expected.detach()}, rounding)
    assert_close(grads, expected_grads, rounding)
    if count is not None:
        expected_running["num_batches_tracked"] = before["num_batches_tracked"] + call.training
    assert_close(dict(sorted(mine.items())), dict(sorted(expected_running.items())), rounding)
    if not call.training:
        assert all(torch.equal(mine[n], t) for n, t in before.items())


# ------------------------------------------------------------------------------------------- layers


HOOKS = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "weight norm": nn.utils.weight_norm,
}


@dataclass(frozen=True)
class LayerCall:
    geometry: Geometry
    bias: bool
    affine: bool
    track: bool
    momentum: float | None
    padding_mode: str
    same: bool
    mode: str  # train, eval, frozen
    activation: str
    residual: bool
    eps: float
    layout: str
    hook: str  # that makes the convolution's weight
    seed: int


@st.composite
def layer_calls(draw):
    geometry = draw(geometries(batch=st.integers(0, 3)))
    padding_mode, same = "zeros", False
    if not geometry.transposed:
        padding_mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
        same = draw(st.booleans()) and set(geometry.stride) == {1}
    return LayerCall(
        geometry=geometry,
        bias=draw(st.booleans()),
        affine=draw(st.booleans()),
        track=draw(st.booleans()),
        momentum=draw(st.sampled_from((0.1, None, 0.7))),
        padding_mode=padding_mode,
        same=same,
        mode=draw(st.sampled_from(("train", "train", "eval", "frozen"))),
        activation=draw(activations()),
        residual=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-5, 0.3))),
        layout=draw(st.sampled_from(LAYOUTS)),
        hook=draw(st.sampled_from(("", "", "", *HOOKS))),
        seed=draw(st.integers(0, 2**16)),
    )


# ------------------------------------------------------------------------------------------- chains


def modules_of(call: LayerCall) -> tuple[type[nn.Module], nn.Module, nn.Module]:
    g, d = call.geometry, len(call.geometry.stride)
    transposed = "Transpose" if g.transposed else ""
    conv = getattr(nn, f"Conv{transposed}{d}d")(
        g.input[1],
        g.out_channels,
        g.weight[2:],
        stride=g.stride,
        padding="same" if call.same else g.padding,
        dilation=g.dilation,
        groups=g.groups,
        bias=call.bias,
        padding_mode=call.padding_mode,
        **({"output_padding": g.output_padding} if g.transposed else {}),
        dtype=torch.float64,
    )
    bn = getattr(nn, f"BatchNorm{d}d")(
        g.out_channels, call.eps, call.momentum, call.affine, call.track, dtype=torch.float64
    )
    with torch.no_grad():
        for t in (*bn.parameters(), *([bn.running_mean, bn.running_var] if call.track else [])):
            t.uniform_(0.5, 1.5)
    return getattr(fusedconvbn, f"FusedConv{transposed}BN{d}d"), conv, bn


@dataclass(frozen=True)
class NormOptions:
    arithmetic: str
    activation: str
    affine: tuple[bool, bool]
    residual: str  # "", "input" (the chain's, where it fits) or "own"
    eps: float


@dataclass(frozen=True)
class GateOptions:
    """A gate has no options."""


@dataclass(frozen=True)
class PreluOptions:
    one: bool  # slope for all channels


ChainOptions = Geometry | NormOptions | GateOptions | PreluOptions


@dataclass(frozen=True)
class ChainCall:
    input: tuple[int, ...]
    parts: int  # that the input is the concatenation of
    links: tuple[ChainOptions, ...]
    biases: tuple[bool, ...]
    saved: tuple[int, ...]
    requires_grad: int  # a bit for each tensor
    layout: str
    seed: int

    def build(self) -> tuple[Tensor | list[Tensor], list[chain.Link]]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return lay(torch.randn(shape, generator=generator, dtype=torch.float64), self.layout)

        input, shape, made = draw(*self.input), self.input, []
        for link, bias in zip(self.links, self.biases, strict=True):
            if isinstance(link, Geometry):
                shape = link.out_shape
                made.append(
                    chain.Conv(draw(*link.weight), draw(shape[1]) if bias else None, **link.options)
                )
                continue
            if isinstance(link, GateOptions):
                made.append(chain.Gate(draw(*shape[:2], *(1 for _ in shape[2:]))))
                continue
            if isinstance(link, PreluOptions):
                made.append(chain.Prelu(draw(1 if link.one else shape[1])))
                continue
            weight, shift = (draw(shape[1]) if given else None for given in link.affine)
            fits = link.residual == "input" and shape == self.input and self.parts == 1
            residual = input if fits else draw(*shape) if link.residual else None
            name, _, parameter = link.activation.partition("(")
            statistics = None
            if link.arithmetic == "running":
                statistics = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
                statistics[1] = statistics[1].abs() + 0.3
            made.append(
                chain.Norm(
                    weight,
                    shift,
                    residual,
                    link.eps,
                    link.arithmetic,
                    name,
                    float(parameter[:-1]) if parameter else None,
                    statistics,
                )
            )
        if self.parts > 1:
            input = [lay(t, self.layout) for t in input.tensor_split(self.parts, dim=1)]
        return input, made


@st.composite
def chain_calls(draw):
    d = draw(st.integers(1, 3))
    first = draw(geometries(batch=st.integers(2, 3), dims=st.just(d)))
    links, shape = [], first.input
    for i in range(draw(st.integers(1, 6))):
        if draw(st.booleans()) and shape[1] < 18 and max(shape[2:]) < 12:
            geometry = first
            if i > 0:
                geometry = draw(geometries(dims=st.just(d), channels=shape[1]))
                geometry = replace(geometry, input=shape)
                assume(min(geometry.out_shape[2:]) > 0)
            links.append(geometry)
            shape = geometry.out_shape
        elif draw(st.integers(0, 5)) == 0:
            links.append(
                draw(st.sampled_from((GateOptions(), PreluOptions(True), PreluOptions(False))))
            )
        else:
            arithmetic = draw(st.sampled_from(ARITHMETICS))
            affine = draw(st.tuples(st.booleans(), st.booleans()))
            links.append(
                NormOptions(
                    arithmetic,
                    draw(activations()),
                    affine if arithmetic != "none" else (False, False),
                    draw(st.sampled_from(("", "", "own", "input"))),
                    draw(st.sampled_from((1e-3, 0.5))),
                )
            )
    return ChainCall(
        first.input,
        draw(st.integers(1, min(3, first.input[1]))),
        tuple(links),
        tuple(draw(st.booleans()) for _ in links),
        tuple(sorted(draw(st.frozensets(st.integers(1, len(links)))))),
        draw(st.integers(1, 2**20 - 1)),
        draw(st.sampled_from(LAYOUTS[:-1])),
        draw(st.integers(0, 2**16)),
    )


def unfused_chain(tensors: list[Tensor], parts: int, links: list[chain.Link]) -> Tensor:
    """What the chain computes, in ordinary operations, with `tensors` in the place of its own.
    Gives the example up where rounding decides."""
    rest = iter(tensors[parts:])
    t = torch.cat(tensors[:parts], 1)
    for link in links:
        if isinstance(link, chain.Gate):
            t = t * next(rest)
            continue
        if isinstance(link, chain.Prelu):
            assume(t.abs().min() > 1e-6)  # else rounding decides on which side a value is
            t = F.prelu(t, next(rest))
            continue
        weight = next(rest) if link.weight is not None else None
        bias = next(rest) if link.bias is not None else None
        if isinstance(link, chain.Conv):
            t = convolution(t, weight, bias, vars(link))
            continue
        u = t
        if link.arithmetic == "tutorial":
            u = reference._tutorial_batch_norm(t, None, None, weight, bias, True, 0, link.eps)
        elif link.arithmetic == "batchnorm":
            u = F.batch_norm(t, None, None, weight, bias, True, 0, link.eps)
        residual = next(rest) if link.residual is not None else None
        if link.arithmetic == "running":
            u = F.batch_norm(t, *next(rest), weight, bias, False, 0, link.eps)
        if residual is not None:
            u = u + residual
        normalised = link.arithmetic in ("batchnorm", "tutorial")
        assume(well_conditioned(t if normalised else u, u, link.activation, 1e-2))
        parameter = "" if link.parameter is None else f"({link.parameter})"
        t = activation_module(link.activation + parameter)(u)
    return t
