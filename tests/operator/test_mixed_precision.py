"""Autocast, gradient scaling, whole models in half precision, and memory formats in all of them."""

import itertools

import pytest
import torch
from cases import FORMATS, Case, unfused
from torch import nn

from fusedconvbn import FusedConvBN2d, conv_bn
from fusedconvbn.activations import ACTIVATIONS, activation_module

HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
LAYOUTS = pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
RESIDUAL = pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
MODES = pytest.mark.parametrize("training", (True, False), ids=("batch", "frozen"))
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)


def fused(tensors, case, **more):
    return conv_bn(**tensors, **{**case.options, **more})


def run(function, tensors, case, dout, **more):
    out = function(tensors, case, **more)
    grads = torch.autograd.grad(out, list(tensors.values()), dout.to(out))
    return {"output": out.detach(), **dict(zip(tensors, grads, strict=True))}


def relative_error(value, truth):
    difference = (value.double() - truth).square().mean().sqrt()
    return difference / truth.square().mean().sqrt().clamp_min(1e-3)


def assert_no_worse(results, others, truth, case, dtype):
    """The root mean square, with a floor of two roundings for tensors of few values. Where the
    slope jumps at a number with rounding errors (not at 0, where they are small) a share eps of the
    values is on the wrong side of it in both."""
    jumps = case.activation == "relu6"
    floor = 2 * torch.finfo(dtype).eps + jumps * torch.finfo(dtype).eps ** 0.5
    for name, value in truth.items():
        if name == "bias":  # in training 0 exactly, where the unfused layers have rounding errors
            continue
        assert results[name].dtype == others[name].dtype, name
        error, allowed = (relative_error(r[name], value) for r in (results, others))
        assert error <= 1.1 * allowed + floor, name


def mode(case, training, dtype, device="cpu"):
    return {"training": training, **({} if training else case.running(dtype, device))}


@MODES
@RESIDUAL
@LAYOUTS
@HALVES
@EVERY_ACTIVATION
def test_half_precision_is_no_worse_than_unfused(
    activation, dtype, channels_last, residual, training, device
):
    case = Case((3, 4, 9, 7), (6, 4, 3, 3), bias=True, activation=activation, residual=residual)
    tensors = case.tensors(dtype, channels_last, device)
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    dout = torch.randn(case.out_shape).to(device, dtype)
    truth = run(unfused, exact, case, dout, **mode(case, training, torch.float64, device))
    results = run(fused, tensors, case, dout, **mode(case, training, torch.float32, device))
    others = run(unfused, tensors, case, dout, **mode(case, training, torch.float32, device))
    assert_no_worse(results, others, truth, case, dtype)


@MODES
@RESIDUAL
@HALVES
@EVERY_ACTIVATION
def test_autocast_is_no_worse_than_unfused(activation, dtype, residual, training, device):
    """Parameters in float32, and their gradients. Without fusion a residual in float32 makes the
    sum float32; fused, it is lowered, as the result is."""
    case = Case((3, 4, 9, 7), (6, 4, 3, 3), bias=True, activation=activation, residual=residual)
    tensors = case.tensors(torch.float32, device=device)
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    dout = torch.randn(case.out_shape).to(device, dtype)
    truth = run(unfused, exact, case, dout, **mode(case, training, torch.float64, device))
    lowered = {n: t.to(dtype) if n == "residual" else t for n, t in tensors.items()}
    with torch.autocast(device, dtype=dtype):
        results = run(fused, tensors, case, dout, **mode(case, training, torch.float32, device))
        out = unfused(lowered, case, **mode(case, training, torch.float32, device))
    grads = torch.autograd.grad(out, list(tensors.values()), dout.to(out))
    others = {"output": out.detach(), **dict(zip(tensors, grads, strict=True))}
    assert results["output"].dtype == dtype
    assert_no_worse(
        {**results, "output": results["output"].to(out.dtype)}, others, truth, case, dtype
    )


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="convolutions run in float on this CPU"
)
def test_backward_casts_the_weight_of_a_recomputed_convolution_once():
    """For both of its convolutions; and the gradient back."""
    layer = FusedConvBN2d(5, 7, 3, activation="relu")
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(torch.randn(2, 5, 8, 9)).sum()
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    copied = [e.input_shapes[0] for e in profile.function_events if e.name == "aten::copy_"]
    assert copied.count([7, 5, 3, 3]) == 2


def test_autocast_keeps_float64():
    case = Case((2, 3, 5, 4), (4, 3, 3, 2), activation="silu")
    tensors = case.tensors()
    expected = fused(tensors, case, training=False, **case.running())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(tensors, case, training=False, **case.running())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected)


@MODES
@pytest.mark.parametrize("other", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@HALVES
def test_a_residual_of_another_dtype_under_autocast(dtype, other, training):
    """It may come from a layer in another precision: the result is autocast's, its gradient its
    own."""
    case = Case((3, 4, 6, 5), (6, 4, 3, 3), activation="silu", residual=True)
    tensors = case.tensors(torch.float32)
    residual = tensors["residual"].detach().to(other).requires_grad_()
    options = mode(case, training, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = fused({**tensors, "residual": residual}, case, **options)
        (grad,) = torch.autograd.grad(out.float().sin().sum(), residual)
    expected = unfused({**tensors, "residual": residual.float()}, case, **options)
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), residual)
    assert (out.dtype, grad.dtype) == (dtype, other)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    assert relative_error(grad, expected_grad.double()) < 0.05


@MODES
@pytest.mark.parametrize("wide", ("input", "residual"))
def test_float64_next_to_another_dtype_is_refused_under_autocast(wide, training):
    """Autocast leaves float64 as it is, so the two would not meet."""
    case = Case((3, 4, 6, 5), (6, 4, 3, 3), activation="silu", residual=True)
    tensors = case.tensors(torch.float32, requires_grad=False)
    tensors[wide] = tensors[wide].double()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match="of the dtype of input"),
    ):
        fused(tensors, case, **mode(case, training, torch.float32))


@MODES
@LAYOUTS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("use", ("plain", "autocast"))
def test_memory_formats_in_and_out(use, dtype, channels_last, training):
    """The result, the gradients of the maps and that of the weight have the strides of what they
    belong to."""
    case = Case((3, 4, 6, 5), (6, 4, 3, 3), activation="silu", residual=True)
    tensors = case.tensors(torch.float32 if use == "autocast" else dtype, channels_last)
    options = mode(case, training, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use == "autocast"):
        out = fused(tensors, case, **options)
    format = FORMATS[4] if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=format)
    dout = torch.randn(out.shape).to(out).to(memory_format=format)
    grads = torch.autograd.grad(out, [tensors[n] for n in ("input", "weight", "residual")], dout)
    assert all(g.is_contiguous(memory_format=format) for g in grads)
    no_grad = {n: t.detach() for n, t in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use == "autocast"):
        assert fused(no_grad, case, **options).stride() == out.stride()


class Network(nn.Module):
    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(4)
        self.fused = fused
        self.layers = nn.ModuleList(
            FusedConvBN2d(*c, 3, padding=1, activation=a)
            for c, a in (((3, 8), "relu"), ((8, 8), "silu"), ((8, 8), "relu"))
        )
        self.head = nn.Linear(8, 2)

    def pair(self, layer, x, residual=None):
        if self.fused:
            return layer(x, residual)
        u = layer.bn(layer.conv(x))
        return activation_module(layer.activation)(u if residual is None else u + residual)

    def forward(self, x):
        first, second, third = self.layers
        x = self.pair(first, x)
        return self.head(self.pair(third, self.pair(second, x), x).mean((2, 3)))


def train(model, x, target, steps=8, autocast=None, scaler=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = nn.functional.mse_loss(model(x).float(), target)
        losses.append(loss.item())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return torch.tensor(losses)


def data():
    return torch.randn(8, 3, 8, 7), torch.randn(8, 2)


@LAYOUTS
@HALVES
def test_training_with_a_gradient_scaler(dtype, channels_last):
    x, target = data()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    exact = train(Network(False), x, target)
    curves = [
        train(Network(fused), x, target, autocast=dtype, scaler=torch.amp.GradScaler("cpu"))
        for fused in (True, False)
    ]
    assert curves[0][-1] < 0.7 * curves[0][0]
    torch.testing.assert_close(curves[0], exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(*curves, rtol=0.05, atol=0.02)


def test_an_overflow_is_found_and_the_step_left_out():
    """A scale beyond float16 makes infinite gradients; the scaler sees them and halves its scale,
    and nothing is lost."""
    x, target = data()
    for fused in (True, False):
        model = Network(fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, growth_interval=1000)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, x, target, steps=1, autocast=torch.float16, scaler=scaler)
        assert scaler.get_scale() == 2.0**31
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        train(model, x, target, steps=25, autocast=torch.float16, scaler=scaler)
        assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(
            torch.isfinite(t).all() for t in itertools.chain(model.parameters(), model.buffers())
        )


@MODES
@LAYOUTS
@HALVES
def test_a_whole_model_in_half_precision(dtype, channels_last, training):
    """`.half()` and `.bfloat16()` take parameters and running statistics along."""
    x = data()[0].to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    models = [Network(fused).to(dtype).train(training) for fused in (True, False)]
    exact = Network(False).to(dtype).double().train(training)
    assert {t.dtype for t in models[0].state_dict().values()} == {dtype, torch.int64}
    truth = torch.autograd.grad(exact(x.double()).square().sum(), list(exact.parameters()))
    errors = []
    for model in models:
        out = model(x)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        assert all(g.dtype == dtype for g in grads)
        errors.append(
            torch.stack([relative_error(g, t) for g, t in zip(grads, truth, strict=True)])
        )
    assert errors[0].mean() <= 1.1 * errors[1].mean() + 2 * torch.finfo(dtype).eps
    if training:
        for mine, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


@HALVES
def test_channels_last_through_a_model(dtype):
    model = Network(True).to(dtype).to(memory_format=torch.channels_last)
    x = data()[0].to(dtype, memory_format=torch.channels_last)
    for layer in model.layers:
        x = layer(x)
        assert x.is_contiguous(memory_format=torch.channels_last)
