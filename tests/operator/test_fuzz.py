"""Random valid calls, layers and chains against the unfused layers in float64."""

import contextlib
import copy
import gc
import os
import signal
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, lay
from fuzzing import (
    FORMATS,
    HOOKS,
    Geometry,
    assert_close,
    calls,
    chain_calls,
    check_call,
    convolution,
    examples,
    layer_calls,
    modules_of,
    plain,
    remember,
    unfused_chain,
    well_conditioned,
)
from hypothesis import assume, event, given, reject
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedconvbn
from fusedconvbn import chain, reference
from fusedconvbn.activations import activation_module

pytestmark = pytest.mark.filterwarnings("ignore")
ops = torch.ops.fusedconvbn


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
