"""torch.library.opcheck on every operator."""

import pytest
import torch
from cases import CASES

from fusedconvbn.chain import Conv, Gate, Norm, Prelu, pack

ops = torch.ops.fusedconvbn
pytestmark = pytest.mark.independent


@pytest.mark.thin(2)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("name", CASES)
def test_conv_bn(name, training, dtype, channels_last):
    case = CASES[name]
    tensors = case.tensors(dtype, channels_last)
    keywords = {**tensors, **case.running(dtype), **case.options, "training": training}
    positional = [keywords.pop("input"), keywords.pop("weight")]
    torch.library.opcheck(ops.conv_bn.default, positional, _lists(keywords), rtol=1e-4, atol=1e-4)


def _lists(keywords):
    return {name: list(v) if isinstance(v, tuple) else v for name, v in keywords.items()}


def chain(dtype=torch.float64, channels_last=False, requires_grad=True):
    """Four links, norm first, and a bias that does not cancel."""
    format = torch.channels_last if channels_last else torch.contiguous_format

    def draw(*shape):
        t = torch.randn(shape, dtype=dtype)
        return (t.to(memory_format=format) if t.dim() == 4 else t).requires_grad_(requires_grad)

    links = [
        Norm(draw(3), None, activation="relu"),
        Conv(draw(4, 3, 3, 2), draw(4), stride=(2, 1), padding=(1, 0)),
        Norm(draw(4), draw(4)),
        Conv(draw(5, 4, 1, 1), draw(5)),
    ]
    return pack(draw(2, 3, 7, 5), links)


def check_backward(packed, saved, needs_grad, **tolerances):
    out, maps, statistics = ops._chain_forward(packed.tensors, *packed.options, saved)
    arguments = (packed.tensors, maps, statistics, *packed.options, saved, needs_grad)
    torch.library.opcheck(
        ops._chain_backward.default, (torch.randn_like(out), *arguments), **tolerances
    )


@pytest.mark.thin(1)
@pytest.mark.parametrize("saved", ([], [1], [2, 3]), ids=str)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_chain(dtype, channels_last, saved):
    tolerances = dict(rtol=1e-4, atol=1e-4)
    packed = chain(dtype, channels_last)
    arguments = (packed.tensors, *packed.options)
    torch.library.opcheck(ops._chain_forward.default, (*arguments, saved), **tolerances)

    packed = chain(dtype, channels_last, requires_grad=False)
    for needs_grad in (list(range(len(packed.tensors))), [1, 4]):
        check_backward(packed, saved, needs_grad, **tolerances)


@pytest.mark.parametrize("formats", [(False, True), (True, False)], ids=("input", "weight"))
def test_chain_whose_input_and_weight_differ_in_memory_format(formats):
    x, w = torch.randn(2, 3, 7, 5), torch.randn(4, 3, 3, 2)
    x, w = (
        t.contiguous() if contiguous else t.to(memory_format=torch.channels_last)
        for t, contiguous in zip((x, w), formats, strict=True)
    )
    packed = pack(x, [Conv(w), Norm()])
    arguments = (packed.tensors, *packed.options)
    torch.library.opcheck(ops._chain_forward.default, (*arguments, []))
    out, _, statistics = ops._chain_forward(*arguments, [])
    torch.library.opcheck(
        ops._chain_backward.default,
        (torch.randn_like(out), packed.tensors, [], statistics, *arguments[1:], [], [0, 1]),
    )


def wide_chain(dtype, channels_last, requires_grad=True):
    """A virtual concatenation, a gate, a PReLU, and a norm in eval mode."""
    format = torch.channels_last if channels_last else torch.contiguous_format

    def draw(*shape):
        t = torch.randn(shape, dtype=dtype)
        return (t.to(memory_format=format) if t.dim() == 4 else t).requires_grad_(requires_grad)

    statistics = torch.stack([torch.randn(4), torch.rand(4) + 0.5]).to(dtype)
    links = [
        Norm(draw(5), draw(5), activation="relu"),
        Conv(draw(4, 5, 3, 2), padding=(1, 0)),
        Gate(draw(2, 4, 1, 1)),
        Prelu(draw(4)),
        Norm(draw(4), draw(4), arithmetic="running", statistics=statistics, activation="silu"),
    ]
    return pack([draw(2, 2, 7, 5), draw(2, 3, 7, 5)], links)


@pytest.mark.thin(1)
@pytest.mark.parametrize("saved", ([], [1, 3]), ids=str)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_chain_of_parts(dtype, channels_last, saved):
    tolerances = dict(rtol=1e-3, atol=1e-3)
    packed = wide_chain(dtype, channels_last)
    arguments = (packed.tensors, *packed.options)
    known = torch.cat([ops._channel_stats(t.detach(), "") for t in packed.tensors[:2]], 1)
    for statistics in (None, known):
        torch.library.opcheck(
            ops._chain_forward.default, (*arguments, saved, statistics), **tolerances
        )
    torch.library.opcheck(ops._channel_stats.default, (packed.tensors[0].detach(), ""))

    packed = wide_chain(dtype, channels_last, requires_grad=False)
    needs_grad = [i for i, t in enumerate(packed.tensors) if i != 1 and t.shape != (2, 4)]
    check_backward(packed, saved, needs_grad, **tolerances)


@pytest.mark.parametrize("training", ([1, 1], [1, 0], [0, 0]), ids=str)
@pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
def test_conv_bn_chain(channels_last, training):
    packed = chain(torch.float32, channels_last)
    running = [torch.zeros(3), torch.ones(3), torch.zeros(4), torch.ones(4), torch.tensor(3)]
    torch.library.opcheck(
        ops.conv_bn_chain.default,
        (packed.tensors, running, packed.links, packed.scalars, [2, 3], [0.1, float("nan")]),
        dict(training=training, saved=[1]),
        rtol=1e-3,
        atol=1e-3,
    )
