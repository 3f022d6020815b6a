"""Errors against float64 beside those of eager, where rounding costs most: "the same numbers" is
the promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedconvbn import FusedConvBN2d, conv_bn

FORMATS = pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))


def eager(x, w, gamma=None, beta=None):
    return F.batch_norm(F.conv2d(x, w), None, None, gamma, beta, training=True)


def fused(x, w, gamma=None, beta=None):
    return conv_bn(x, w, None, gamma, beta)


def gradients(function, tensors, dout, dtype):
    tensors = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, dout.to(dtype))


def compare(tensors, dout, times):
    truth = gradients(eager, tensors, dout, torch.float64)
    theirs = gradients(eager, tensors, dout, torch.float32)
    ours = gradients(fused, tensors, dout, torch.float32)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        error, other = ((t - true).norm() / true.norm() for t in (our, their))
        assert error <= times * other + 2e-7


@FORMATS
@pytest.mark.parametrize("aligned", (False, True))
@pytest.mark.parametrize("own", (1, 1e-1, 1e-2, 1e-3, 1e-4))
@pytest.mark.parametrize("filters", (256, 144, 48))
def test_channels_with_a_large_common_part(filters, own, aligned, format):
    """What a filter sees of them is `own`, a small part; `aligned` gradients have a part along the
    result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (draw(4, 1, 28, 28) + own * draw(4, 64, 28, 28)).float().to(memory_format=format)
    w = draw(filters, 64, 1, 1)
    w = (w - w.mean(1, keepdim=True)).float()
    dout = draw(4, filters, 28, 28)
    if aligned:
        dout += eager(x.double(), w.double())
    compare([x, w], dout.float(), 2)


@FORMATS
@pytest.mark.parametrize("mean", (0, 0.6, 1000))
@pytest.mark.parametrize("leaning", (0, 0.2))
def test_inputs_far_from_0(leaning, mean, format):
    torch.manual_seed(0)
    x, w = torch.randn(4, 32, 15, 14) + mean, torch.randn(128, 32, 1, 1) / 6
    normal = eager(x.double(), w.double())
    dout = torch.randn(normal.shape) + leaning * normal
    tensors = [x.to(memory_format=format), w, torch.rand(128) + 0.5, torch.randn(128)]
    compare(tensors, dout.float(), 1.2)


def test_infinite_running_statistics():
    """Eager's are (1 − momentum)·running + momentum·batch, which stays infinite and does not become
    NaN."""
    torch.manual_seed(0)
    for momentum in (0.1, 0.7, 1.0, 0.0, None):
        for dtype in (torch.float32, torch.bfloat16):
            layer = FusedConvBN2d(3, 4, 3, momentum=momentum).to(dtype)
            layer.bn.running_mean.copy_(torch.tensor([torch.inf, -torch.inf, torch.nan, 1]))
            layer.bn.running_var.copy_(torch.tensor([torch.inf, 1, 2, torch.inf]))
            plain = nn.BatchNorm2d(4, momentum=momentum, dtype=dtype)
            plain.load_state_dict(layer.bn.state_dict())
            x = torch.randn(2, 3, 5, 6, dtype=dtype)
            for _ in range(2):
                plain(layer.conv(x)), layer(x)
            for name in ("running_mean", "running_var"):
                got, due = getattr(layer.bn, name), getattr(plain, name)
                torch.testing.assert_close(got, due, equal_nan=True, rtol=2e-2, atol=1e-2)
