"""fuse(model): what is found, what is refused, and that the model stays what it was to those who use it."""

import copy
import io
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import MODELS

import fusedconvbn
from fusedconvbn import FusedConvBN2d, explain, fuse, track_memory, unfuse
from fusedconvbn.forward import FusedForward


def chains(model):
    """Names of the chains of each fused forward, by the path of its module."""
    return {
        path: [chain.name for chain in module.forward.chains]
        for path, module in model.named_modules()
        if isinstance(module.__dict__.get("forward"), FusedForward)
    }


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **{"bias": False, **options})


class Block(nn.Module):
    """A bottleneck with a functional activation and an addition in place."""

    def __init__(self, channels=8, width=4):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return out.relu_()


def same(model, *inputs, train=True, fused=None, **options):
    """Fuses a copy, compares results and gradients, running statistics included; returns the fused one."""
    model = model.double().train(train)
    inputs = [t.double() if t.is_floating_point() else t for t in inputs]
    if fused is None:
        fused = fuse(copy.deepcopy(model), tuple(inputs), inplace=True, **options)
    results = []
    for m in (fused, model):
        for p in m.parameters():
            p.grad = None
        torch.manual_seed(3)
        random.seed(3)
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = m(*leaves)
        out = out if isinstance(out, torch.Tensor) else sum(t.sum(dim=(1, 2, 3)) for t in out)
        out.backward(torch.linspace(-1, 1, out.numel()).double().view_as(out))
        grads = [t.grad for t in leaves] + [p.grad for p in m.parameters()]
        results.append([out.detach(), *grads, *(b.clone().double() for b in m.buffers())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return fused


def image(*shape):
    return torch.randn(shape or (3, 8, 7, 6))


def test_a_block_with_functional_activations_and_an_addition_in_place():
    assert chains(same(Block(), image())) == {"": ["conv1 → bn1 → conv2 → bn2 → conv3 → bn3"]}


@pytest.mark.parametrize("memory", ("auto", "min", 0.9, 0.4))
def test_every_budget(memory):
    same(nn.Sequential(Block(), Block(), nn.AvgPool2d(2)), image(), memory=memory)


ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, torch.relu),
    "relu6": (nn.ReLU6(inplace=True), F.relu6, lambda x: F.hardtanh(x, 0.0, 6.0)),
    "leaky_relu": (nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2)),
    "elu": (nn.ELU(0.7), lambda x: F.elu(x, alpha=0.7)),
    "silu": (nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, inplace=True)),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "gelu": (nn.GELU(), F.gelu, lambda x: F.gelu(x, approximate="tanh")),
    "mish": (nn.Mish(), F.mish),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()),
    "tanh": (nn.Tanh(), torch.tanh, lambda x: x.tanh()),
}


class Activated(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.bn = conv(8, 5), nn.BatchNorm2d(5)
        self.activation = activation

    def forward(self, x):
        return self.activation(self.bn(self.conv(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    for activation in ACTIVATIONS[name]:
        fused = same(Activated(activation), image())
        (chain,) = fused.forward.chains
        assert chain.links[-1].activation.startswith(name)


def model(forward, **modules):
    """A model of some modules, of a class of its own with `forward`."""
    kind = type("Model", (nn.Module,), {"forward": forward})
    made = kind()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def pair():
    return {"conv": conv(8, 8), "bn": nn.BatchNorm2d(8)}


def test_a_batch_norm_before_its_convolution():
    def forward(self, x):
        out = self.conv(F.relu(self.bn(x)))
        return x + self.conv2(F.relu(self.bn2(out)))

    fused = same(
        model(forward, **pair(), bn2=nn.BatchNorm2d(8), conv2=conv(8, 8)), image(), memory="min"
    )
    assert chains(fused) == {"": ["bn → conv → bn2 → conv2"]}


def test_what_is_used_twice_ends_a_chain():
    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.bn(y)) + y

    assert chains(same(model(forward, **pair()), image())) == {"": ["bn"]}


REFUSED = {
    "the result of the convolution is used twice": (
        lambda self, x: self.bn(y := self.conv(x)) * y,
        {},
        "bn",
        "used elsewhere",
    ),
    "shared convolution": (
        lambda self, x: self.bn(self.conv(self.conv(x))),
        {},
        "conv",
        "shared",
    ),
    "shared batch norm": (
        lambda self, x: self.bn(self.conv(self.bn(x))),
        {},
        "bn",
        "shared",
    ),
    "parametrised": (
        lambda self, x: self.bn(self.conv(x)),
        {"conv": lambda c: nn.utils.parametrizations.weight_norm(c)},
        "conv",
        "parametrised",
    ),
    "hooks": (
        lambda self, x: self.bn(self.conv(x)),
        {"conv": lambda c: c.register_forward_hook(lambda m, i, o: o * 2) and c},
        "conv",
        "hooks",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    forward, change, path, reason = REFUSED[name]
    modules = pair()
    for key, function in change.items():
        modules[key] = function(modules[key])
    made = model(forward, **modules)
    assert not chains(same(made, image()))
    assert reason in explain(made, image().double()).refused[path]


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class HarmlessConv(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1, bias=False)
        self.channels = channels


def test_subclasses():
    made = nn.Sequential(OwnConv(8, 8, 1), nn.BatchNorm2d(8))
    assert not chains(same(made, image()))
    assert "its own forward" in explain(made, image().double()).refused["0"]
    assert chains(same(nn.Sequential(HarmlessConv(8), nn.BatchNorm2d(8)), image()))


def test_a_batch_norm_over_another_dimension_gives_its_own_error():
    made = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm3d(8))
    fused = fuse(made)
    for m in (made, fused):
        with pytest.raises(ValueError, match="expected 5D input"):
            m(image())


def test_the_residual_may_be_broadcast_or_larger():
    def forward(self, x, shift):
        return F.silu(self.bn(self.conv(x)) + shift)

    for shape in ((8, 1, 1), (3, 8, 7, 6), (1, 8, 1, 6), (2, 1, 3, 8, 7, 6)):
        fused = same(model(forward, **pair()), image(), image(*shape))
        assert chains(fused) == {"": ["conv → bn"]}


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
    fused = fuse(copy.deepcopy(made))
    with torch.no_grad():
        torch.testing.assert_close(fused(image().double() * 0 + 1), made(image().double() * 0 + 1))

    def forward(self, x):
        shortcut = x.sin()
        out = F.silu(self.bn(self.conv(x)) + shortcut)
        shortcut.mul_(2)  # eager saved nothing of it
        return out + shortcut

    made = model(forward, **pair())
    out = fuse(made)(image().requires_grad_())
    out.sum().backward()


def test_concatenations_keep_their_parts_alone():
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
    assert len(fused.forward.chains) == 4
    x = x.double()
    with track_memory() as ours:
        fused(x)
    with track_memory() as theirs:
        made(x)
    assert ours.saved < x.nbytes // 8 * (8 + 3 * 4) + (16 << 10) < theirs.saved / 3


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
    x = image()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    fused = same(made, x, memory="min")
    assert [c.gated for c in fused.forward.chains] == [False, True]


def test_a_product_that_is_no_gate():
    def forward(self, x, y):
        return self.bn(self.conv(x * y))

    for shape in ((3, 8, 7, 6), (3, 1, 7, 6), (8, 7, 1), (3, 8, 1, 1), (1, 8, 1, 1)):
        same(model(forward, **pair()), image(), image(*shape), memory="min")
        same(model(forward, **pair()), image(*shape).expand(3, 8, 7, 6), image(), memory="min")


class Branches(nn.Module):
    """A branch on values at the top; what is below is fused."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > -1e9 else x


def test_control_flow_elsewhere():
    fused = same(Branches(), image())
    assert set(chains(fused)) == {"first", "second"}
    assert "" in explain(Branches(), image()).untraceable


def test_a_block_that_cannot_be_traced_inside_one_that_can():
    assert set(chains(same(nn.Sequential(Block(), Branches(), Block()), image()))) == {
        "",
        "0",
        "1.first",
        "1.second",
        "2",
    }


class Modes(nn.Module):
    """An auxiliary head in training alone, dropout, and a counter."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Block(), nn.Sequential(conv(8, 2), nn.BatchNorm2d(2))
        self.tail = nn.Sequential(conv(8, 2), nn.BatchNorm2d(2))

    def forward(self, x):
        x = F.dropout(self.body(x), 0.3, self.training)
        if self.training:
            return self.tail(x), self.head(x)
        return (self.tail(x),)


def test_branches_on_the_mode():
    made = Modes().double()
    fused = fuse(copy.deepcopy(made), image().double(), inplace=True)
    for mode in (True, False, True):
        same(made, image(), train=mode, fused=fused.train(mode))


def test_forwards_that_cannot_be_baked_in_are_not():
    class Counts(Block):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    class Draws(Block):
        def forward(self, x):
            return super().forward(x) * random.random()

    class Noise(Block):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    for kind, word in ((Counts, "attribute"), (Draws, "random"), (Noise, "random")):
        made = kind()
        state = random.getstate(), torch.get_rng_state()
        fused = fuse(made)
        assert not chains(fused)
        assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())
        assert getattr(made, "calls", 0) == 0
        assert word in explain(made, image()).untraceable[""]


def test_arguments_with_defaults():
    class Optional(Block):
        def forward(self, x, scale=None, *, shift=0.0):
            out = super().forward(x)
            if scale is not None:
                out = out * scale
            return out + shift

    made = Optional().double()
    fused = fuse(copy.deepcopy(made))
    x = image().double()
    for arguments in (
        dict(x=x),
        dict(x=x, scale=2.0),
        dict(x=x, shift=1.0),
        dict(x=x, scale=None, shift=0.0),
    ):
        torch.testing.assert_close(fused(**arguments), made(**arguments))
    torch.testing.assert_close(fused(x, 3.0, shift=2.0), made(x, 3.0, shift=2.0))
    with pytest.raises(TypeError, match="positional argument"):
        fused()


class Watched(nn.Module):
    """Convolutions and batch norms in a forward that branches on values."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.other = conv(8, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x, high=False):
        y = self.conv(x)
        if x.sum() > 1e9:
            return y * 2
        if high:
            return self.other(y) + y.mean()
        return self.last(self.conv(F.relu(self.bn(y)))) if x.shape[0] == 1 else F.relu(self.bn(y))


def test_a_forward_that_cannot_be_traced_is_watched():
    made = Watched()
    fused = same(made, image())
    assert type(fused.conv.forward).__name__ == "PostponingForward"
    x = image(3, 8, 24, 20).double()
    with track_memory() as ours:
        fused(x)
    with track_memory() as theirs:
        made(x)
    assert ours.saved < theirs.saved - x.nbytes // 2
    for inputs in ((image(), torch.tensor(1)), (image() + 1e9,), (image(1, 8, 5, 4),)):
        same(made, *inputs, fused=fused)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        same(copy.deepcopy(made), image(), fused=other)
        assert other.bn.forward.conv is other.conv
    same(made, image(), train=False, fused=fused.eval())
    back = unfuse(fused.train())
    assert "forward" not in back.conv.__dict__
    assert not chains(fuse(made)), "nothing is known without a run"

    class Shared(Watched):
        def forward(self, x):
            y = self.bn(self.conv(x))
            return self.bn(self.conv(y)) if x.sum() > -1e9 else y

    fused = same(Shared(), image())
    assert "forward" not in fused.conv.__dict__
    assert "shared" in explain(Shared(), image()).refused["conv"]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return -dout


def unit(i=8, o=8):
    return nn.Sequential(conv(i, o), nn.BatchNorm2d(o), nn.ReLU())


def without_gradient(self, x):
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


def view_written(self, x):
    h = self.conv(x)
    v = h[:, :8]
    v += self.a(x)
    return self.b(h) * 2


def loop_of_branches(self, x):
    out = self.c[0](x)
    for branch in self.c[1:]:
        out += branch(x)
    return self.b(out)


# What a graph would lose, or a chain do to somebody else's memory; and whether something is fused all the same.
FORWARDS = {
    "no_grad": without_gradient,
    "a function of its own": lambda self, x: self.b(Reversed.apply(self.a(x))),
    "the same on a sum": lambda self, x: self.b(Reversed.apply(self.a(x) * 1)),
    "reentrant checkpoint": lambda self, x: self.b(checkpoint(self.a, x, use_reentrant=True)),
    "grad mode asked": lambda self, x: self.b(self.a(x)) * (2 if torch.is_grad_enabled() else 3),
    "class asked": lambda self, x: self.b(self.a(x) if isinstance(x, torch.Tensor) else x[0]),
    "mode as number": lambda self, x: self.b(self.a(x)) * (2.0 * self.training + 1),
    "mode compared": lambda self, x: self.b(self.a(x)) * (2 if self.training == True else 3),  # noqa: E712
    "mode as key": lambda self, x: self.b(self.a(x)) * {True: 2, False: 3}[self.training],
    "view written": view_written,
    "branches added in place": loop_of_branches,
    "size as gate": lambda self, x: self.b(self.conv(x * x.shape[2])),
    "called twice": lambda self, x: self.b(self.a(x)) + self.b(self.a(x * 2)),
    "gate expanded": lambda self, x: self.c[0][0](x * x.mean((2, 3), keepdim=True).expand_as(x)),
}


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_people_write(name, train):
    modules = {"a": unit(), "b": unit(), "conv": conv(8, 8)}
    branches = nn.ModuleList(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)) for _ in range(3))
    made = model(FORWARDS[name], **modules, c=branches)
    fused = same(made, image(), train=train)
    assert chains(fused)
    same(made, image(), train=not train, fused=fused.train(not train))


def test_other_kinds_of_arguments_run_as_they_are():
    def forward(self, x, *skips):
        x = torch.cat(x[::-1], 1) if isinstance(x, list) else x
        return self.a(x) + sum(skips)

    made = model(forward, a=unit(8, 4)).double()
    fused = fuse(copy.deepcopy(made))
    x, parts = image().double(), [image(3, 3, 7, 6).double(), image(3, 5, 7, 6).double()]
    for arguments in ((x,), (x, 1.0), (x, x[:, :4], 2), (parts,)):
        torch.testing.assert_close(fused(*arguments), made(*arguments))
    scaled = model(lambda self, x, r: F.relu(self.bn(self.conv(x)) + r), **pair()).double()
    torch.testing.assert_close(fuse(copy.deepcopy(scaled))(x, 0.5), scaled(x, 0.5))


def test_side_effects_and_aliases_are_left_alone():
    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.features, self.loss = unit(), [], None
            self.stages = nn.ModuleList([self.a])

        def forward(self, x):
            x = self.a(x)
            self.features.append(x.mean())
            self.loss = x.sum()
            return x

    made, x = Collects(), image()
    fused = fuse(made, x)
    assert made.features == fused.features == [] and fused.loss is None
    parameters = [*fused.parameters(), *fused.buffers()]
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in parameters)
    assert all(
        p is q for p, q in zip(parameters, [*made.parameters(), *made.buffers()], strict=True)
    )
    fused(x), fused(x)
    assert len(fused.features) == 2 and chains(fused)


def test_changes_after_fusing_are_seen():
    def changes(m):
        yield lambda: m[0].append(nn.Tanh())
        yield lambda: setattr(m[1][2], "forward", torch.tanh)
        yield lambda: setattr(m[2], "function", torch.sin)
        yield lambda: m[2].factors.append(3.0)

    class Applies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.function, self.factors = unit(), torch.tanh, [2.0]

        def forward(self, x):
            return self.function(self.a(x)) * sum(self.factors)

    made = nn.Sequential(unit(), unit(), Applies()).double().eval()
    fused, x = fuse(copy.deepcopy(made)), image().double()
    for ours, theirs in zip(changes(fused), changes(made), strict=True):
        ours(), theirs()
        torch.testing.assert_close(fused(x), made(x))


def test_nothing_is_kept_of_what_no_gradient_reaches():
    made = nn.Sequential(conv(8, 32), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 4), nn.BatchNorm2d(4))
    fused = same(copy.deepcopy(made), image(), memory="min")
    for frozen in (("0.", "1."), ("0.", "1.", "3."), ("0.",), ("3.",), ("0.", "1.", "3.", "4.")):
        for m in (made, fused):
            for name, p in m.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        reports = []
        for m in (fused, made):
            m.train().float()
            with track_memory() as memory:
                m(torch.ones(4, 8, 32, 32))
            reports.append(memory.saved)
        assert reports[0] <= reports[1] + 4096, frozen


def test_on_the_meta_device():
    fused = fuse(nn.Sequential(unit(8, 4), unit(4, 2)).to("meta"), image().to("meta"))
    assert fused(image().to("meta")).shape == (3, 2, 7, 6)


# ------------------------------------------------------------------------------- the same model to the outside


def small():
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(240, 4)
    )


X = torch.Generator().manual_seed(0)


def picture():
    return torch.randn(4, 3, 6, 5, generator=X)


def test_state_dict_optimizer_and_names():
    made = small()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    fused = fuse(made, picture())
    assert list(fused.state_dict()) == list(made.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in made.named_modules()]
    assert all(p is q for p, q in zip(made.parameters(), fused.parameters(), strict=True))
    assert all(p is q for p, q in zip(made.buffers(), fused.buffers(), strict=True))
    before = [p.clone() for p in fused.parameters()]
    fused(picture()).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, fused.parameters(), strict=True))


def test_modes_of_single_batch_norms_are_followed():
    made = small()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    fused = fuse(copy.deepcopy(made).double(), picture().double(), inplace=True)
    norms = [n for n, m in made.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for frozen in ([], norms[:1], norms[2:4], norms[-1:], norms):
        for m in (made, fused):
            m.train()
            for name in frozen:
                m.get_submodule(name).eval()
        for p in (*made.parameters(), *fused.parameters()):
            p.grad = None
        results = []
        x = picture().double()
        for m in (fused, made.double()):
            m(x).sin().sum().backward()
            results.append([*(p.grad for p in m.parameters()), *(b.double() for b in m.buffers())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_options_of_a_batch_norm_are_read_at_every_call():
    made = small().double()
    fused = fuse(copy.deepcopy(made))
    for m in (made, fused):
        m[1].momentum, m[1].eps = 0.7, 0.3
        m[3].bn1.momentum = None
    x = picture().double()
    torch.testing.assert_close(fused(x), made(x))
    for ours, theirs in zip(fused.buffers(), made.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_deepcopy_pickle_and_save():
    fused = fuse(small(), picture())
    x = picture()
    expected = fused(x)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(stream, weights_only=False),
    ):
        assert chains(other) == chains(fused)
        assert other.forward.module is other
        torch.testing.assert_close(other(x), expected)
        with torch.no_grad():
            other[0].weight.zero_()
        assert not torch.equal(other(x), expected)
        torch.testing.assert_close(fused(x), expected)


def test_hooks_on_a_block_run_and_the_rest_stays_fused():
    fused, x = fuse(small(), picture(), memory="min"), picture()
    expected = fused(x)
    seen = []
    handle = fused[3].register_forward_hook(lambda module, args, out: seen.append(out))
    inner = fused[4].conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with track_memory() as hooked:
        torch.testing.assert_close(fused(x), expected)
    assert [tuple(t.shape) for t in seen] == [(4, 8, 6, 5), (4, 4, 6, 5)]
    handle.remove(), inner.remove()
    with track_memory() as free:
        fused(x)
    with track_memory() as eager:
        unfuse(fused)(x)
    assert free.saved < hooked.saved < eager.saved

    backward = []
    fused[3].register_full_backward_hook(lambda *_: backward.append(1))
    fused(x).sum().backward()
    assert backward == [1]


def test_exchanged_children_are_run():
    fused, made, x = fuse(small()), small(), picture()
    fused.load_state_dict(made.state_dict())
    for m in (fused, made):
        m[1] = nn.Identity()
        m[3].conv2 = nn.Conv2d(4, 4, 5, padding=2, bias=False)
    fused[3].conv2.load_state_dict(made[3].conv2.state_dict())
    torch.testing.assert_close(fused(x), made(x))
    for m in (fused, made):
        m[4].conv1.stride = (2, 2)
        m[4].conv1.padding = (1, 1)
    with pytest.raises(RuntimeError, match="must match the size"):
        made(x)
    with pytest.raises(RuntimeError, match="must match the size"):
        fused(x)


def test_to_and_half():
    fused, made = fuse(small(), picture()), small()
    made.load_state_dict(fused.state_dict())
    for change in (
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float().to(memory_format=torch.channels_last),
    ):
        ours, theirs = change(fused), change(made)
        x = picture().to(ours[0].weight.dtype)
        tolerance = 0.1 if x.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


def test_autocast():
    made = small()
    fused = fuse(copy.deepcopy(made), picture(), inplace=True)
    x = picture()
    for m in (made, fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    for p, q in zip(made.parameters(), fused.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=0.2, atol=0.2 * p.grad.abs().max().item())


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    made = small()
    fused = fuse(copy.deepcopy(made), picture(), inplace=True)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for mode in (True, False):
        for m in (made, fused):
            m.train(mode).zero_grad()
        x = picture()
        ours, theirs = compiled(x), made(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        ours.sum().backward(), theirs.sum().backward()
        for p, q in zip(made.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3)
    for p, q in zip(made.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-4)


def test_export():
    fused = fuse(small(), picture()).eval()
    x = picture()
    with torch.no_grad():
        program = torch.export.export(fused, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-5)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("fusedconvbn" in t for t in targets)


def test_torchscript():
    made = nn.Sequential(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=None), nn.SiLU()),
        nn.Sequential(conv(8, 4, bias=True), nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(0.2)),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
    )
    fused = fuse(copy.deepcopy(made), picture(), inplace=True)
    scripted = torch.jit.script(fused)
    assert "conv_bn_chain" in str(scripted.graph)
    assert set(scripted.state_dict()) == set(made.state_dict())
    for mode in (True, False, True):
        x = picture()
        ours, theirs = scripted.train(mode)(x), made.train(mode)(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        ours.sum().backward(), theirs.sum().backward()
    for (name, p), q in zip(scripted.named_buffers(), made.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=name)
    stream = io.BytesIO()
    torch.jit.save(scripted, stream)
    stream.seek(0)
    loaded = torch.jit.load(stream)
    torch.testing.assert_close(loaded(x), scripted(x))


def test_layers_that_are_fused_already_stay():
    made = nn.Sequential(FusedConvBN2d(3, 8, 3), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    assert chains(fuse(made)) == {"": ["1 → 2"]}


def test_fusing_again_and_back():
    fused = fuse(small(), picture(), memory="min")
    again = fuse(fused, picture(), memory=0.9)
    assert [c.kept for c in fused.forward.chains] == [() for _ in fused.forward.chains]
    assert any(c.kept for c in again.forward.chains)
    back = unfuse(again)
    assert not chains(back) and chains(again)
    assert back[0].weight is fused[0].weight
    assert unfuse(again, inplace=True) is again and not chains(again)
    x = picture()
    torch.testing.assert_close(back(x), again(x))


def test_checkpoint_around_a_fused_block():
    fused, x = fuse(Block().double(), image().double()), image().double().requires_grad_()
    before = [b.clone() for b in fused.buffers()]
    out = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=False)
    (ours,) = torch.autograd.grad(out.sin().sum(), x)
    for b, value in zip(fused.buffers(), before, strict=True):
        b.data.copy_(value)
    (theirs,) = torch.autograd.grad(fused(x).sin().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_transforms():
    fused, x = fuse(Block().double()), image().double()
    state = {n: t.detach() for n, t in (*fused.named_parameters(), *fused.named_buffers())}

    def loss(module, state, x):
        return torch.func.functional_call(module, state, (x,)).sin().sum()

    results = []
    for module in (fused, unfuse(fused)):
        copied = {n: t.clone() for n, t in state.items()}
        gradient = torch.func.grad(partial(loss, module), argnums=1)
        results.append(gradient(copied, x))
    torch.testing.assert_close(*results)


def test_fuse_leaves_no_trace_when_it_fails():
    made = small()
    with pytest.raises(ValueError, match="expected memory of at least"):
        fuse(made, picture(), memory=0.01, inplace=True)
    assert not chains(made)
    with pytest.raises(ValueError, match=r"expected example_inputs with memory=0.5, got None"):
        fuse(made, memory=0.5)
    for wrong in ("half", 0.0, -1, None, True, "6 apples"):
        with pytest.raises((ValueError, TypeError), match='expected memory "auto", "min"'):
            fuse(made, memory=wrong)
    with pytest.raises(TypeError, match=r"expected model to be an nn.Module"):
        fuse(torch.jit.script(nn.Linear(2, 2)))
    fused = fuse(made, picture(), memory="min")
    with pytest.raises(ValueError, match="expected memory of at least"):
        fuse(fused, picture(), memory=1, inplace=False) and fuse(fused, picture(), memory="1KB")
    assert chains(fused)


def test_random_state_and_buffers_are_left_alone_by_profiling():
    for made in (small(), Branches()):
        x = picture() if isinstance(made, nn.Sequential) else image()
        state = {n: t.clone() for n, t in made.state_dict().items()}
        random_state = torch.get_rng_state()
        made.eval()
        fuse(made, x)
        assert torch.equal(random_state, torch.get_rng_state())
        assert not any(m.training for m in made.modules())
        for name, t in made.state_dict().items():
            assert torch.equal(t, state[name]), name


def test_zoo_names_are_found_by_the_command(capsys, tmp_path):
    from fusedconvbn.__main__ import main

    picture = tmp_path / "out.png"
    numbers = tmp_path / "out.json"
    main(
        (
            "explain torchvision:resnet18 --batch 2 --size 64 --budget 0.6 "
            f"--plot {picture} --json {numbers}"
        ).split()
    )
    printed = capsys.readouterr().out
    assert "20 of 20 pairs" in printed and picture.stat().st_size > 10_000
    main(["explain", "torchvision:resnet18", "--batch", "2", "--size", "64", "--budget", "0.1"])
    assert "expected memory of at least" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected a source"):
        main(["explain", "resnet18"])
    assert MODELS and fusedconvbn.fuse is fuse
