"""The layers against nn.Conv* → nn.BatchNorm* → nn.ReLU."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fusedconvbn
from fusedconvbn import (
    FusedConvBN,
    FusedConvBN2d,
    FusedConvBNSequential,
    fold,
    fuse,
    reference,
)

# layer, arguments of the convolution, of the batch norm, the input's shape
LAYERS = {
    "1d": ("ConvBN1d", (4, 6, 3), dict(stride=2, padding=1), {}, (3, 4, 11)),
    "1d same, even kernel": ("ConvBN1d", (4, 6, 4), dict(padding="same"), {}, (3, 4, 11)),
    "2d": ("ConvBN2d", (4, 6, (3, 2)), dict(padding=(1, 0), bias=True), {}, (3, 4, 7, 5)),
    "2d valid": ("ConvBN2d", (4, 6, 3), dict(padding="valid"), {}, (3, 4, 7, 5)),
    "2d same, dilated": (
        "ConvBN2d",
        (4, 6, (2, 3)),
        dict(padding="same", dilation=(3, 2)),
        {},
        (2, 4, 7, 5),
    ),
    "2d reflect": (
        "ConvBN2d",
        (4, 6, 3),
        dict(padding=(2, 1), padding_mode="reflect"),
        {},
        (2, 4, 7, 5),
    ),
    "2d circular same": (
        "ConvBN2d",
        (4, 6, 4),
        dict(padding="same", padding_mode="circular"),
        {},
        (2, 4, 7, 6),
    ),
    "2d replicate": (
        "ConvBN2d",
        (4, 6, 3),
        dict(padding=1, padding_mode="replicate", groups=2),
        {},
        (2, 4, 7, 5),
    ),
    "2d not affine": ("ConvBN2d", (4, 6, 3), {}, dict(affine=False), (2, 4, 7, 5)),
    "2d no statistics": ("ConvBN2d", (4, 6, 3), {}, dict(track_running_stats=False), (2, 4, 7, 5)),
    "2d cumulative average": ("ConvBN2d", (4, 6, 3), {}, dict(momentum=None), (2, 4, 7, 5)),
    "2d momentum and eps": ("ConvBN2d", (4, 6, 3), {}, dict(momentum=0.4, eps=0.3), (2, 4, 7, 5)),
    "3d": ("ConvBN3d", (3, 5, (2, 3, 1)), dict(padding=(1, 0, 2)), {}, (2, 3, 4, 5, 3)),
    "transposed 1d": (
        "ConvTransposeBN1d",
        (4, 6, 3),
        dict(stride=2, output_padding=1),
        {},
        (2, 4, 5),
    ),
    "transposed 2d": (
        "ConvTransposeBN2d",
        (4, 6, 3),
        dict(stride=(2, 3), padding=1, groups=2, bias=True, dilation=(1, 2)),
        {},
        (2, 4, 5, 3),
    ),
    "transposed 3d": ("ConvTransposeBN3d", (4, 2, 2), dict(stride=2), {}, (2, 4, 2, 3, 2)),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def build(name, activation="relu"):
    """The fused layer and the unfused one, in float64 and with the same parameters."""
    kind, sizes, conv_options, bn_options, shape = LAYERS[name]
    layer = getattr(fusedconvbn, f"Fused{kind}")(
        *sizes, **conv_options, **bn_options, activation=activation
    )
    conv = getattr(nn, kind.replace("BN", ""))(*sizes, **{"bias": False, **conv_options})
    bn = getattr(nn, f"BatchNorm{kind[-2:]}")(sizes[1], **bn_options)
    unfused = nn.Sequential(conv, bn, nn.ReLU() if activation else nn.Identity()).double()
    layer.double()
    for p in layer.bn.parameters():
        nn.init.normal_(p)
    keys = {"conv": "0", "bn": "1"}
    state = {keys[k.split(".")[0]] + k[k.index(".") :]: v for k, v in layer.state_dict().items()}
    unfused.load_state_dict(state)  # every key fits
    return layer, unfused, torch.randn(shape, dtype=torch.float64)


@EVERY_LAYER
def test_trains_and_evaluates_as_the_unfused_layers(name, device):
    layer, unfused, x = (t.to(device) for t in build(name))
    for step in range(3):
        results = []
        for model in (layer, unfused):
            leaf = (x + step).requires_grad_()
            out = model(leaf)
            grads = torch.autograd.grad(out.square().sum(), [leaf, *model.parameters()])
            results.append([out.detach(), *grads])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    mine, theirs = list(layer.buffers()), list(unfused.buffers())
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    layer.eval(), unfused.eval()
    torch.testing.assert_close(layer(x), unfused(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(layer.buffers()), theirs, rtol=1e-12, atol=1e-12)


@EVERY_LAYER
def test_scripted_layer_is_the_eager_layer(name):
    layer, _, x = build(name)
    scripted = torch.jit.script(copy.deepcopy(layer))
    for step in range(3):
        out, expected = scripted(x + step), layer(x + step)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.sum(), list(scripted.parameters()))
        expected = torch.autograd.grad(expected.sum(), list(layer.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(scripted.buffers(), layer.buffers(), strict=True))
    scripted.eval(), layer.eval()
    assert torch.equal(scripted(x), layer(x))


@pytest.mark.parametrize("activation", (None, "none", nn.ReLU(), nn.ReLU(inplace=True)))
def test_from_modules_shares_parameters_and_buffers(activation):
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    layer = FusedConvBN2d.from_modules(conv, bn, activation)
    assert layer.conv is conv
    assert layer.bn is bn
    x = torch.randn(2, 3, 6, 5)
    expected = F.batch_norm(conv(x), None, None, bn.weight, bn.bias, training=True)
    if isinstance(activation, nn.ReLU):
        expected = expected.relu()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert bn.num_batches_tracked == 1
    assert isinstance(layer, FusedConvBN2d)


def test_a_batch_norm_that_is_frozen_alone():
    layer, unfused, x = build("2d")
    layer.train(), unfused.train()
    layer.bn.eval(), unfused[1].eval()
    torch.testing.assert_close(layer(x), unfused(x))
    assert layer.bn.num_batches_tracked == 0


@EVERY_LAYER
def test_copies_and_pickles(name):
    layer, _, x = build(name)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    expected = layer(x)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert other.conv.weight is not layer.conv.weight


def test_constructor_is_that_of_the_two_modules():
    layer = FusedConvBN2d(3, 8, 5, 2, 1, 1, 1, True, "zeros", 1e-4, 0.2, False, False, "relu")
    assert (layer.conv.stride, layer.conv.bias is not None) == ((2, 2), True)
    assert (layer.bn.eps, layer.bn.momentum, layer.bn.affine) == (1e-4, 0.2, False)
    assert not layer.bn.track_running_stats
    meta = FusedConvBN2d(3, 8, 5, device="meta", dtype=torch.bfloat16)
    assert {p.dtype for p in meta.parameters()} == {torch.bfloat16}
    assert all(p.is_meta for p in meta.parameters())
    assert "activation=relu" in repr(layer)
    assert "Conv2d(3, 8" in repr(layer)


def test_moves_and_casts_like_any_module():
    layer = (
        FusedConvBN2d(3, 4, 3, activation="relu").bfloat16().to(memory_format=torch.channels_last)
    )
    x = torch.randn(2, 3, 6, 5).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.bn.running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("output_size", ([9, 9], [10, 10], [2, 6, 9, 11]))
def test_output_size_of_a_transposed_layer(output_size):
    layer, unfused, x = build("transposed 2d")
    size = output_size[-2:]
    expected = unfused[2](unfused[1](unfused[0](x, size)))
    assert layer(x, output_size).shape == expected.shape
    torch.testing.assert_close(layer(x, output_size), expected)


class TestTutorialLayer:
    def test_is_the_reference_of_the_tutorial(self):
        layer = FusedConvBN(2, 4, 3, dtype=torch.float64)
        x = torch.randn(3, 2, 7, 6, dtype=torch.float64, requires_grad=True)
        results = []
        for function in (
            layer,
            lambda x: reference.FusedConvBN2DFunction.apply(x, layer.conv_weight, 1e-3),
            lambda x: reference.BatchNorm.apply(reference.Conv2D.apply(x, layer.conv_weight), 1e-3),
        ):
            out = function(x)
            grads = torch.autograd.grad(out.sin().sum(), (x, layer.conv_weight))
            results.append([out.detach(), *grads])
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-9)

    def test_uses_the_batch_in_eval_mode_too(self):
        layer, x = FusedConvBN(2, 4, 3), torch.randn(3, 2, 7, 6)
        assert torch.equal(layer(x), layer.eval()(x))

    def test_signature_and_state(self):
        layer = FusedConvBN(2, 4, 3, 0.2, 1e-2, "cpu", torch.float64)
        assert list(layer.state_dict()) == ["conv_weight"]
        assert layer.conv_weight.shape == (4, 2, 3, 3)
        assert (layer.exp_avg_factor, layer.eps) == (0.2, 1e-2)
        assert "eps=0.01" in repr(layer)
        assert torch.equal(torch.jit.script(layer)(x := torch.randn(2, 2, 5, 5).double()), layer(x))

    def test_a_constant_channel_has_a_finite_gradient(self):
        layer = FusedConvBN(2, 4, 3, dtype=torch.float64)
        with torch.no_grad():
            layer.conv_weight[1] = 0
        x = torch.randn(3, 2, 7, 6, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        (expected,) = torch.autograd.grad(
            reference.FusedConvBN2DFunction.apply(x, layer.conv_weight, 1e-3).square().sum(), x
        )
        torch.testing.assert_close(grad, expected)


# ---------------------------------------------------------------------------- hooks on the children


def pruned(child):
    prune.l1_unstructured(child, "weight", 0.5)


def weight_normed(conv):
    nn.utils.weight_norm(conv)


def spectrally_normed(conv):
    nn.utils.spectral_norm(conv)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("child", "change"),
    (("conv", pruned), ("conv", weight_normed), ("conv", spectrally_normed), ("bn", pruned)),
)
def test_utilities_that_make_a_parameter_before_a_call(child, change):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 5)
    fused = FusedConvBN2d(3, 8, 3, activation="relu")
    nn.init.normal_(fused.bn.weight)
    eager = nn.ModuleDict({"conv": copy.deepcopy(fused.conv), "bn": copy.deepcopy(fused.bn)})
    for model in (fused, eager):
        torch.manual_seed(1)
        change(getattr(model, child))
    calls = {fused: fused, eager: lambda x: eager["bn"](eager["conv"](x)).relu()}
    for training in (True, True, False):
        results = []
        for model, call in calls.items():
            model.train(training)
            optimiser = torch.optim.SGD(model.parameters(), 0.5)
            optimiser.zero_grad()
            out = call(x)
            out.square().mul(torch.arange(12.0).view(4, 3)).mean().backward()
            optimiser.step()
            results.append([out, *(p.grad for p in model.parameters())])
        for got, due in zip(*results, strict=True):
            torch.testing.assert_close(got, due)
    for (name, t), (_, due) in zip(
        fused.state_dict().items(), eager.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(t, due, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", (pruned, weight_normed))
def test_utilities_on_modules_of_a_sequential(change):
    x, block = torch.randn(4, 3, 6, 5), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    fused = FusedConvBNSequential(*copy.deepcopy(block))
    for model in (block, fused):
        change(model[0])
    results = []
    for model in (block, fused):
        optimiser = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().mul(torch.arange(12.0).view(4, 3)).mean().backward()
            optimiser.step()
        results.append(model.eval()(x))
    torch.testing.assert_close(*results)
    with pytest.raises(TypeError, match="without forward_pre_hooks to be scripted"):
        torch.jit.script(fused)
    fused[1].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(
        TypeError, match="FusedConvBNSequential: expected module '1' without forward"
    ):
        fused(x)


def test_folding_makes_the_parameters_anew():
    layer = FusedConvBN2d(3, 4, 3).eval()
    with torch.no_grad():
        prune.l1_unstructured(layer.conv, "weight", 0.5)
        layer.conv.weight_orig.mul_(2)
        x = torch.randn(2, 3, 6, 5)
        layer.conv.weight = layer.conv.weight.detach()
        torch.testing.assert_close(fold(layer)(x), layer(x))


def test_other_hooks_in_front_of_the_children():
    layer, x = FusedConvBN2d(3, 4, 3), torch.randn(2, 3, 6, 5)
    expected = layer(2 * x + 1)
    layer.conv.register_forward_pre_hook(lambda module, args: args[0] + 1)
    layer.conv.register_forward_pre_hook(
        lambda module, args, kwargs: ((2 * args[0],), kwargs), prepend=True, with_kwargs=True
    )
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError, match="without forward_pre_hooks to be scripted"):
        torch.jit.script(layer)
    before = copy.deepcopy(layer.state_dict())
    layer.bn.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(TypeError, match=r"FusedConvBN2d: expected bn without forward_pre_hooks"):
        layer(x)
    for name, t in layer.state_dict().items():
        torch.testing.assert_close(t, before[name])


def test_lazy_modules_are_refused_where_they_are_given():
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    lazy_conv, lazy_bn = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()
    for given in ((lazy_conv, bn), (conv, lazy_bn)):
        with pytest.raises(TypeError, match=r"expected (conv|bn) with parameters, got a lazy Lazy"):
            FusedConvBN2d.from_modules(*given)
        with pytest.raises(TypeError, match=r"expected module '[01]' with parameters, got a lazy"):
            FusedConvBNSequential(*given)
        with pytest.raises(TypeError, match=r"fuse: expected '[01]' with parameters, got a lazy"):
            fuse(nn.Sequential(*given), torch.randn(2, 3, 6, 5))
    both = nn.Sequential(lazy_conv, lazy_bn)
    both(torch.randn(2, 3, 6, 5))
    assert FusedConvBN2d.from_modules(*both)(torch.randn(2, 3, 6, 5)).shape == (2, 4, 4, 3)
