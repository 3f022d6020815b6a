"""fuse(model): what is found, however it is written."""

import math

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, chains, conv, doubled, image, model, pair, same, saved, unit
from torch import nn
from torch.nn.utils import parametrizations, prune

from fusedconvbn import explain, fuse

FIRST = "conv → bn"


def test_a_block_with_functional_activations_and_an_addition_in_place():
    same(Block(), image())
    assert chains(Block(), image()) == ["conv1 → bn1 → conv2 → bn2 → conv3 → bn3"]


@pytest.mark.parametrize("memory", ("auto", "min", 0.9, 0.4))
def test_every_budget(memory):
    same(nn.Sequential(Block(), Block(), nn.AvgPool2d(2)), image(), memory=memory)


ACTIVATIONS = {
    "relu": (
        *(nn.ReLU(), F.relu, torch.relu, lambda x: x.relu_(), lambda x: x.clamp(min=0)),
        *(
            lambda x: torch.clamp(x, 0),
            lambda x: x.clamp_min_(0),
            lambda x: F.hardtanh(x, 0, math.inf),
        ),
    ),
    "relu6": (
        *(nn.ReLU6(inplace=True), F.relu6, lambda x: F.hardtanh(x, 0.0, 6.0)),
        *(lambda x: x.clamp(0, 6), lambda x: torch.clamp(x, min=0.0, max=6.0), nn.Hardtanh(0, 6)),
    ),
    "leaky_relu": (nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU(inplace=True)),
    "elu": (nn.ELU(0.7), lambda x: F.elu(x, alpha=0.7), F.elu),
    "silu": (
        *(nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, inplace=True)),
        *(lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x, lambda x: x.mul_(x.sigmoid())),
    ),
    "hardswish": (
        *(nn.Hardswish(), F.hardswish, lambda x: x * F.hardsigmoid(x)),
        *(lambda x: x * F.relu6(x + 3) / 6, lambda x: x * (F.relu6(3.0 + x, inplace=True) / 6.0)),
        *(lambda x: x * (x + 3).clamp(0, 6) * (1 / 6), lambda x: x * nn.ReLU6()(x + 3).div_(6)),
    ),
    "gelu": (
        *(nn.GELU(), F.gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
        lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    ),
    "gelu_tanh": (nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "mish": (nn.Mish(), F.mish, lambda x: x * torch.tanh(F.softplus(x))),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()),
    "tanh": (nn.Tanh(), torch.tanh, lambda x: x.tanh_()),
    "prelu": (nn.PReLU(), nn.PReLU(5, 0.1), lambda x: x.prelu(x.new_tensor([0.2]))),
}


class Activated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn = conv(8, 5), nn.BatchNorm2d(5)
        self.between, self.activation = nn.Sequential(nn.Identity(), nn.Dropout(0.0)), activation
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.last(self.activation(self.between(self.bn(self.conv(x)))))


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("name", "spelling"),
    [(name, i) for name, spellings in ACTIVATIONS.items() for i in range(len(spellings))],
)
def test_activations(name, spelling):
    made, x = Activated(ACTIVATIONS[name][spelling]), image(3, 8, 24, 20)
    rough = name == "hardswish"  # PyTorch's hardsigmoid has float constants
    same(made, x, memory="min", tolerance=1e-5 if rough else 1e-9)
    x = x.double()  # nothing but the input, and a few vectors
    assert explain(made, x, memory="min").least < x.nbytes + (3 << 10)


def test_what_looks_like_an_activation_and_is_none():
    for wrong in (
        *(
            lambda x: x * F.relu6(x + 3) / 5,
            lambda x: x * torch.sigmoid(x + 1),
            lambda x: x.clamp(1, 6),
        ),
        *(lambda x: x * torch.sigmoid(x * 2), lambda x: x * torch.tanh(F.softplus(x, beta=2))),
        *(
            lambda x: (g := torch.sigmoid(x)) * x + g,
            lambda x: F.hardtanh(x),
            lambda x: x + torch.sigmoid(x),
        ),
        lambda x: x * 0.5 * (1 + torch.erf(x)),
    ):
        same(Activated(wrong), image(), less=False)


# What stands for a convolution and its batch norm; each is one chain.
class OwnConv(nn.Conv2d):
    """A convolution with its norm and activation in one, as detection libraries have it."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding)))


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm with its activation in one."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return F.silu(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        x = F.conv2d(x, self.weight / self.weight.norm(), padding="same")
        x = F.batch_norm(x, self.mean, self.var, self.scale, self.shift, self.training, 0.2)
        return x.relu()


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def pruned():
    made = unit()
    prune.l1_unstructured(made[0], "weight", 0.5)
    return made


def even_kernel():
    return nn.Sequential(nn.Conv2d(8, 8, (2, 4), padding="same"), nn.BatchNorm2d(8), nn.ReLU())


PAIRS = {
    "norm in the convolution": OwnConv,
    "activation in the norm": lambda: nn.Sequential(conv(8, 8), BatchNormAct(8)),
    "functions": Functional,
    "standardised": lambda: nn.Sequential(Standardised(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
    "weight_norm": lambda: nn.Sequential(
        parametrizations.weight_norm(conv(8, 8)), nn.BatchNorm2d(8)
    ),
    "spectral_norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(conv(8, 8)), nn.BatchNorm2d(8)
    ),
    "old weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(conv(8, 8)), nn.BatchNorm2d(8)),
    "pruned": pruned,
    "cumulative average": lambda: nn.Sequential(
        conv(8, 8), nn.BatchNorm2d(8, momentum=None), nn.ReLU()
    ),
    "no statistics": lambda: nn.Sequential(
        conv(8, 8), nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "no affine": lambda: nn.Sequential(conv(8, 8, bias=True), nn.BatchNorm2d(8, affine=False)),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)
    ),
    "grouped": lambda: nn.Sequential(
        conv(8, 8, groups=4, dilation=2, stride=2), nn.BatchNorm2d(8), nn.ELU()
    ),
    "reflected": lambda: nn.Sequential(
        conv(8, 8, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "padded by name": even_kernel,
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(unit()),
    "a list": lambda: model(
        lambda self, x: [f := self.c[0](x), self.c[1](f)][1], c=nn.ModuleList(unit()[:2])
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    def make():
        torch.manual_seed(0)
        return PAIRS[name]().double()

    if name != "synchronised":  # which eager refuses on CPU
        for train in (True, False):
            fused = fuse(make().train(train), doubled(image()), inplace=True)
            same(make(), image(), train=train, fused=fused)
    report = explain(make(), doubled(image()))
    assert report.fused_pairs == report.pairs == len(report.chains) == 1, report


def test_a_synchronised_batch_norm_is_a_batch_norm_where_there_is_one_process():
    made = nn.Sequential(unit(), unit())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(made)
    fused = fuse(made, image())  # a copy of what is converted afterwards
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    plain = nn.Sequential(unit(), unit())
    plain.load_state_dict(synchronised.state_dict())
    x = image()
    torch.testing.assert_close(fused(x), plain(x))
    assert saved(fused, x) < saved(plain, x)


def test_a_batch_norm_before_its_convolution():
    def forward(self, x):
        out = self.conv(F.relu(self.bn(x)))
        return x + self.conv2(F.relu(self.bn2(out)))

    made = model(forward, **pair(), bn2=nn.BatchNorm2d(8), conv2=conv(8, 8))
    same(made, image(), memory="min")
    assert chains(made, doubled(image())) == ["bn → conv → bn2 → conv2"]


def test_one_convolution_with_a_batch_norm_for_each_level():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(8, 8), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

        def forward(self, a, b):
            return [F.silu(bn(self.conv(x))) for x, bn in zip((a, b), self.bn, strict=True)]

    inputs = image(2, 8, 16, 16), image(2, 8, 8, 8)
    same(Head(), *inputs, memory="min")
    assert chains(Head(), *inputs) == ["conv → bn.0", "conv:2 → bn.1"]


@pytest.mark.parametrize("in_place", (False, True))
def test_branches_that_are_added(in_place):
    """RepVGG, and MobileOne: each a chain, the last with the others as its residual."""

    def forward(self, x):
        if not in_place:
            return F.relu(self.wide(x) + self.narrow(x) + self.bn(x))
        out = 0
        for branch in (self.wide, self.narrow, self.bn):
            out += branch(x)
        out += 0
        return out.relu_()

    wide, narrow = (nn.Sequential(conv(8, 8, k), nn.BatchNorm2d(8)) for k in (3, 1))
    made, x = model(forward, wide=wide, narrow=narrow, bn=nn.BatchNorm2d(8)), image(3, 8, 24, 20)
    same(made, x, memory="min")
    report = explain(made, x.double(), memory="min")
    assert report.least < 2 * x.double().nbytes + (4 << 10), "the input and the result"


def test_what_is_used_twice_ends_a_chain():
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.bn(y)) + y

    made = model(forward, **pair())
    same(made, image())
    report = explain(made, doubled(image()))
    assert [c.name for c in report.chains] == ["bn"]
    assert report.fused_pairs == 0 and "used elsewhere" in report.refused["bn"]


@pytest.mark.parametrize(
    ("forward", "pairs"),
    [
        (lambda self, x: self.bn(self.conv(self.conv(x))), 1),
        (lambda self, x: F.relu(self.bn(self.conv(self.bn(x)))), 1),
    ],
    ids=("convolution", "batch norm"),
)
def test_shared_modules(forward, pairs):
    made = model(forward, **pair())
    same(made, image())
    report = explain(made, doubled(image()))
    assert report.fused_pairs == pairs, report


def test_no_pair_and_its_reason():
    made = model(lambda self, x: self.bn(x) * 2, bn=nn.BatchNorm2d(8))
    with pytest.warns(UserWarning, match="nothing of Model is fused, none of its 1 batch norms"):
        same(made, image(), less=False)
    assert (
        "neither a convolution nor an activation" in explain(made, doubled(image())).refused["bn"]
    )
    with pytest.warns(UserWarning, match="it runs no batch norm"):
        fuse(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))


def test_little_gain_is_said():
    def forward(self, x):
        for _ in range(9):
            x = x.sin()
        return x + self.a(x)

    with pytest.warns(UserWarning, match="of eager's bytes for these inputs"):
        fuse(model(forward, a=unit(8, 1)), image().requires_grad_())


def test_the_residual_may_be_broadcast_or_larger():
    def forward(self, x, shift):
        return F.silu(self.bn(self.conv(x)) + shift)

    for shape in ((8, 1, 1), (3, 8, 7, 6), (1, 8, 1, 6), (2, 1, 3, 8, 7, 6)):
        made = model(forward, **pair())
        same(made, image(), image(*shape))
        assert chains(made, doubled(image()), doubled(image(*shape))) == [FIRST]


def test_a_prelu_in_a_chain():
    def forward(self, x, shift):
        x = self.one(self.bn(self.conv(x)))
        return self.many(self.bn2(self.conv2(x)) + shift)

    for shape in ((8, 1, 1), (3, 8, 7, 6), (2, 1, 3, 8, 7, 6)):
        slopes = {"one": nn.PReLU(), "many": nn.PReLU(1 if len(shape) > 4 else 8)}
        made = model(forward, **pair(), conv2=conv(8, 8), bn2=nn.BatchNorm2d(8), **slopes)
        for memory in ("auto", "min", 1.0):
            same(made, image(), image(*shape), memory=memory)
        same(made, image(), image(*shape), train=False)
        found = chains(made, doubled(image()), doubled(image(*shape)))
        assert found == ["conv → bn → one → conv2 → bn2 → many"]
    made, x = made.float(), image(3, 8, 24, 20)
    fused = fuse(made, (x, x[:1]), memory="min")
    with torch.autocast("cpu", torch.bfloat16):  # the slopes stay in float
        ours, theirs = fused(x, x[:1]), made(x, x[:1])
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
        assert saved(fused, x, x[:1]) < 0.6 * saved(made, x, x[:1])
    apart = model(lambda self, x: self.one(x) * self.bn(self.conv(x)), **pair(), one=nn.PReLU())
    same(apart, image(), less=False)


def test_addition_in_place_into_what_others_read():
    def forward(self, x):
        shortcut = x * 1
        again = shortcut + 1
        shortcut += self.bn(self.conv(x))
        return shortcut * again + shortcut

    same(model(forward, **pair()), image())

    def forward(self, x):
        shortcut = x * 1
        out = self.bn(self.conv(x))
        other = shortcut[:, 1:]
        shortcut += out
        return other.sum(dim=1, keepdim=True) + x

    same(model(forward, **pair()), image())


def test_what_is_written_to_between():
    def forward(self, x):
        y = x * 2
        z = self.conv(y)
        with torch.no_grad():
            y.detach().mul_(0)
        return self.bn(z)

    made = model(forward, **pair()).double()
    with torch.no_grad():
        x = doubled(image()) * 0 + 1
        torch.testing.assert_close(fuse(made)(x), made(x))

    def forward(self, x):
        shortcut = x.sin()
        out = F.silu(self.bn(self.conv(x)) + shortcut)
        shortcut.mul_(2)  # eager saved nothing of it
        return out + shortcut

    out = fuse(model(forward, **pair()))(image().requires_grad_())
    out.sum().backward()


def test_statistics_that_are_read_or_moved_between():
    def forward(self, x):
        y = self.bn(self.conv(x))
        seen = self.bn.running_mean * 1  # of this batch
        return F.relu(y) + seen.view(-1, 1, 1)

    same(model(forward, **pair()), image(), less=False)

    def forward(self, x):
        first = self.bn(x)  # ends behind the second, but moves the statistics before it
        with torch.no_grad():
            second = F.relu(self.bn(self.conv2(x)))
        return self.conv(F.relu(first)) + second

    same(model(forward, **pair(), conv2=conv(8, 8)), image(), less=False)


def test_concatenations_save_their_parts_alone():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(4))
            self.convs = nn.ModuleList(conv(8 + 4 * i, 4) for i in range(4))

        def forward(self, x):
            for norm, convolution in zip(self.norms, self.convs, strict=True):
                x = torch.cat([x, convolution(F.relu(norm(x)))], 1)  # a concatenation of one
            return x

    made, x = Dense(), image(3, 8, 32, 24)
    fused = same(made, x, memory="min")
    assert len(chains(made, x.double())) == 4
    x = x.double()
    assert saved(fused, x) < x.nbytes // 8 * (8 + 3 * 4) + (16 << 10) < saved(made, x) / 3


@pytest.mark.parametrize("swapped", (False, True))
@pytest.mark.parametrize("channels_last", (False, True))
def test_squeeze_and_excitation(swapped, channels_last):
    def forward(self, x):
        x = F.silu(self.bn(self.conv(x)))
        s = torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        return self.bn2(self.conv2(s * x if swapped else x * s)) + x

    made = model(
        forward, **pair(), fc=nn.Conv2d(8, 8, 1), conv2=conv(8, 8, 1), bn2=nn.BatchNorm2d(8)
    )
    x = image(3, 8, 24, 20)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    same(made, x, memory="min")
    x = (
        x.double()
    )  # saved are the input, the map before the product, and the sum's residual is that too
    assert explain(made, x, memory="min").least < 2 * x.nbytes + (6 << 10)


def test_a_product_that_is_no_gate():
    def forward(self, x, y):
        return self.bn(self.conv(x * y))

    for shape in ((3, 8, 7, 6), (3, 1, 7, 6), (8, 7, 1), (3, 8, 1, 1), (1, 8, 1, 1)):
        same(model(forward, **pair()), image(), image(*shape), memory="min")
        same(model(forward, **pair()), image(*shape).expand(3, 8, 7, 6), image(), memory="min")
