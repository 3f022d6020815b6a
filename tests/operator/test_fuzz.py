"""Random calls: valid ones against the unfused layers in float64, bad ones that must end in an
exception.

FUZZ_EXAMPLES is the number of examples of all tests together. Without it there are 300, the same
ones every time; with it they are drawn anew.
"""

import contextlib
import copy
import gc
import os
import signal
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, lay
from hypothesis import HealthCheck, assume, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fusedconvbn
from fusedconvbn import chain, reference
from fusedconvbn.activations import ACTIVATIONS, activation_module

pytestmark = pytest.mark.filterwarnings("ignore")
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


@examples(0.3)
@given(calls())
def test_conv_bn_is_the_unfused_pair(call):
    event(f"training={call.training}")
    remember(call)
    check_call(call)


# --------------------------------------------------------------------------------------- half types


@st.composite
def half_calls(draw):
    """Channels last, odd channels, strides and padding beyond the kernel: where oneDNN's float
    kernels were found to end the process."""
    d = draw(st.integers(2, 3))

    def lists(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(d))

    channels, filters = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    kernel = draw(st.sampled_from(((1,) * d, lists(1, 2, 3))))
    stride, dilation = lists(1, 2, 3), lists(1, 1, 2, 5)
    # A dilated kernel of one value is no other one, but oneDNN's input gradient in bfloat16 is
    # wrong then, eager's too.
    dilation = tuple(1 if k == 1 else e for k, e in zip(kernel, dilation, strict=True))
    padding = draw(st.sampled_from(((0,) * d, lists(0, 1, 3, 7))))
    transposed = draw(st.sampled_from((False, False, True)))
    output_padding = (
        tuple(s - 1 for s in stride) if transposed and draw(st.booleans()) else (0,) * d
    )
    sizes = tuple(draw(st.integers(1, 12 if d == 3 else 40)) for _ in range(d))
    shape = (channels, filters) if transposed else (filters, channels)
    geometry = Geometry(
        (draw(st.integers(1, 5)), channels, *sizes),
        (*shape, *kernel),
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        1,
    )
    assume(min(geometry.out_shape[2:]) > 0 and max(geometry.out_shape[2:]) < 100)
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    return geometry, dtype, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2**16))


@examples(0.1)
@given(half_calls())
def test_half_types_on_odd_shapes(call):
    geometry, dtype, training, has_bias, seed = call
    remember(call)
    generator = torch.Generator().manual_seed(seed)
    format = FORMATS[len(geometry.input)]

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x = draw(*geometry.input).contiguous(memory_format=format)
    weight, c = draw(*geometry.weight), geometry.out_channels
    bias = draw(c) if has_bias else None
    y = convolution(x.double(), weight.double(), None, geometry.options)
    assume(not training or (y.numel() > c and well_conditioned(y, y, "none", 1e-2)))
    dout = draw(*y.shape)
    results = []
    for kind in (dtype, torch.float64):
        wide = torch.float32 if kind != torch.float64 else kind
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight)]
        running = {
            "running_mean": torch.zeros(c, dtype=wide),
            "running_var": torch.ones(c, dtype=wide),
        }
        b = bias if bias is None else bias.to(kind)
        out = fusedconvbn.conv_bn(*leaves, b, **running, training=training, **geometry.options)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(kind))])
    r = y.std((0, *range(2, y.dim())), correction=0).reciprocal().max().item() if training else 1.0
    size = (weight.numel() // c) ** 0.5 * max(r, 1.0) ** 2
    eps = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    for name, got, due in zip(("output", "input", "weight"), *results, strict=True):
        bound = eps * (10 * due.abs().max().clamp_min(1) + size * y.abs().max().item())
        assert ((got.double() - due).abs() <= bound).all(), name


# ------------------------------------------------------------------------------------ what is saved


class Stop(Exception):
    pass


def check_saved(make, draw, count):
    """`make` gives tensors and a function of them. What is saved comes back in other layouts; a
    hook raises at one of the first `count` tensors, and nothing stays behind; the function is
    checkpointed."""

    def run(pack=lambda t: t, unpack=lambda t: t, through=lambda function: function()):
        leaves, buffers, function, dout = make()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = through(function)
            if not out.requires_grad:
                return None, buffers
            needs_grad = [t for t in leaves if t.requires_grad]
            return torch.autograd.grad(out, needs_grad, dout, materialize_grads=True), buffers

    expected, buffers = run()
    if expected is None:
        return
    layout = draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]))
    relaid, _ = run(unpack=lambda t: lay(t, layout))
    through, again = run(through=lambda function: checkpoint(function, use_reentrant=False))
    for got in (relaid, through):
        for grad, due in zip(got, expected, strict=True):
            scale = max(1.0, due.abs().max().item()) if due.numel() else 1.0
            torch.testing.assert_close(grad, due, rtol=0, atol=1e-9 * scale)
    assert all(torch.equal(again[n], t) for n, t in buffers.items())

    at, when = draw(st.integers(1, count)), draw(st.sampled_from(("pack", "unpack")))
    calls = 0

    def hook(t):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop
        return t

    def attempt():
        leaves, buffers, function, dout = make()
        before = {name: t.clone() for name, t in buffers.items()}
        alive = [weakref.ref(t) for t in leaves]
        hooks = (hook, lambda t: t) if when == "pack" else (lambda t: t, hook)
        try:
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                function().backward(dout)
        except Stop:
            event(f"raised in {when}")
            if when == "pack":
                assert all(torch.equal(before[n], t) for n, t in buffers.items())
        return alive

    alive = attempt()
    if any(ref() is not None for ref in alive):  # or where the engine has it, until its next run
        torch.ones(1, requires_grad=True).sum().backward()
        gc.collect()
    assert all(ref() is None for ref in alive)


@examples(0.1)
@given(calls(), st.data())
def test_what_a_call_saves(call, data):
    remember(call)
    values = call.geometry.out_shape[0]
    for size in call.geometry.out_shape[2:]:
        values *= size
    assume(values > 1)
    tensors, running, _ = call.tensors()
    running.pop("num_batches_tracked", None)
    options = {**call.options, "activation": "none"}
    u = reference.conv_bn(
        **{n: plain(t, torch.float64) for n, t in tensors.items()}, **running, **options
    )
    y = u
    if call.training:
        weights = plain(tensors["input"], torch.float64), plain(tensors["weight"], torch.float64)
        y = convolution(*weights, None, call.geometry.options)
    assume(well_conditioned(y, u, call.activation))

    def make():
        tensors, running, dout = call.tensors()
        leaves = {
            name: t.clone(memory_format=torch.preserve_format).requires_grad_(
                name in call.requires_grad
            )
            for name, t in tensors.items()
        }
        running = {
            name: t.clone(memory_format=torch.preserve_format) for name, t in running.items()
        }

        def function():
            return fusedconvbn.conv_bn(**leaves, **running, **call.options, momentum=call.momentum)

        return list(leaves.values()), running, function, dout.clone()

    check_saved(make, data.draw, 6)


@examples(0.02)
@given(calls())
def test_forks_beside_a_thread(call):
    """A child of a process in which another thread runs large maps runs the call too."""
    remember(call)
    tensors, running, _ = call.tensors()
    x, w = torch.randn(1, 1, 512, 513), torch.randn(1, 1, 1, 1)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            fusedconvbn.conv_bn(x, w)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            torch.set_num_threads(1)
            fusedconvbn.conv_bn(x, w)
            with contextlib.suppress(ValueError):
                fusedconvbn.conv_bn(**tensors, **running, **call.options, momentum=call.momentum)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        stop.set()
        thread.join()
    assert status == 0


# ------------------------------------------------------------------------------------------- layers


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


HOOKS = {
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    "weight norm": nn.utils.weight_norm,
}


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


def train_or_freeze(conv: nn.Module, bn: nn.Module, mode: str) -> None:
    conv.train(mode != "eval")
    bn.train(mode == "train")


@examples(0.2)
@given(layer_calls())
def test_layers_are_the_unfused_layers(call):
    remember(call)
    torch.manual_seed(call.seed)
    layer_class, conv, bn = modules_of(call)
    layer = layer_class.from_modules(copy.deepcopy(conv), copy.deepcopy(bn), call.activation)
    if call.hook:
        for module in (conv, layer.conv):
            torch.manual_seed(call.seed)
            HOOKS[call.hook](module)
    act = activation_module(call.activation)
    train_or_freeze(conv, bn, call.mode)
    train_or_freeze(layer.conv, layer.bn, call.mode)
    for _ in range(2):
        x = lay(torch.randn(call.geometry.input, dtype=torch.float64), call.layout)
        try:
            y = conv(x.contiguous())
        except RuntimeError:  # padding that does not fit the input in this mode
            assume(False)
        r = torch.randn(y.shape, dtype=torch.float64) if call.residual else None
        batch_statistics = bn.training or not call.track
        if batch_statistics and y.numel() == y.size(1):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                layer(x, residual=r)
            # nn.BatchNorm has counted its batch by then
            assert_close(dict(layer.bn.named_buffers()), dict(bn.named_buffers()))
            return
        before = copy.deepcopy(dict(bn.named_buffers()))
        x_leaf = x.contiguous().clone().requires_grad_()
        u = bn(conv(x_leaf)) if r is None else bn(conv(x_leaf)) + r
        assume(well_conditioned(y if batch_statistics else u, u, call.activation))
        expected = act(u)
        my_leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(my_leaf, residual=r)
        dout = torch.randn(y.shape, dtype=torch.float64)
        expected_grads = torch.autograd.grad(
            expected, [x_leaf, *conv.parameters(), *bn.parameters()], dout
        )
        grads = torch.autograd.grad(out, [my_leaf, *layer.parameters()], dout)
        names = ["x", *(name for name, _ in layer.named_parameters())]
        assert_close({"out": out.detach()}, {"out": expected.detach()})
        assert_close(*(dict(zip(names, g, strict=True)) for g in (grads, expected_grads)))
        if y.numel() == 0 and bn.training and call.track:  # counted, but not averaged
            before["num_batches_tracked"] += 1
            bn.load_state_dict(before, strict=False)
        assert_close(dict(layer.bn.named_buffers()), dict(bn.named_buffers()))


# ------------------------------------------------------------------------------------------- chains


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


@examples(0.2)
@given(chain_calls())
def test_chains_are_their_unfused_links(call):
    remember(call)
    input, links = call.build()
    packed = chain.pack(input, links)
    given = {id(getattr(link, "statistics", None)) for link in links}  # no gradient reaches them
    needs_grad = [
        bool(call.requires_grad >> i & 1) and id(t) not in given
        for i, t in enumerate(packed.tensors)
    ]
    assume(any(needs_grad))
    leaves = [
        plain(t, torch.float64).clone().requires_grad_(w)
        for t, w in zip(packed.tensors, needs_grad, strict=True)
    ]
    mine = [t.detach().requires_grad_(w) for t, w in zip(packed.tensors, needs_grad, strict=True)]
    try:
        expected = unfused_chain(leaves, call.parts, links)
    except ValueError:  # one value per channel
        assume(False)
    assume(expected.abs().max() < 1e4)
    out, maps, statistics = ops._chain_forward(mine, *packed.options, call.saved)
    assert len(maps) == len([k for k in call.saved if k < len(links)])
    assert len(statistics) == sum(getattr(link, "arithmetic", "none") != "none" for link in links)
    generator = torch.Generator().manual_seed(call.seed)
    dout = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    assert_close({"output": out.detach()}, {"output": expected.detach()})
    assume(expected.requires_grad)
    got, again, due = (
        gradients_of(o, of, dout, retain)
        for o, of, retain in ((out, mine, True), (out, mine, False), (expected, leaves, False))
    )
    assert_close(
        got, due, 1e-6
    )  # each of up to six links may magnify what is rounded in the one behind it
    for name, grad in got.items():
        assert torch.equal(grad, again[name])


@examples(0.1)
@given(chain_calls(), st.data())
def test_what_a_chain_saves(call, data):
    remember(call)

    def make():
        packed = chain.pack(*call.build())
        tensors = [t.detach().clone(memory_format=torch.preserve_format) for t in packed.tensors]
        for i, t in enumerate(tensors):
            t.requires_grad_(bool(call.requires_grad >> i & 1))

        def function():
            return ops._chain_forward(tensors, *packed.options, call.saved)[0]

        shape = function().shape
        return tensors, {}, function, torch.ones(shape, dtype=torch.float64)

    try:
        check_saved(make, data.draw, 10)
    except ValueError:  # one value per channel
        reject()


def test_the_gradient_of_a_shift_alone_in_front_of_a_norm_link():
    x, shift = torch.randn(5, 2, 3).double(), torch.randn(2).double().requires_grad_()
    packed = chain.pack(x, [chain.Norm(None, shift, activation="relu"), chain.Norm()])
    out, *_ = ops._chain_forward(packed.tensors, *packed.options, [])
    dout = torch.randn_like(out)
    unfused = F.batch_norm(
        F.batch_norm(x, None, None, None, shift, True).relu(), None, None, training=True
    )
    (got,), (due,) = (torch.autograd.grad(o, shift, dout) for o in (out, unfused))
    torch.testing.assert_close(got, due)


def gradients_of(out, tensors, dout, retain_graph):
    needs_grad = {str(i): t for i, t in enumerate(tensors) if t.requires_grad}
    grads = torch.autograd.grad(
        out, list(needs_grad.values()), dout, retain_graph=retain_graph, materialize_grads=True
    )
    return dict(zip(needs_grad, grads, strict=True))


# ------------------------------------------------------------------------------------ bad arguments

# No int that makes an output of some gigabytes: too much, and yet what was asked for.
INTS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**64)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, -1e-300, 0.0, 1e308, 10**400)
STRINGS = (
    *("", "swish", "relu(", "relu(1)", "leaky_relu()", "leaky_relu(1e999)", "elu(nan)", "elu(0.5"),
    *("relu\0", "é" * 50, "\udc80", "none", "no such group"),
)
OTHERS = (
    None,
    True,
    "two",
    b"relu",
    object(),
    1j,
    [],
    [1] * 4,
    [-1, 2],
    [2**62] * 2,
    [None],
    {},
    int,
    nn.ReLU(),
)
TENSORS = {
    "meta": lambda t: t.to("meta"),
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64).conj(),
    "negative": lambda t: torch.complex(t, t).conj().imag,
    "float": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "fewer dimensions": lambda t: t.flatten(),
    "more dimensions": lambda t: t[None],
    "no dimension": lambda t: t.sum(),
    "empty": lambda t: t[:0] if t.dim() else t.new_empty(0),
    "longer": lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    "cut": lambda t: t.narrow(-1, 0, t.size(-1) - 1) if t.dim() and t.size(-1) else t,
    "expanded": lambda t: t.new_ones(()).expand(t.shape),
    "nan": lambda t: t * float("nan"),
    "inf": lambda t: t.abs() * float("inf"),
    "inference": torch.inference_mode()(lambda t: t.clone()),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "uninitialised": lambda t: nn.parameter.UninitializedParameter(),
    "without storage": lambda t: _without_storage(t),
}
# What may be raised; a SystemError, say, would be a bug.
ERRORS = (TypeError, ValueError, RuntimeError, OverflowError, IndexError)


def _without_storage(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def junk_for(value):
    """Something in the place of `value`: of its type more often than not."""
    if isinstance(value, Tensor):
        of_its_type = st.sampled_from(sorted(TENSORS)).map(lambda kind: (kind, None))
    elif isinstance(value, str):
        of_its_type = st.sampled_from(STRINGS).map(lambda v: ("", v))
    elif isinstance(value, float):
        of_its_type = st.sampled_from(FLOATS).map(lambda v: ("", v))
    elif isinstance(value, list):
        ints = st.sampled_from(INTS)
        of_its_type = (st.lists(ints, max_size=4) | ints).map(lambda v: ("", v))
    else:
        of_its_type = st.sampled_from(INTS).map(lambda v: ("", v))
    anything = st.sampled_from((*OTHERS, *INTS, *FLOATS, *STRINGS)).map(lambda v: ("", v))
    return of_its_type | of_its_type | anything


def replaced(value, junk):
    kind, other = junk
    try:
        return TENSORS[kind](value) if kind else other
    except RuntimeError:  # an int64 that requires grad, say, there is not
        reject()


def bits(t: Tensor) -> str:
    return repr(t.tolist())  # NaN is what it was, too


def backward_may_fail(out) -> None:
    try:
        if isinstance(out, Tensor) and out.requires_grad:
            out.sum().backward()
    except ERRORS as error:
        assert_is_no_internal_error(error)


def assert_is_no_internal_error(error: BaseException) -> None:
    assert "INTERNAL ASSERT" not in str(error), error


@examples(0.15)
@given(calls(), st.data())
def test_bad_arguments_raise_and_change_nothing(call, data):
    tensors, running, _ = call.tensors()
    for name in call.requires_grad & set(tensors):
        tensors[name] = tensors[name].clone().requires_grad_()
    arguments = tensors | running | call.options | {"momentum": call.momentum, "process_group": ""}
    for name in ("bias", "bn_weight", "bn_bias", "residual", *BUFFERS):
        arguments.setdefault(name, None)
    changed = data.draw(
        st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True)
    )
    for name in changed:
        arguments[name] = replaced(
            arguments[name], data.draw(junk_for(arguments[name]), label=name)
        )
    buffers = {n: arguments[n] for n in BUFFERS if n in running and n not in changed}
    before = {n: bits(t) for n, t in buffers.items()}
    remember({name: described(value) for name, value in arguments.items()})
    try:
        out = fusedconvbn.conv_bn(**arguments)
    except ERRORS as error:
        event("raised")
        assert_is_no_internal_error(error)
        for n, t in buffers.items():
            assert bits(t) == before[n], n
    else:
        event("accepted")
        backward_may_fail(out)


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@examples(0.05)
@given(layer_calls(), st.data())
def test_bad_layers_raise_and_change_nothing(call, data):
    torch.manual_seed(call.seed)
    layer_class, conv, bn = modules_of(call)
    layer = layer_class.from_modules(conv, bn, call.activation)
    x = torch.randn(call.geometry.input, dtype=torch.float64)
    changed = data.draw(st.sampled_from(("forward", "buffers", "options", "constructor")))
    arguments = {"input": x, "residual": None}
    if changed == "constructor":
        names = "in_channels out_channels kernel_size stride padding dilation groups eps momentum "
        names += "activation"
        options = {"in_channels": 4, "out_channels": 6, "kernel_size": 2}
        for name in data.draw(st.lists(st.sampled_from(names.split()), min_size=1, max_size=2)):
            options[name] = replaced(1, data.draw(junk_for(1), label=name))
        small = all(not isinstance(v, int) or abs(v) < 100 for v in options.values())
        assume(small)  # a weight of gigabytes is what was asked for
        try:
            layer, arguments["input"] = layer_class(**options), x.float()
        except (*ERRORS, AssertionError, AttributeError, ZeroDivisionError):  # nn.Conv*'s own
            return
    elif changed == "forward":
        arguments["input"] = replaced(x, data.draw(junk_for(x), label="input"))
        arguments["residual"] = replaced(x, data.draw(junk_for(x), label="residual"))
    else:
        where = {"buffers": layer.bn, "options": layer.conv}[changed]
        names = [*where._parameters, *where._buffers, "eps", "momentum", "groups"]
        name = data.draw(st.sampled_from([n for n in names if getattr(where, n, None) is not None]))
        junk = replaced(getattr(where, name), data.draw(junk_for(getattr(where, name)), label=name))
        try:
            delattr(where, name)
            setattr(where, name, junk)
        except (*ERRORS, KeyError):
            return
    buffers = {n: b for n, b in layer.bn._buffers.items() if isinstance(b, Tensor)}
    kept = {
        n: b for n, b in buffers.items() if b.layout == torch.strided and b.device.type == "cpu"
    }
    kept = {n: b for n, b in kept.items() if not b.is_quantized and b.untyped_storage().nbytes()}
    before = {n: bits(b) for n, b in kept.items()}
    try:
        out = layer(**arguments)
    except (*ERRORS, AttributeError) as error:
        assert_is_no_internal_error(error)
        for n, b in kept.items():
            assert bits(b) == before[n], n
    else:
        backward_may_fail(out)


def mangled(draw, values: list, junk) -> list:
    """`values` with some replaced, left out or put in."""
    values = list(values)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(values)))
        how = draw(st.sampled_from(("replace", "replace", "remove", "insert", "cut")))
        if how == "cut":
            values = values[:at]
        elif how == "insert" or at == len(values):
            values.insert(at, draw(junk))
        elif how == "remove":
            values.pop(at)
        else:
            values[at] = draw(junk)
    return values


@examples(0.1)
@given(chain_calls(), st.data())
def test_malformed_chains_raise(call, data):
    input, links = call.build()
    packed = chain.pack(input, links)
    device = data.draw(st.sampled_from(("cpu", "cpu", "meta")))
    ints, floats = st.sampled_from(INTS), st.sampled_from(FLOATS[:-1])
    kinds = st.sampled_from(sorted(TENSORS))
    arguments = {
        "tensors": [t.to(device) for t in packed.tensors],
        "links": packed.links,
        "scalars": packed.scalars,
        "process_group": "",
        "saved": list(call.saved),
    }

    def change(names):
        for name in data.draw(
            st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)
        ):
            value = arguments[name]
            if name in ("dout", "process_group"):
                arguments[name] = replaced(value, data.draw(junk_for(value), label=name))
            elif name in ("tensors", "saved_maps", "statistics"):
                tensor = value[0].cpu() if value else torch.zeros(2, 3)
                junk = kinds.map(lambda kind, t=tensor: replaced(t, (kind, None)))
                arguments[name] = mangled(data.draw, value, junk)
            else:
                arguments[name] = mangled(data.draw, value, floats if name == "scalars" else ints)

    in_backward = data.draw(st.booleans())
    if in_backward:
        out, maps, statistics = ops._chain_forward(**arguments)
        arguments |= {
            "dout": torch.ones_like(out),
            "saved_maps": maps + ([out] if len(links) in call.saved else []),
            "statistics": statistics,
            "needs_grad": [0, *range(call.parts, len(packed.tensors))],
        }
    try:
        if in_backward:
            change(sorted(arguments))
            remember({n: described(v) for n, v in arguments.items()})
            ops._chain_backward(**arguments)
        else:
            change(sorted(arguments))
            remember({n: described(v) for n, v in arguments.items()})
            out, *_ = ops._chain_forward(**arguments)
            backward_may_fail(out)
    except ERRORS as error:
        event("raised")
        assert_is_no_internal_error(error)
