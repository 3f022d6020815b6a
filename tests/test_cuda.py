"""What only a GPU shows: streams, graphs, indices above 2³¹, and compute-sanitizer. The tests with a `device` argument
run there too."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import requires_cuda
from torch import nn

from fusedconvbn import FusedConvBN2d, conv_bn
from fusedconvbn.chain import Norm, pack

pytestmark = requires_cuda


def unfused(x, w):
    return F.relu(F.batch_norm(F.conv2d(x, w, padding=1), None, None, training=True))


def fused(x, w):
    return conv_bn(x, w, padding=1, activation="relu")


def test_the_current_stream_is_used():
    x, w = torch.randn(8, 16, 64, 64, device="cuda"), torch.randn(32, 16, 3, 3, device="cuda")
    expected = unfused(x + 1, w)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x + 1
        out = fused(late, w)
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_training_step_can_be_captured_in_a_graph(dtype, format):
    layer = (
        FusedConvBN2d(16, 32, 3, padding=1, activation="relu")
        .cuda()
        .to(dtype, memory_format=format)
    )
    x = torch.randn(8, 16, 32, 32, device="cuda", dtype=dtype).to(memory_format=format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
        out.float().square().sum().backward()
    x.normal_()
    before = layer.bn.running_mean.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(layer.bn.running_mean, before)
    captured = [out.clone(), layer.conv.weight.grad.clone()]
    layer.zero_grad()
    again = layer(x)
    again.float().square().sum().backward()
    torch.testing.assert_close(captured, [again, layer.conv.weight.grad], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("channels_last", (False, True))
def test_indices_above_32_bits(channels_last):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    shape = (2, 8, 11_600, 11_600)  # 2.15e9 values
    format = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=format).normal_()
    y[-1, -1] += 3
    packed = pack(y, [Norm(activation="relu")])
    out, _, (statistics,) = torch.ops.fusedconvbn._chain_forward(
        packed.tensors, *packed.options, []
    )
    last = torch.stack([y[n, -1].double().mean() for n in range(2)]).mean()
    torch.testing.assert_close(statistics[0, -1].double(), last, rtol=1e-4, atol=1e-4)
    mean, var = statistics[:, -1]
    expected = ((y[-1, -1, -1].float() - mean) * (var + 1e-5).rsqrt()).relu()
    torch.testing.assert_close(out[-1, -1, -1].float(), expected, rtol=1e-2, atol=1e-2)


def test_trains_like_the_unfused_network():
    results = []
    for kind in ("fused", "unfused"):
        torch.manual_seed(0)
        conv, bn = nn.Conv2d(3, 32, 3, bias=False).cuda(), nn.BatchNorm2d(32).cuda()
        layer = (
            FusedConvBN2d.from_modules(conv, bn, "relu")
            if kind == "fused"
            else nn.Sequential(conv, bn, nn.ReLU())
        )
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        x = torch.randn(16, 3, 32, 32, device="cuda")
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        results.append([*layer.parameters(), bn.running_mean, bn.running_var])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(64, 64, 56, 56), (32, 2048, 7, 7), (16, 520, 14, 14), (3, 24, 33, 29)], ids=str
)
@pytest.mark.parametrize(
    "format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_maps_of_many_parts(dtype, format, shape):
    """A norm link alone is the four kernels; the maps are as large as those of a network."""
    y = torch.randn(shape, device="cuda").to(dtype).to(memory_format=format) + 2
    dout = torch.randn(shape, device="cuda").to(dtype).to(memory_format=format)
    weight = torch.rand(shape[1], device="cuda") + 0.5
    bias = torch.randn(shape[1], device="cuda")
    tensors = [t.requires_grad_() for t in (y, weight, bias)]
    packed = pack(y, [Norm(weight, bias, activation="relu")])
    out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]
    grads = torch.autograd.grad(out, tensors, dout)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.batch_norm(exact[0], None, None, *exact[1:], training=True).relu()
    expected_grads = torch.autograd.grad(expected, exact, dout.double())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for value, truth in zip((out, *grads), (expected, *expected_grads), strict=True):
        error = (value.double() - truth).norm() / truth.norm()
        assert error < tolerance


@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    here = os.path.dirname(__file__)
    tests = "(test_float64_training or test_error_is_not_above) and cuda and (every or wide or depthwise)"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch makes harmless ones when it starts
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"{here}/test_conv_bn.py", "-k", tests]
    # Without the caching allocator each tensor has an allocation of its own, whose end is watched.
    subprocess.run(
        command, check=True, cwd=here, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
