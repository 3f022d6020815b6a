"""torch.func, forward-mode AD and second derivatives against the layer in elementary operations.
(F.batch_norm itself has wrong third derivatives, and wrong ones of a forward-mode derivative;
F.conv2d with a bias is wrong under vmap of the weight.)
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Case
from torch import nn
from torch.autograd import forward_ad

from fusedconvbn import FusedConvBN2d, conv_bn, reference
from fusedconvbn.activations import activation_module

# A relu is linear but for its kinks; silu has every derivative. The residual joins in both.
SMALL = {
    "relu": Case((2, 2, 4, 3), (3, 2, 2, 2), bias=True),
    "relu, residual": Case((2, 2, 4, 3), (3, 2, 2, 2), residual=True),
    "silu": Case((2, 2, 4, 3), (3, 2, 2, 2), activation="silu"),
    "silu, residual": Case((2, 2, 4, 3), (3, 2, 2, 2), residual=True, activation="silu"),
    "leaky_relu": Case((2, 2, 4, 3), (3, 2, 2, 2), activation="leaky_relu(0.2)"),
    "tanh, transposed": Case((2, 2, 3, 2), (2, 3, 2, 2), transposed=True, activation="tanh"),
}
EVERY_CASE = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
MODES = pytest.mark.parametrize("training", (True, False), ids=("batch", "frozen"))


def fused(tensors, case, **more):
    return conv_bn(**tensors, **{**case.options, **more})


def elementary(tensors, case, training=True, running_mean=None, running_var=None):
    t = tensors
    names = ["stride", "padding", "dilation", "groups"] + ["output_padding"] * case.transposed
    convolution = reference.CONVOLUTIONS[t["input"].dim() - 2, case.transposed]
    y = convolution(t["input"], t["weight"], t.get("bias"), **{n: case.options[n] for n in names})
    of_channels = lambda v: v.reshape(-1, *[1] * (y.dim() - 2))  # noqa: E731
    if training:
        var, mean = torch.var_mean(y, (0, *range(2, y.dim())), correction=0)
    else:
        var, mean = running_var, running_mean
    u = (y - of_channels(mean)) / of_channels((var + case.eps).sqrt())
    u = u * of_channels(t["bn_weight"]) + of_channels(t["bn_bias"])
    return activation_module(case.activation)(u + t["residual"] if "residual" in t else u)


def mode(case, training):
    return {"training": training, **({} if training else case.running())}


def both(case, training, use):
    """`use` of (function of the case's tensors in order, their values), for the fused and the
    elementary layer."""
    tensors = case.tensors(requires_grad=False)
    names, values = list(tensors), list(tensors.values())
    results = []
    for function in (fused, elementary):

        def of_values(*values, function=function):
            return function(dict(zip(names, values, strict=True)), case, **mode(case, training))

        results.append(use(of_values, values))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def loss(function):
    return lambda *values: function(*values).sin().square().sum()


@MODES
@EVERY_CASE
def test_grad_vjp_jvp(case, training):
    everything = tuple(range(len(case.tensors())))
    both(case, training, lambda f, v: torch.func.grad(loss(f), everything)(*v))
    both(case, training, lambda f, v: torch.func.vjp(f, *v)[1](f(*v).cos()))
    both(case, training, lambda f, v: torch.func.jvp(f, tuple(v), tuple(t.cos() for t in v)))
    both(case, training, lambda f, v: torch.func.grad_and_value(loss(f), everything)(*v))


@MODES
@EVERY_CASE
def test_jacobians_and_hessian(case, training):
    both(case, training, lambda f, v: torch.func.jacrev(f, (0, 1))(*v))
    both(case, training, lambda f, v: torch.func.jacfwd(f, (0, 1))(*v))
    both(case, training, lambda f, v: torch.func.hessian(loss(f), (1,))(*v))
    both(case, training, lambda f, v: torch.func.jacrev(torch.func.jacrev(loss(f), 1), 1)(*v))


@MODES
@EVERY_CASE
def test_vmap(case, training):
    """Over each argument in turn, against a loop."""
    tensors = case.tensors(requires_grad=False)
    names, values, options = list(tensors), list(tensors.values()), mode(case, training)

    def of(function):
        return lambda *values: function(dict(zip(names, values, strict=True)), case, **options)

    for i in range(len(values)):
        batch = [[*values[:i], t, *values[i + 1 :]] for t in (values[i], values[i].sin())]
        stacked = [
            torch.stack(t) if k == i else t[0] for k, t in enumerate(zip(*batch, strict=True))
        ]
        dims = tuple(0 if k == i else None for k in range(len(values)))
        for use in (lambda f: f, lambda f, i=i: torch.func.grad(loss(f), i)):
            result = torch.vmap(use(of(fused)), dims)(*stacked)
            expected = torch.stack([use(of(elementary))(*one) for one in batch])
            torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


@MODES
@EVERY_CASE
def test_forward_mode(case, training):
    def tangent(f, v):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.cos()) for t in v]
            return forward_ad.unpack_dual(f(*duals))

    both(case, training, tangent)


@EVERY_CASE
@MODES
def test_forward_mode_over_backward_and_backward_over_forward_mode(case, training):
    def forward_over_reverse(f, v):
        return torch.func.jvp(torch.func.grad(loss(f), (0, 1)), tuple(v), tuple(t.cos() for t in v))

    def reverse_over_forward(f, v):
        return torch.func.grad(
            lambda *v: torch.func.jvp(loss(f), v, tuple(t.detach().cos() for t in v))[1], (0, 1)
        )(*v)

    both(case, training, forward_over_reverse)
    both(case, training, reverse_over_forward)


@MODES
@EVERY_CASE
def test_gradgradcheck(case, training):
    tensors = case.tensors()
    names, options = list(tensors), mode(case, training)
    assert torch.autograd.gradgradcheck(
        lambda *values: fused(dict(zip(names, values, strict=True)), case, **options),
        list(tensors.values()),
        fast_mode=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


def test_a_bias_in_front_of_batch_statistics_has_the_gradient_0_in_forward_mode_too():
    case = SMALL["relu"]
    tensors = case.tensors()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(tensors["input"], tensors["input"].cos())
        (grad,) = torch.autograd.grad(fused({**tensors, "input": x}, case).sum(), tensors["bias"])
    assert torch.count_nonzero(grad) == 0


@MODES
def test_third_derivative(training):
    def third(f, v):
        w = v[1].clone().requires_grad_()
        value = loss(f)(v[0], w, *v[2:])
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, w, create_graph=True)
            value = grad.sin().sum()
        return grad.detach()

    both(SMALL["silu, residual"], training, third)


@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
def test_second_derivative_through_a_residual(activation):
    """The residual depends on the input and the weight, and the gradient that is penalised is its
    own."""
    case = Case((3, 3, 4, 5), (3, 3, 3, 3), padding=(1,), residual=True, activation=activation)
    tensors = case.tensors()
    results = []
    for function in (fused, elementary):
        residual = tensors["residual"] * tensors["input"].square() * tensors["weight"].sum()
        out = function({**tensors, "residual": residual}, case)
        needs_grad = (residual, tensors["input"])
        grads = torch.autograd.grad(out.sin().sum(), needs_grad, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        results.append(torch.autograd.grad(penalty, list(tensors.values())))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_create_graph_gives_the_first_derivative_as_without():
    case = CASES["silu, residual"]
    tensors = list((t := case.tensors()).values())
    out = fused(t, case)
    plain = torch.autograd.grad(out.sin().sum(), tensors, retain_graph=True)
    graph = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
    torch.testing.assert_close(plain, graph, rtol=1e-9, atol=1e-9)
    assert all(g.requires_grad for n, g in zip(t, graph, strict=True) if n != "bias")


def test_functional_call_and_ensembles():
    """The layer with parameters from outside: one gradient per sample by vmap, and a stack of
    models."""
    layers = [FusedConvBN2d(2, 3, 3, activation="silu").double().eval() for _ in range(3)]
    layer = layers[0]
    plain = nn.Sequential(layer.conv, layer.bn, nn.SiLU())
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    keys = {"conv": "0", "bn": "1"}
    params = {k: v.detach() * 1.5 for k, v in layer.named_parameters()}
    plain_params = {keys[(p := k.split("."))[0]] + "." + p[1]: v for k, v in params.items()}

    def per_sample(module, params):
        def of_one(params, sample):
            return torch.func.functional_call(module, params, (sample[None],)).square().sum()

        return torch.vmap(torch.func.grad(of_one), (None, 0))(params, x)

    grads, expected = per_sample(layer, params), per_sample(plain, plain_params)
    torch.testing.assert_close(list(grads.values()), list(expected.values()))

    stacked, buffers = torch.func.stack_module_state(layers)
    call = lambda p, b: torch.func.functional_call(layer, (p, b), (x,))  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(call)(stacked, buffers), torch.stack([each(x) for each in layers])
    )


def test_vmap_over_running_statistics():
    """Each of the mapped calls has statistics of its own: it needs buffers of its own."""
    layer, x = FusedConvBN2d(2, 3, 3), torch.randn(5, 4, 2, 5, 6)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        ValueError, match="expected running_mean and running_var that vmap maps over"
    ):
        torch.vmap(layer)(x)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    mean, var = torch.zeros(5, 3), torch.ones(5, 3)
    torch.vmap(
        lambda x, mean, var: conv_bn(x, layer.conv.weight, running_mean=mean, running_var=var)
    )(x, mean, var)
    for i in range(5):
        one = FusedConvBN2d.from_modules(layer.conv, torch.nn.BatchNorm2d(3))
        one(x[i])
        torch.testing.assert_close(mean[i], one.bn.running_mean)
        torch.testing.assert_close(var[i], one.bn.running_var)


def test_functional_call_in_training_updates_the_buffers_given():
    layer = FusedConvBN2d(2, 3, 3).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    buffers = {k: v.clone() for k, v in layer.named_buffers()}
    torch.func.functional_call(layer, buffers, (x,))
    assert layer.bn.num_batches_tracked == 0
    assert buffers["bn.num_batches_tracked"] == 1
    layer(x)
    torch.testing.assert_close(buffers, dict(layer.named_buffers()))


def test_gradient_penalty_example():
    path = Path(__file__).parents[2] / "examples" / "gradient_penalty.py"
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for line in lines:
        first, second = (float(line[line.index(word) - 1]) for word in ("fused,", "unfused"))
        assert abs(first - second) <= 2e-3 * abs(second)
