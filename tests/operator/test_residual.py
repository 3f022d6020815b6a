"""act(bn(conv(x)) + residual): whatever the residual is, and what may be written to afterwards."""

import pytest
import torch
from cases import Case, unfused
from torch import nn

from fusedconvbn import FusedConvBN2d, FusedConvTransposeBN2d, conv_bn
from fusedconvbn.activations import ACTIVATIONS, activation_module

EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
MODES = pytest.mark.parametrize("training", (True, False), ids=("batch", "frozen"))
OUT = (3, 4, 5, 4)


def make(activation, **more):
    return Case((3, 2, 7, 5), (4, 2, 3, 2), residual=True, activation=activation, **more)


def fused(tensors, case, **more):
    return conv_bn(**tensors, **{**case.options, **more})


def gradients(function, tensors, case, **more):
    """The result, and the gradients of what requires one."""
    out = function(tensors, case, **more)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    needs_grad = [t for t in tensors.values() if t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, needs_grad, dout)]


def assert_same(tensors, case, **more):
    results = gradients(fused, tensors, case, **more)
    expected = gradients(unfused, tensors, case, **more)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def mode(case, training):
    return {"training": training, **({} if training else case.running())}


@MODES
@EVERY_ACTIVATION
def test_gradcheck(activation, training):
    """Every gradient alone, as each asks for other things to be computed, and all together."""
    case = make(activation)
    tensors, more = case.tensors(), mode(case, training)
    names = list(tensors)
    function = lambda *values: fused(dict(zip(names, values, strict=True)), case, **more)  # noqa: E731
    assert torch.autograd.gradcheck(function, list(tensors.values()), fast_mode=True)
    everything = dict(zip(["out", *tensors], gradients(fused, tensors, case, **more), strict=True))
    for name in tensors:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        _, grad = gradients(fused, alone, case, **more)
        torch.testing.assert_close(grad, everything[name], rtol=1e-12, atol=1e-12)


@MODES
@EVERY_ACTIVATION
def test_a_residual_without_gradient(activation, training):
    case = make(activation)
    tensors = case.tensors()
    tensors["residual"] = tensors["residual"].detach()
    assert_same(tensors, case, **mode(case, training))


LAYOUTS = {
    "other memory format": lambda t: t.to(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every second value": lambda t: torch.stack((t, t), -1)[..., 0],
    "at an offset": lambda t: torch.cat((t, t))[3:],
    "lazily negative": lambda t: torch._neg_view(t),
    "expanded over positions": lambda t: t[:, :, :1, :1].expand(OUT),
    "expanded over everything": lambda t: t[:1, :1, :1, :1].expand(OUT),
    "one map for all samples": lambda t: t[:1].expand(OUT),
}


@MODES
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_in_any_layout(layout, activation, channels_last, training):
    """An expanded tensor has the shape asked for; its base gets the sum."""
    case = make(activation)
    tensors = case.tensors(channels_last=channels_last)
    change, leaf = LAYOUTS[layout], tensors["residual"].detach().contiguous().requires_grad_()
    results = []
    for function in (fused, unfused):
        tensors["residual"] = change(leaf)
        out = function(tensors, case, **mode(case, training))
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        needs_grad = [leaf, *(t for n, t in tensors.items() if n != "residual")]
        results.append([out.detach(), *torch.autograd.grad(out, needs_grad, dout)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@MODES
@EVERY_ACTIVATION
def test_the_input_as_residual(activation, training):
    case = Case((3, 4, 5, 6), (4, 4, 3, 3), padding=(1,), activation=activation)
    tensors, more = case.tensors(), mode(case, training)
    results = []
    for function in (fused, unfused):
        x = tensors["input"] * 1  # no leaf, as between two blocks
        out = function({**tensors, "input": x, "residual": x}, case, **more)
        results.append(torch.autograd.grad(out.sin().sum(), list(tensors.values())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_one_residual_for_two_layers():
    """Its gradient is the sum of both; that of one layer is also what flows on below it."""
    case = make("relu")
    tensors = case.tensors()
    results = []
    for function in (fused, unfused):
        shared = tensors["residual"].sin()
        first = function({**tensors, "residual": shared}, case)
        second = function({**tensors, "residual": shared}, case, activation="none")
        loss = (first * second + shared).square().sum()
        results.append(torch.autograd.grad(loss, list(tensors.values())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    """A basic block of a ResNet in training order."""

    def __init__(self, channels, activation):
        super().__init__()
        self.first = FusedConvBN2d(channels, channels, 3, padding=1, activation=activation)
        self.second = FusedConvBN2d(channels, channels, 3, padding=1, activation=activation)

    def forward(self, x):
        return self.second(self.first(x), residual=x)


class UnfusedBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(m.conv, m.bn) for m in (block.first, block.second))
        self.act = activation_module(block.first.activation)

    def forward(self, x):
        return self.act(self.pairs[1](self.act(self.pairs[0](x))) + x)


@pytest.mark.parametrize("activation", ("relu", "silu", "hardswish"))
def test_residual_blocks_in_a_row(activation):
    blocks = nn.Sequential(*(Block(3, activation) for _ in range(3))).double()
    plain = nn.Sequential(*map(UnfusedBlock, blocks))
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (blocks, plain):
        out = model(x)
        results.append(torch.autograd.grad(out.square().mean(), [x, *blocks.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_transposed_layer():
    layer = FusedConvTransposeBN2d(3, 4, 2, stride=2, activation="mish").double()
    x, residual = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 4, 8, 10).double()
    expected = nn.functional.mish(nn.Sequential(layer.conv, layer.bn)(x) + residual)
    torch.testing.assert_close(layer(x, residual=residual), expected)
    torch.testing.assert_close(layer(x, [8, 10], residual), expected)


X, W = torch.randn(3, 2, 7, 5), torch.randn(4, 2, 3, 2)
REFUSED = {
    "one value per channel": (
        torch.ones(1, 4, 1, 1),
        ValueError,
        r"it is not broadcast\), got \[1, 4, 1, 1\]",
    ),
    "one sample": (
        torch.ones(1, 4, 5, 4),
        ValueError,
        r"residual of shape \[3, 4, 5, 4\].*\[1, 4, 5, 4\]",
    ),
    "no batch": (torch.ones(4, 5, 4), ValueError, r"residual of shape \[3, 4, 5, 4\].*\[4, 5, 4\]"),
    "the input's shape": (X, ValueError, r"residual of shape \[3, 4, 5, 4\].*\[3, 2, 7, 5\]"),
    "float64": (
        torch.ones(OUT).double(),
        TypeError,
        r"residual of the dtype of input \(Float\), got Double",
    ),
    "bfloat16": (torch.ones(OUT).bfloat16(), TypeError, r"residual of the dtype of input"),
    "integers": (torch.ones(OUT).long(), TypeError, "expected residual of dtype float64"),
    "complex": (torch.ones(OUT).cfloat(), TypeError, "expected residual of dtype float64"),
    "sparse": (torch.ones(OUT).to_sparse(), TypeError, "expected residual to be dense"),
    "another device": (
        torch.ones(OUT, device="meta"),
        ValueError,
        r"residual on the device of input \(cpu\), got meta",
    ),
    "a number": (1.0, (TypeError, RuntimeError), "residual"),
}


@MODES
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, training):
    """Before anything is updated."""
    residual, error, message = REFUSED[name]
    layer = FusedConvBN2d(2, 4, (3, 2), activation="relu").train(training)
    with pytest.raises(error, match=message):
        layer(X, residual=residual)
    assert layer.bn.num_batches_tracked == 0
    assert torch.equal(layer.bn.running_mean, torch.zeros(4))


# ----------------------------------------------------------------------------------------- in-place
# operations

WRITES = {
    "mul_": lambda t: t.mul_(2),
    "relu_": lambda t: t.relu_(),
    "zero_": lambda t: t.zero_(),
    "copy_ into a part": lambda t: t[:, 1].copy_(t[:, 0].detach()),
}


def step(function, tensors, case, write, target, **more):
    """The gradients with a write between forward and backward, or the error."""
    own = {n: t * 1 for n, t in tensors.items()}
    out = function(own, case, **more)
    write({"output": out, **own}[target])
    try:
        return torch.autograd.grad(out.sin().sum(), list(tensors.values()), allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return error


@MODES
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("write", WRITES)
@EVERY_ACTIVATION
def test_writing_to_the_result_is_safe_where_eager_allows_it(activation, write, residual, training):
    case = Case((3, 2, 7, 5), (4, 2, 3, 2), residual=residual, activation=activation)
    tensors, options = case.tensors(), mode(case, training)
    results = step(fused, tensors, case, WRITES[write], "output", **options)
    if isinstance(results, RuntimeError):
        eager = step(unfused, tensors, case, WRITES[write], "output", **options)
        assert isinstance(eager, RuntimeError)
    else:
        spared = lambda *args, **more: unfused(*args, **more).clone()  # noqa: E731
        expected = step(spared, tensors, case, WRITES[write], "output", **options)
        torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@MODES
@EVERY_ACTIVATION
def test_writing_to_the_residual_is_right_or_an_error(activation, training):
    """An activation whose slope needs the residual says so; none and ReLU do not need it."""
    case = make(activation)
    tensors, options = case.tensors(), mode(case, training)
    results = step(fused, tensors, case, WRITES["mul_"], "residual", **options)
    expected = step(unfused, tensors, case, WRITES["mul_"], "residual", **options)
    if isinstance(results, RuntimeError):
        assert activation not in ("none", "relu")
    else:
        torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@MODES
@pytest.mark.parametrize("activation", ("relu", "silu"))
@pytest.mark.parametrize("target", ("input", "weight"))
def test_writing_to_what_is_recomputed_from_is_an_error(target, activation, training):
    case = make(activation)
    tensors, options = case.tensors(), mode(case, training)
    for function in (fused, unfused):
        result = step(function, tensors, case, WRITES["mul_"], target, **options)
        if target == "input" or training:
            assert isinstance(result, RuntimeError)
