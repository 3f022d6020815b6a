"""Backward of a wide 1×1 convolution and the norm behind it, without the map between them (csrc/pointwise.h). The gradients
themselves are tested with all other cases, of which some are such."""

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import nn
from torch.profiler import profile

from fusedconvbn import conv_bn, fuse
from fusedconvbn.planning import share_of_going_around

FORMATS = pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
# input, weight, and whether it takes less time than remaking the result
SIZES = {
    "wide": ((2, 16, 9, 7), (64, 16, 1, 1), True),
    "not wide": ((2, 16, 9, 7), (32, 16, 1, 1), False),
    "few positions": ((2, 16, 3, 4), (64, 16, 1, 1), False),
    "hardly less work": ((2, 16, 9, 4), (64, 16, 1, 1), False),
    "3×3": ((2, 16, 9, 7), (64, 16, 3, 3), False),
}


def remade(input, weight):
    """Whether backward makes the convolution's result again."""
    x, w = torch.randn(input, requires_grad=True), torch.randn(weight, requires_grad=True)
    out = conv_bn(x, w)
    with profile(record_shapes=True) as profiler:
        out.sum().backward()
    shapes = [e.input_shapes[:2] for e in profiler.events() if e.name == "aten::convolution"]
    return [list(input), list(weight)] in shapes


@pytest.mark.parametrize("input, weight, around", SIZES.values(), ids=SIZES)
def test_where_backward_goes_around(input, weight, around):
    assert remade(input, weight) != around
    conv = nn.Conv2d(weight[1], weight[0], weight[2])
    values = weight[0] * input[0] * input[2] * input[3]
    assert (share_of_going_around(conv, values, 4, "cpu") < 1) == around
    assert share_of_going_around(conv, values, 2, "cpu") == 1
    assert share_of_going_around(conv, values, 4, "cuda") == 1
    padded = nn.Conv2d(weight[1], weight[0], weight[2], padding=1)
    assert share_of_going_around(padded, values, 4, "cpu") == 1


def test_only_where_the_slope_is_at_hand():
    """With a residual ReLU's shows in the result; without one nothing of the result is kept."""
    block = nn.Sequential(nn.Conv2d(16, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
    x = torch.randn(2, 16, 9, 7)
    fused = fuse(block, x, memory="min")
    with profile(record_shapes=True) as profiler:
        fused(x).sum().backward()
    shapes = [e.input_shapes[:2] for e in profiler.events() if e.name == "aten::convolution"]
    assert shapes.count([[2, 16, 9, 7], [64, 16, 1, 1]]) == 2  # forward, and backward


@FORMATS
@pytest.mark.parametrize("mean", (0, 0.6, 1000))
@pytest.mark.parametrize("leaning", (0, 0.2), ids=("", "leaning"))
def test_as_near_to_the_truth_as_unfused(format, mean, leaning):
    """Also where the gradient has a part along the normalised map, which is taken out, and far from 0."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(32, 128, 1, bias=False), nn.BatchNorm2d(128)
    x = (torch.randn(4, 32, 15, 14) + mean).to(memory_format=format)
    normal = F.batch_norm(conv.double()(x.double()), None, None, training=True)
    dout = (torch.randn(normal.shape) + leaning * normal.detach()).float()

    def gradients(function, dtype):
        tensors = [x, conv.weight, bn.weight, bn.bias]
        tensors = [t.detach().float().to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*tensors), tensors, dout.to(dtype))

    def unfused(x, w, gamma, beta):
        return F.batch_norm(F.conv2d(x, w), None, None, gamma, beta, training=True)

    truth = gradients(unfused, torch.float64)
    ours = gradients(lambda x, w, *affine: conv_bn(x, w, None, *affine), torch.float32)
    theirs = gradients(unfused, torch.float32)
    for name, our, their, true in zip(("x", "w", "γ", "β"), ours, theirs, truth, strict=True):
        error, other = ((t - true).norm() / true.norm() for t in (our, their))
        assert error <= 1.2 * other + 2e-7, name


@FORMATS
def test_what_was_not_asked_for(format):
    """Any one of the gradients alone is what it is among all."""
    case = Case((2, 3, 5, 6), (10, 3, 1, 1), residual=True)
    tensors = case.tensors(channels_last=format == torch.channels_last)
    dout = torch.randn(case.out_shape, dtype=torch.float64)
    everything = torch.autograd.grad(conv_bn(**tensors), list(tensors.values()), dout)
    for name, expected in zip(tensors, everything, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        (grad,) = torch.autograd.grad(conv_bn(**alone), [alone[name]], dout)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_what_it_reads_stays_as_it_is():
    """It centres its input in place only where it made it."""
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    before, dout = x.detach().clone(), torch.randn(2, 64, 9, 7)
    given = dout.clone()
    conv_bn(x, torch.randn(64, 16, 1, 1, requires_grad=True)).backward(dout)
    assert torch.equal(x, before) and torch.equal(dout, given)
