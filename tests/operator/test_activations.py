"""The activations against torch.nn.functional: values and gradients over the whole range, at the
kinks and far out, and the way between names and modules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import nn

from fusedconvbn import FusedConvBN2d, conv_bn
from fusedconvbn.activations import ACTIVATIONS, activation_module, activation_name
from fusedconvbn.chain import Norm, pack

NAMES = ("leaky_relu(0.2)", "leaky_relu(-0.3)", "elu(0.7)", *ACTIVATIONS)
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
BOTH_LAYOUTS = pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))
WITH_AND_WITHOUT_RESIDUAL = pytest.mark.parametrize(
    "with_residual", (False, True), ids=("alone", "residual")
)
INFINITY, NAN = float("inf"), float("nan")
CHANNELS = 3

FAR = (20, -20, 100, -100, 1e4, -1e4)
NEAR_0 = (1e-7, -1e-7, 1e-30, -1e-30, 1e-40, -1e-40, 1e-45, -1e-45)
KINKS = (0.0, -0.0, 3, -3, 6, 5.9999995, 6.0000005, 2.9999998, -3.0000002)
SPECIAL = torch.tensor((*KINKS, *FAR, *NEAR_0), dtype=torch.float64)


def as_map(values, channels_last):
    """`values` as a map of odd sizes, so that every loop has a rest."""
    rest = -len(values) % (2 * CHANNELS)
    t = F.pad(values, (0, rest)).reshape(2, CHANNELS, -1, 1)
    return t.to(memory_format=torch.channels_last) if channels_last else t


def through_link(x, name, residual=None, save_result=False):
    """A chain of one link that has neither statistics nor a scale."""
    base, _, parameter = name.partition("(")
    parameter = float(parameter[:-1]) if parameter else None
    link = Norm(residual=residual, arithmetic="none", activation=base, parameter=parameter)
    packed = pack(x, [link])
    saved = [1] if save_result else []
    return torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, saved)[0]


def through_layer(x, name, residual=None):
    """An identity as convolution, normalised by the mean 0 and the variance 1."""
    unit = {"running_mean": torch.zeros(CHANNELS), "running_var": torch.ones(CHANNELS)}
    unit = {n: t.to(x.dtype) for n, t in unit.items()}
    w = torch.ones(CHANNELS, 1, 1, 1, dtype=x.dtype)
    options = {"training": False, "eps": 0.0, "groups": CHANNELS, "activation": name}
    return conv_bn(x, w, residual=residual, **unit, **options)


def through_convolution_and_link(x, name, residual=None):
    """PyTorch's own convolution, which may not be an identity for bfloat16: the CPU's instructions
    for it take numbers below the normal ones for 0, in forward and in backward."""
    w = torch.ones(CHANNELS, 1, 1, 1, dtype=x.dtype)
    return through_link(F.conv2d(x, w, groups=CHANNELS), name, residual)


def through_torch(x, name, residual=None):
    return activation_module(name)(x if residual is None else x + residual)


def run(function, x, name, dout, residual=None, **options):
    """The result and the gradients of x and of the residual."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    out = function(leaves[0], name, *leaves[1:], **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def sample(dtype):
    """In rising order, dense where the activations bend."""
    dense = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    wide = torch.linspace(-120, 120, 801, dtype=torch.float64)
    small = torch.logspace(-12, 0, 500, dtype=torch.float64)
    return torch.cat([dense, wide, small, -small, SPECIAL]).sort().values.to(dtype)


def truth_of(x, name, residual, dout):
    """In float64, from the same numbers. gelu by erfc: torch's loses the tail even in float64."""
    exact = x.double() if residual is None else x.double() + residual.double()
    exact = exact.clone().requires_grad_()
    if name == "gelu":
        out = exact * torch.erfc(-exact / math.sqrt(2)) / 2
    else:
        out = activation_module(name)(exact)
    return out.detach(), *torch.autograd.grad(out, exact, dout.double())


@WITH_AND_WITHOUT_RESIDUAL
@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_NAME
def test_error_against_float64(name, dtype, channels_last, with_residual):
    """In no stretch of the range above torch's own by more than two roundings. A slope is a
    difference of numbers of the size of 1, so its roundings are theirs."""
    x = as_map(sample(dtype), channels_last)
    dout = torch.rand_like(x) + 0.5
    # a multiple of 1/4 keeps the sum exact where the activations bend, and rounded far out and next
    # to 0
    residual = (torch.randint_like(x, -8, 9) / 4) if with_residual else None
    truth = truth_of(x, name, residual, dout)
    if with_residual and dtype in DTYPES[:2]:
        truth = truth_of(x + residual, name, None, dout)  # that rounding is everybody's
    results = run(through_link, x, name, dout, residual)
    others = run(through_torch, x, name, dout, residual)

    position = x if residual is None else x + residual
    order = position.flatten().double().argsort()
    work = torch.finfo(torch.promote_types(dtype, torch.float32))  # of the arithmetic
    size = position.double().abs()
    sizes = torch.ones_like(dout).double(), dout.double()
    for k, what in enumerate(("value", "slope")):
        own = torch.finfo(dtype).eps * (2 * truth[k].abs() + torch.finfo(dtype).tiny)
        own += 2 * work.tiny * size.clamp_min(1)  # a tail that dies away
        # the parts of a sum that may cancel
        cancels = what == "slope" or name == "gelu_tanh"
        own += 4 * work.eps * sizes[k] * cancels * size.clamp(1, 4)
        if dtype == torch.float64:  # whose roundings are in the truth too
            own *= 3
        excess = (results[k].double() - truth[k]).abs() - own
        theirs = (others[k].double() - truth[k]).abs()
        pieces = [t.flatten()[order].split(128) for t in (excess, theirs)]
        for mine, allowed in zip(*pieces, strict=True):
            assert mine.max() <= allowed.max(), what
    if with_residual:
        assert torch.equal(results[1], results[2])


@WITH_AND_WITHOUT_RESIDUAL
@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_NAME
def test_the_operator_and_the_link_are_one(name, dtype, channels_last, with_residual):
    """To the bit, also with the result saved, where ReLU's slope is read from it."""
    x = as_map(SPECIAL.to(dtype), channels_last)
    dout = torch.randn_like(x)
    residual = torch.randn_like(x) if with_residual else None
    for function, expected, options in (
        (through_layer, through_convolution_and_link, {}),
        (through_link, through_link, {"save_result": True}),
    ):
        results = run(function, x, name, dout, residual, **options)
        for mine, other in zip(results, run(expected, x, name, dout, residual), strict=True):
            assert torch.equal(mine, other)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_NAME
def test_at_the_kinks_and_far_out(name, dtype, channels_last):
    """Where the truth is 0, 1 or x itself, as it is between the kinks, so is the result to the last
    bit."""
    x = as_map(SPECIAL.to(dtype), channels_last)
    dout = torch.ones_like(x)
    truth = truth_of(x, name, None, dout)
    for mine, other in zip(run(through_link, x, name, dout), truth, strict=True):
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(
            mine, other.to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=4e-6
        )
        exact = (other == 0) | (other == 1) | (other == x)
        # a tail may die away a little later, in numbers that no sum sees
        torch.testing.assert_close(mine[exact], other[exact].to(dtype), rtol=eps, atol=eps)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_NAME
def test_nan_and_infinity_in_forward(name, dtype, channels_last):
    x = as_map(torch.tensor([NAN, INFINITY, -INFINITY, 1]).to(dtype), channels_last)
    mine, other = through_link(x, name), through_torch(x, name)
    assert torch.equal(mine.isfinite(), other.isfinite())
    assert torch.equal(mine[other.isfinite()].round(), other[other.isfinite()].round())
    assert torch.equal(mine.isnan() & x.isnan(), other.isnan() & x.isnan())


@BOTH_LAYOUTS
@pytest.mark.parametrize(
    "name", ("relu", "relu6", "leaky_relu", "elu", "hardswish", "sigmoid", "tanh")
)
def test_gradient_at_infinity(name, channels_last):
    x = as_map(torch.tensor([INFINITY, -INFINITY, 1, -1]), channels_last)
    dout = torch.ones_like(x)
    _, mine = run(through_layer, x, name, dout)
    _, other = run(through_torch, x, name, dout)
    finite = other.isfinite()
    assert torch.equal(mine[finite].isfinite(), finite[finite])
    torch.testing.assert_close(mine[finite], other[finite])


@pytest.mark.parametrize("parameter", (0.0, 1e-300, 1e20, 0.1 + 0.2, -1.5, 1 / 3))
@pytest.mark.parametrize("kind", (nn.LeakyReLU, nn.ELU))
def test_parameters_are_the_same_number_all_the_way(kind, parameter):
    name = activation_name(kind(parameter))
    module = activation_module(name)
    assert type(module) is kind
    assert vars(module).get("negative_slope", vars(module).get("alpha")) == parameter
    x = as_map(torch.linspace(-3, 3, 97, dtype=torch.float64), False)
    dout = torch.randn_like(x)
    for mine, other in zip(
        run(through_layer, x, name, dout), run(through_torch, x, name, dout), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (None, "none"),
        (nn.Identity(), "none"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
        (nn.LeakyReLU(1), "leaky_relu(1.0)"),
        (nn.LeakyReLU(torch.tensor(0.25)), "leaky_relu(0.25)"),
        (nn.ELU(1e20, inplace=True), "elu(1e+20)"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.Mish(), "mish"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
    ],
    ids=str,
)
def test_modules_and_names(module, name):
    assert activation_name(module) == name
    assert FusedConvBN2d(2, 4, 3, activation=module).activation == name
    assert activation_name(activation_module(name)) == name
    if module is not None:
        x = torch.randn(50)
        assert torch.equal(activation_module(name)(x), copy.deepcopy(module)(x.clone()))


def test_one_list_of_names():
    """The table of csrc/kernels/activation.h, in its order, which numbers them in a packed
    chain."""
    assert torch.ops.fusedconvbn._activations() == list(ACTIVATIONS)
    for name, activation in ACTIVATIONS.items():
        if activation.parameter:
            x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
            usual, written = (
                FusedConvBN2d(3, 4, 1, activation=a).double().requires_grad_(False)
                for a in (name, activation.spelled(activation.default))
            )
            written.load_state_dict(usual.state_dict())
            torch.testing.assert_close(usual(x), written(x), rtol=0, atol=0)


def test_every_name_has_its_module():
    for name in ACTIVATIONS:
        assert activation_name(name) == name
        assert activation_name(activation_module(name)).partition("(")[0] == name


class OwnForward(nn.ReLU):
    def forward(self, input):
        return input.abs()


class SameForward(nn.LeakyReLU):
    """Of another name, but what it computes is nn.LeakyReLU's."""


def test_a_subclass():
    assert activation_name(SameForward(0.3)) == "leaky_relu(0.3)"
    with pytest.raises(ValueError, match=r"expected activation None.*got OwnForward\(\)"):
        FusedConvBN2d(2, 4, 3, activation=OwnForward())


BAD_NAMES = (
    *("", "Relu", "relu ", "relu(0.1)", "leaky_relu()", "leaky_relu(", "leaky_relu(0.1"),
    *("leaky_relu(x)", "leaky_relu(0.1))", "elu(0.1)x", "leaky_relu( 0.1)", "elu(1_0)", "elu(+1)"),
    *("leaky_relu(nan)", "elu(inf)", "leaky_relu(1e999)", "gelu(tanh)", "swish"),
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(name):
    """By the layer when it is made, by the operator when it is called."""
    with pytest.raises(ValueError, match="expected activation None"):
        FusedConvBN2d(2, 4, 3, activation=name)
    with pytest.raises(ValueError, match="expected activation to be one of"):
        conv_bn(torch.zeros(2, 2, 5, 5), torch.zeros(4, 2, 3, 3), activation=name)


@pytest.mark.parametrize(
    "activation",
    (
        F.relu,
        nn.ReLU,
        nn.Sequential(nn.ReLU()),
        nn.Softplus(),
        nn.LeakyReLU(NAN),
        nn.ELU(INFINITY),
        1,
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),  # no addresses: xdist compares
)
def test_what_is_no_activation(activation):
    with pytest.raises(ValueError, match="expected activation None"):
        FusedConvBN2d(2, 4, 3, activation=activation)
