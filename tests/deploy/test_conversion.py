"""fold: the network that eval mode computes, in plain modules."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from deployed import ACTIVATIONS, Activations, Network, random_statistics
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import fusedconvbn
from fusedconvbn import FusedConvBN, FusedConvBN2d, FusedConvTransposeBN2d, fold

# layer, its arguments, shape of the input
LAYERS = {
    "1d": ("ConvBN1d", dict(bias=True, stride=2, padding=1), (2, 4, 11)),
    "1d same": ("ConvBN1d", dict(kernel_size=4, padding="same", dilation=3), (2, 4, 11)),
    "2d": ("ConvBN2d", dict(kernel_size=(3, 2), groups=2, padding=(2, 0)), (2, 4, 7, 5)),
    "2d not affine": ("ConvBN2d", dict(affine=False, bias=True, eps=0.3), (2, 4, 7, 5)),
    "2d valid": ("ConvBN2d", dict(padding="valid", stride=(2, 1)), (2, 4, 7, 5)),
    "2d reflect": ("ConvBN2d", dict(padding=(2, 1), padding_mode="reflect"), (2, 4, 7, 5)),
    "2d replicate": ("ConvBN2d", dict(padding=1, padding_mode="replicate"), (2, 4, 7, 5)),
    "2d circular same": (
        "ConvBN2d",
        dict(kernel_size=4, padding="same", padding_mode="circular"),
        (2, 4, 7, 6),
    ),
    "3d": ("ConvBN3d", dict(kernel_size=(2, 3, 1), padding=(1, 0, 2)), (2, 4, 4, 5, 3)),
    "transposed 1d": ("ConvTransposeBN1d", dict(stride=2, output_padding=1), (2, 4, 5)),
    "transposed 2d": (
        "ConvTransposeBN2d",
        dict(stride=(2, 3), padding=1, groups=2, bias=True, dilation=(1, 2)),
        (2, 4, 5, 3),
    ),
    "transposed 3d": ("ConvTransposeBN3d", dict(kernel_size=2, groups=2), (2, 4, 2, 3, 2)),
}


def build(name, activation=None, dtype=torch.float64):
    """A layer in training mode, and an input."""
    kind, options, shape = LAYERS[name]
    options = {"kernel_size": 3, **options}
    layer = getattr(fusedconvbn, f"Fused{kind}")(4, 6, **options, activation=activation)
    return random_statistics(layer).to(dtype), torch.randn(shape, dtype=dtype)


def plain(module):
    """Whether there is nothing in it that has a kernel of its own, or a batch norm."""
    return not [
        m
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase) or type(m).__name__.startswith("Fused")
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name):
    layer, x = build(name)
    before = copy.deepcopy(layer.state_dict())
    folded = fold(layer)
    assert layer.training
    assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert type(folded) is type(layer.conv)
    assert (folded.stride, folded.groups) == (layer.conv.stride, layer.conv.groups)
    assert not folded.training
    assert_close(folded(x), layer.eval()(x))
    shared = {t.data_ptr() for t in layer.state_dict().values()}
    assert not shared & {t.data_ptr() for t in folded.state_dict().values()}


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("name", ("1d", "2d", "transposed 2d"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(activation, name, residual):
    layer, x = build(name, activation)
    model = nn.ModuleList([layer])  # in a model, as its code may pass a residual
    before = pickle.dumps(model)
    folded = fold(model, keep_signature=residual)[0]
    assert plain(folded)
    assert residual or all(type(m).__module__.startswith("torch.nn.") for m in folded.modules())
    out = layer.eval()(x)
    more = {"residual": torch.randn_like(out)} if residual else {}
    assert_close(folded(x, **more), layer(x, **more))
    assert_close(torch.jit.script(folded)(x, **more), layer(x, **more))
    assert before == pickle.dumps(model.train())


def test_output_size_of_a_transposed_layer():
    layer = random_statistics(FusedConvTransposeBN2d(3, 4, 3, stride=2, activation="relu")).eval()
    x = torch.randn(2, 3, 4, 5)
    for size in ([9, 11], [10, 12]):
        folded = fold(layer, keep_signature=True)
        assert_close(folded(x, size), layer(x, size))
        residual = torch.randn(2, 4, *size)
        assert_close(folded(x, size, residual), layer(x, size, residual))


@pytest.mark.parametrize("name", ("2d", "transposed 2d"))
@pytest.mark.parametrize(
    ("dtype", "bn_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
)
def test_rounds_the_weight_once(name, dtype, bn_dtype):
    layer, x = build(name, dtype=dtype)
    layer.bn.to(bn_dtype)
    exact = fold(copy.deepcopy(layer).double())
    folded = fold(layer)
    for p, q in zip(folded.parameters(), exact.parameters(), strict=True):
        assert p.dtype == dtype
        assert_close(p.double(), q, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)
    assert folded(x).dtype == dtype


@pytest.mark.parametrize("name", ("2d", "transposed 2d"))
def test_keeps_the_memory_format(name):
    layer, _ = build(name)
    folded = fold(layer.to(memory_format=torch.channels_last))
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)


class Nested(nn.Module):
    """A layer in two places, one of them a Python list; a weight that two layers share; layers in
    containers."""

    def __init__(self):
        super().__init__()
        self.first = FusedConvBN2d(3, 4, 3, padding=1, activation=nn.SiLU())
        self.again = self.first
        self.blocks = nn.ModuleDict(
            {"a": nn.Sequential(FusedConvBN2d(4, 3, 1), nn.Dropout(0.9)), "b": Network()}
        )
        self.tied = FusedConvBN2d(3, 4, 3, padding=1)
        self.tied.conv.weight = self.first.conv.weight
        self.order = [self.first, self.blocks["a"], self.again]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.blocks["b"](self.blocks["a"](x + self.tied(self.blocks["a"](x))))


def test_a_nested_model():
    model = random_statistics(Nested())
    folded = fold(model, keep_signature=True)
    assert plain(folded)
    assert folded.first is folded.again is folded.order[0]
    assert folded.tied.conv.weight is not folded.first.conv.weight
    x = torch.randn(2, 3, 7, 6)
    assert model.training
    assert model.first is model.again is model.order[0]
    assert isinstance(model.first, FusedConvBN2d)
    assert not any(m.training for m in folded.modules())
    assert_close(folded(x), model.eval()(x))
    saved = io.BytesIO()
    torch.save(folded, saved)
    saved.seek(0)
    assert_close(torch.load(saved, weights_only=False)(x), model(x))


def test_state_dict_goes_from_one_folded_model_to_another():
    one, other = (
        fold(model, keep_signature=True)
        for model in (random_statistics(Activations()), Activations())
    )
    x = torch.randn(2, 4, 7, 6)
    other.load_state_dict(one.state_dict())
    assert_close(other(x), one(x), rtol=0, atol=0)


def test_a_plain_result_is_loaded_without_this_package(tmp_path):
    model = random_statistics(nn.Sequential(FusedConvBN2d(3, 4, 3, activation="silu")))
    x = torch.randn(2, 3, 5, 6)
    torch.save((fold(model), x, model.eval()(x)), tmp_path / "folded.pt")
    code = (
        "import sys, torch; folded, x, y = torch.load(sys.argv[1], weights_only=False); "
        "torch.testing.assert_close(folded(x), y); assert 'fusedconvbn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "folded.pt")], check=True)


def test_a_residual_needs_the_signature():
    layer, x = build("2d", "relu")
    with pytest.raises(TypeError, match="residual"):
        fold(layer)(x, residual=x)


def test_a_model_without_fused_layers_is_copied():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folded = fold(model)
    assert repr(folded) == repr(model)
    assert folded[0] is not model[0]
    assert not folded.training


def test_parametrized_weights():
    layer = FusedConvBN2d(3, 4, 3, activation="relu").double()
    parametrizations.weight_norm(layer.conv)
    other = FusedConvTransposeBN2d(4, 5, 2).double()
    parametrizations.spectral_norm(other.conv)
    model = random_statistics(nn.Sequential(layer, other))
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)  # no power iteration
    assert all(not nn.utils.parametrize.is_parametrized(m) for m in folded.modules())
    assert all(p.requires_grad for p in folded.parameters())
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert_close(folded(x), model.eval()(x))


def test_a_synchronised_batch_norm():
    model = nn.Sequential(FusedConvBN2d(3, 4, 3, activation="relu"), FusedConvBN2d(4, 5, 1))
    model = random_statistics(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    assert "synchronised" in repr(model[0])
    folded, x = fold(model), torch.randn(2, 3, 5, 6)
    assert plain(folded)
    assert_close(folded(x), model.eval()(x))


def test_a_frozen_layer_stays_frozen():
    model = nn.Sequential(FusedConvBN2d(3, 4, 3), FusedConvBN2d(4, 5, 1))
    model[0].requires_grad_(False)
    assert [p.requires_grad for p in fold(model).parameters()] == [False, False, True, True]


class Features(nn.Module):
    """Collects what its layer returns, by a hook that is a method of its own."""

    def __init__(self):
        super().__init__()
        self.layer = FusedConvBN2d(3, 4, 3)
        self.layer.register_forward_hook(self.collect)
        self.layer.register_forward_pre_hook(self.double, with_kwargs=True)
        self.seen = []

    def collect(self, module, arguments, output):
        self.seen.append(output)

    def double(self, module, arguments, keywords):
        return (2 * arguments[0],), keywords

    def forward(self, x):
        return self.layer(x).relu()


def test_forward_hooks_stay():
    model, x = random_statistics(Features()), torch.randn(2, 3, 5, 6)
    folded = fold(model)
    assert_close(folded(x), model.eval()(x))
    assert len(folded.seen) == len(model.seen) == 1
    assert_close(folded.seen[0], model.seen[0])


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (FusedConvBN2d(3, 4, 3, track_running_stats=False), "FusedConvBN2d"),
        (
            nn.Sequential(nn.Identity(), FusedConvBN2d(3, 4, 3, track_running_stats=False)),
            "FusedConvBN2d '1'",
        ),
        (nn.ModuleDict({"tutorial": FusedConvBN(3, 4, 3)}), "FusedConvBN 'tutorial'"),
    ],
)
def test_needs_running_statistics(model, where):
    with pytest.raises(ValueError, match=f"expected {where} to have running statistics, got none"):
        fold(model)


class Own(FusedConvBN2d):
    def forward(self, input, residual=None):
        return super().forward(input.abs(), residual)


class Initialised(FusedConvBN2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1, activation="gelu")


def test_refuses_a_layer_with_a_forward_of_its_own():
    with pytest.raises(ValueError, match=r"expected Own '0' to run the forward of a fused layer"):
        fold(nn.Sequential(Own(3, 4, 3)))
    x = torch.randn(2, 3, 4, 5)
    layer = random_statistics(Initialised(3)).eval()
    assert_close(fold(layer)(x), layer(x))


def test_refuses_a_scripted_model():
    scripted = torch.jit.script(FusedConvBN2d(3, 4, 3))
    with pytest.raises(TypeError, match=r"a model to script afterwards, got the scripted .* '0'"):
        fold(nn.Sequential(scripted))
