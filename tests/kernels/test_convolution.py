"""The convolutions of our own on CPU against float64, beside ATen's."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from fusedconvbn.chain import Conv, pack

CAPABLE = torch.backends.cpu.get_cpu_capability() != "DEFAULT"

# batch, channels, filters, height, width, padding: at least 64 tiles of 2×2 outputs for each of
# two threads
WINOGRAD = {
    "as wide as high": (4, 32, 64, 16, 16, (1, 1)),
    "odd sizes": (5, 64, 32, 13, 17, (1, 1)),
    "no padding": (3, 32, 32, 17, 18, (0, 0)),
    "more padding": (3, 64, 96, 13, 11, (2, 1)),
    "one row": (40, 32, 32, 1, 9, (1, 1)),
    "many tiles": (2, 32, 32, 62, 60, (1, 1)),
    "many channels": (2, 2048, 64, 16, 15, (1, 1)),
    "many filters": (2, 64, 2048, 16, 15, (1, 1)),
    "filters in parts": (2, 512, 320, 16, 17, (1, 1)),
}


def run(case, x, weight, dout):
    """Result, input gradient and weight gradient of the operators."""
    packed = pack(x, [Conv(weight, padding=case[5])])
    out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]
    backward = torch.ops.fusedconvbn._chain_backward
    return out, *backward(dout, packed.tensors, [], [], *packed.options, [], [0, 1])


def aten(case, x, weight, dout):
    out = F.conv2d(x, weight, padding=case[5])
    options = ([1, 1], case[5], [1, 1], False, [0, 0], 1, [True, True, False])
    return out, *torch.ops.aten.convolution_backward(dout, x, weight, None, *options)[:2]


def error(value, truth):
    return ((value.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.skipif(not CAPABLE, reason="Winograd's convolutions need AVX2")
@pytest.mark.parametrize("weight_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("inputs", ("normal", "positive", "far from 0"))
@pytest.mark.parametrize("case", WINOGRAD.values(), ids=WINOGRAD)
def test_winograd(case, inputs, weight_format):
    torch.manual_seed(0)
    batch, channels, filters, height, width, padding = case
    x = torch.randn(batch, channels, height, width)
    x = {"normal": x, "positive": x.relu(), "far from 0": x + 100}[inputs]
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, 3, 3).to(memory_format=weight_format) / channels**0.5
    truth = F.conv2d(x.double(), weight.double(), padding=padding)
    dout = torch.randn_like(truth).float()
    truth = aten(case, x.double(), weight.double(), dout.double())
    with profile() as profiler:
        ours = run(case, x, weight, dout)
    assert not any("aten::convolution" in event.name for event in profiler.events())
    # The result and the input's gradient are nearer to the truth than oneDNN's on the whole. The
    # weight's gradient, which oneDNN adds up in many parts, is as near as oneDNN's.
    floor = 2 * torch.finfo(torch.float32).eps
    others = aten(case, x, weight, dout)
    for name, our, other, true in zip(
        ("output", "input gradient", "weight gradient"), ours, others, truth, strict=True
    ):
        assert our.stride() == other.stride(), name
        assert error(our, true) <= 1.1 * error(other, true) + floor, name


@pytest.mark.skipif(not CAPABLE, reason="Winograd's convolutions need AVX2")
def test_winograd_does_not_depend_on_the_number_of_threads():
    case = WINOGRAD["filters in parts"]
    x = torch.randn(4, 512, 16, 17).to(memory_format=torch.channels_last)
    weight, dout = torch.randn(320, 512, 3, 3), torch.randn(4, 320, 16, 17)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(case, x, weight, dout))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# batch, channels, height, width, kernel, stride, padding
DEPTHWISE = [
    (2, 16, 9, 11, 3, 1, (1, 1)),
    (3, 33, 8, 5, 3, 2, (1, 1)),
    (2, 40, 7, 6, 5, 1, (2, 2)),
    (2, 100, 13, 12, 5, 2, (2, 2)),
    (1, 17, 6, 9, 3, 1, (0, 2)),
    (1, 24, 5, 7, 5, 1, (4, 0)),
    (2, 20, 6, 8, 3, 2, (0, 1)),
    (1, 19, 2, 1, 3, 1, (1, 1)),
    (1, 18, 1, 4, 5, 2, (4, 3)),
    (9, 32, 40, 37, 3, 1, (1, 1)),
]


@pytest.mark.skipif(not CAPABLE, reason="depthwise convolutions need AVX2")
@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(case):
    batch, channels, height, width, kernel, stride, padding = case
    x = torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)
    conv = Conv(
        torch.randn(channels, 1, kernel, kernel),
        stride=(stride, stride),
        padding=padding,
        groups=channels,
    )
    options = (None, conv.stride, conv.padding, conv.dilation, False, conv.output_padding, channels)
    masks = [True, True, False]
    wide = x.double(), conv.weight.double()
    truth = [torch.ops.aten.convolution(*wide, *options)]
    dout = torch.randn_like(truth[0]).float()
    backward = torch.ops.aten.convolution_backward
    truth += backward(dout.double(), *wide, *options, masks)[:2]
    others = [torch.ops.aten.convolution(x, conv.weight, *options)]
    others += backward(dout, x, conv.weight, *options, masks)[:2]
    packed = pack(x, [conv])
    with profile() as profiler:
        ours = [torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]]
        ours += torch.ops.fusedconvbn._chain_backward(
            dout, packed.tensors, [], [], *packed.options, [], [0, 1]
        )
    assert not any("aten::convolution" in event.name for event in profiler.events())
    for our, other, true in zip(ours, others, truth, strict=True):
        assert our.stride() == other.stride()
        assert error(our, true) <= 1.1 * error(other, true) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "change",
    (
        dict(stride=(2, 2)),
        dict(dilation=(2, 2)),
        dict(padding=(3, 3)),
        dict(groups=2),
        dict(bias=torch.ones(64)),
        dict(transposed=True),
    ),
    ids=lambda change: next(iter(change)),
)
def test_other_convolutions_are_left_to_aten(change):
    x = torch.randn(4, 64, 16, 16).to(memory_format=torch.channels_last)
    conv = Conv(torch.randn(64, 64 // change.get("groups", 1), 3, 3), **change)
    packed = pack(x, [conv])
    out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]
    options = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding)
    expected = torch.ops.aten.convolution(x, conv.weight, conv.bias, *options, conv.groups)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


# Runs in a process of its own: oneDNN reads its environment once, and a write past its memory ends
# the process late.
ENDS_THE_PROCESS = """
import torch
from fusedconvbn import conv_bn

torch.set_num_threads(1)
last = {4: torch.channels_last, 5: torch.channels_last_3d}

def check(dtype, x, weight, bias=None, **options):
    leaves = [t.to(dtype) for t in (x, weight)]
    leaves[0] = leaves[0].contiguous(memory_format=last[x.dim()])
    results = []
    for kind in (dtype, torch.float64):
        a, w = (t.to(kind).requires_grad_() for t in leaves)
        vector = torch.float32 if kind != torch.float64 else kind
        c = w.size(1) if options.get("transposed") else w.size(0)
        running = {"running_mean": torch.zeros(c), "running_var": torch.ones(c)}
        running = {name: t.to(vector) for name, t in running.items()}
        b = None if bias is None else bias.to(kind).requires_grad_()
        out = conv_bn(a, w, b, **running, **options)
        dout = torch.sin(torch.arange(out.numel()) + 1.0).view(out.shape).to(kind)
        needs_grad = (a, w) if b is None else (a, w, b)
        results.append([out, *torch.autograd.grad(out, needs_grad, dout, materialize_grads=True)])
    for got, due in zip(*results):
        error = (got.double() - due).norm() / due.norm().clamp_min(1e-3)
        assert error < {torch.float32: 1e-3}.get(dtype, 5e-2), (dtype, options, error)

for dtype in (torch.float16, torch.bfloat16, torch.float32):
    for channels in (3, 7, 12, 15):
        for size in (8, 64):
            torch.manual_seed(0)
            x, w = torch.randn(4, channels, size, size), torch.randn(8, channels, 1, 1)
            for _ in range(5):
                check(dtype, x, w, stride=2)
                check(dtype, x, w, stride=2, training=False)
                check(dtype, x, w, torch.randn(8), stride=[1, 2], training=False, activation="elu")
            check(dtype, x[..., :-1, :-2], w, torch.randn(8), stride=[2, 3])
            small = torch.randn(4, 8, size // 2, size // 2)
            check(dtype, small, w, stride=2, output_padding=1, transposed=True, activation="silu")
            options = dict(stride=[2, 1], dilation=[1, 3], output_padding=[0, 2])
            check(dtype, small, w, transposed=True, **options)
    blind = dict(stride=2, padding=[0, 3, 3], dilation=2)
    for _ in range(5):
        x, w = torch.randn(5, 16, 5, 5, 1), torch.randn(2, 16, 1, 1, 1)
        for activation in ("none", "silu"):
            check(dtype, x, w, torch.randn(2), training=False, activation=activation, **blind)
            check(dtype, x, w, training=False, activation=activation, **blind)
    options = dict(stride=2, padding=[6, 7], dilation=6)
    check(dtype, torch.randn(2, 16, 9, 1), torch.randn(4, 16, 3, 2), training=False, **options)
"""


@pytest.mark.parametrize("isa", ("DEFAULT", "AVX2"))
def test_where_onednn_ends_the_process(isa, tmp_path):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "MALLOC_CHECK_": "3"}
    command = [sys.executable, "-c", ENDS_THE_PROCESS]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr
