"""fuse(model): whatever Python does in a forward happens at every call, and what changes is
seen."""

import argparse
import contextlib
import copy
import enum
import functools
import gc
import io
import random
import threading
import warnings
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import (
    Block,
    chains,
    conv,
    doubled,
    image,
    model,
    picture,
    same,
    saved,
    small,
    unit,
)
from torch import nn

from fusedconvbn import explain, fuse, track_memory, unfuse
from fusedconvbn.fusion import capture, find, progress


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return -dout


def without_gradient(self, x):
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


def across_no_grad(self, x):
    with torch.no_grad():
        x = self.conv(x)
    return F.relu(self.c[0][1](x))


def lowered(self, x):
    x = self.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = self.conv(x)
    return self.b(x) + F.relu(self.c[0][1](y.double()))


def view_written(self, x):
    h = self.conv(x)
    v = h[:, :8]
    v += self.a(x)
    return self.b(h) * 2


def sum_in_a_view(self, x):
    h = self.conv(x)
    v = h[:2]
    v += self.c[0](x[:2])
    return self.a(h)


def sum_under_another_name(self, x):
    h = self.conv(x)
    v = h.view(h.shape)
    v += self.c[0](x)
    return self.a(h)


def loop_of_branches(self, x):
    out = self.c[0](x)
    for branch in self.c[1:]:
        out += branch(x)
    return self.b(out)


def noisy_where_small(self, x):
    return self.a(x) * random.random() if x.sum() < 1e9 else x


# What a graph could lose, or a chain do to somebody else's memory.
FORWARDS = {
    "no_grad": without_gradient,
    "across no_grad": across_no_grad,
    "autocast inside": lowered,
    "a function of its own": lambda self, x: self.b(Reversed.apply(self.a(x))),
    "the same on a sum": lambda self, x: self.b(Reversed.apply(self.a(x) * 1)),
    "grad mode asked": lambda self, x: self.b(self.a(x)) * (2 if torch.is_grad_enabled() else 3),
    "class asked": lambda self, x: self.b(self.a(x) if isinstance(x, torch.Tensor) else x[0]),
    "mode as number": lambda self, x: self.b(self.a(x)) * (2.0 * self.training + 1),
    "mode compared": lambda self, x: self.b(self.a(x)) * (2 if self.training == True else 3),  # noqa: E712
    "mode as key": lambda self, x: self.b(self.a(x)) * {True: 2, False: 3}[self.training],
    "view written": view_written,
    "sum in a view": sum_in_a_view,
    "sum under another name": sum_under_another_name,
    "branches added in place": loop_of_branches,
    "size as gate": lambda self, x: self.b(self.conv(x * x.shape[2])),
    "called twice": lambda self, x: self.b(self.a(x)) + self.b(self.a(x * 2)),
    "gate expanded": lambda self, x: self.c[0](x * x.mean((2, 3), keepdim=True).expand_as(x)),
    "dropout": lambda self, x: self.b(F.dropout(self.a(x), 0.3, self.training)),
    "noise": lambda self, x: self.b(self.a(x)) * torch.rand(1),
    "python's noise": lambda self, x: self.b(self.a(x)) * random.random(),
    "a size as number": lambda self, x: self.b(self.a(x)) * float(x.shape[0]),
    "detached": lambda self, x: self.b(self.a(x).detach()),
    "a part detached": lambda self, x: self.b(self.a(x)) + self.conv(x).detach(),
    "a tensor as bool": lambda self, x: self.b(self.a(x)) if bool(x.sum() < 1e9) else x,
}


@pytest.mark.thin(1)
@pytest.mark.filterwarnings("ignore:fuse. Model saves")
@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_people_write(name, train):
    modules = {"a": unit(), "b": unit(), "conv": conv(8, 8)}
    branches = nn.ModuleList(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)) for _ in range(3))
    made = model(FORWARDS[name], **modules, c=branches)
    less = name not in ("across no_grad",)
    tolerance = 1e-2 if name == "autocast inside" else 1e-9
    fused = same(made, image(), train=train, less=less, tolerance=tolerance)
    assert chains(made, doubled(image()))
    same(
        made, image(), train=not train, fused=fused.train(not train), less=less, tolerance=tolerance
    )


# ------------------------------------------------------------------------------------- what changes


class Mode(enum.Enum):
    FIRST = 0
    SECOND = 1


KINDS = {
    "int": (0, 1),
    "numpy": (np.int64(0), np.int64(1)),
    "list": ([np.int64(0)], [np.int64(1)]),
    "enum": (Mode.FIRST, Mode.SECOND),
    "tensor": (torch.tensor(0), torch.tensor(1)),
    "namespace": (argparse.Namespace(k=0), argparse.Namespace(k=1)),
    "ordered dict": (OrderedDict({0: 0}), OrderedDict({0: 1})),
    "partial": (functools.partial(int, 0), functools.partial(int, 1)),
}


class Chooses(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.ops, self.k = nn.ModuleList(unit() for _ in range(2)), k

    def forward(self, x):
        k = self.k
        k = k[0] if isinstance(k, (list, OrderedDict)) else k
        k = k.k if isinstance(k, argparse.Namespace) else k
        k = k() if callable(k) else k
        return self.ops[k.value if isinstance(k, enum.Enum) else int(k)](x)


@pytest.mark.parametrize("name", KINDS)
def test_attributes(name):
    before, after = KINDS[name]
    made, x = Chooses(before).eval(), image()
    fused = fuse(made, x)
    torch.testing.assert_close(fused(x), made(x))
    made.k = fused.k = after
    torch.testing.assert_close(fused(x), made(x))


def test_changes_after_fusing_are_seen():
    class Applies(nn.Module):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.a, self.function, self.factors = unit(), torch.tanh, [2.0]
            self.way = self.first

        def first(self, x):
            return x + 1

        def second(self, x):
            return x - 1

        def helper(self, x):
            return x

        def forward(self, x):
            x = self.helper(self.function(self.way(self.a(x))) * sum(self.factors))
            return x * self.scale

    changes = (
        lambda m: m[0].append(nn.Tanh()),
        lambda m: setattr(m[1][2], "forward", torch.tanh),
        lambda m: setattr(m[2], "function", torch.sin),
        lambda m: m[2].factors.append(3.0),
        lambda m: setattr(m[2], "way", m[2].second),
        lambda m: m.insert(1, nn.Sigmoid()),
        lambda m: setattr(m[0][1], "eps", 0.3),
        lambda m: setattr(m[0][0], "bias", nn.Parameter(torch.ones(8).double())),
        lambda m: m[0].register_forward_hook(lambda module, args, out: out * 3),
        lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: setattr(Applies, "scale", 3.0),
        lambda m: setattr(Applies, "helper", lambda self, x: x * 5),
        lambda m: setattr(Applies, "forward", lambda self, x: self.a(x) * 7),
    )
    made = nn.Sequential(unit(), unit(), Applies()).double().eval()
    fused, x = fuse(copy.deepcopy(made), image().double()), image().double()
    torch.testing.assert_close(fused(x), made(x))
    for i, change in enumerate(changes):
        before = made(x)
        if i < 10:
            change(fused)
        change(made)
        assert not torch.equal(before, made(x)), i
        torch.testing.assert_close(fused(x), made(x), msg=lambda m, i=i: f"change {i}: {m}")


def test_modes_of_single_batch_norms_are_followed():
    made = small()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    made = made.double()
    fused = fuse(copy.deepcopy(made), doubled(picture()), inplace=True)
    norms = [n for n, m in made.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for frozen in ([], norms[:1], norms[2:4], norms[-1:], norms):
        for m in (made, fused):
            m.train()
            for name in frozen:
                m.get_submodule(name).eval()
        same_step(fused, made, doubled(picture()))


def same_step(fused, made, *inputs):
    from fusing import step

    for ours, theirs in zip(step(fused, inputs), step(made, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_options_of_a_batch_norm_are_read_at_every_call():
    made = small().double()
    fused = fuse(copy.deepcopy(made))
    for m in (made, fused):
        m[1].momentum, m[1].eps = 0.7, 0.3
        m[3].bn1.momentum = None
    for _ in range(2):
        same_step(fused, made, doubled(picture()))


def test_an_auxiliary_head_in_training_alone():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Block()
            self.head, self.tail = (nn.Sequential(conv(8, 2), nn.BatchNorm2d(2)) for _ in range(2))

        def forward(self, x):
            x = F.dropout(self.body(x), 0.3, self.training)
            return (self.tail(x), self.head(x)) if self.training else (self.tail(x),)

    made = Modes().double()
    fused = fuse(copy.deepcopy(made), doubled(image()), inplace=True)
    for mode in (True, False, True):
        same(made, image(), train=mode, fused=fused.train(mode))


def test_batch_sizes_in_turn():
    made = nn.Sequential(small()[:5], nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    fused = fuse(copy.deepcopy(made), doubled(picture()), memory="min")
    for n, size in ((2, 6), (3, 6), (5, 9), (4, 8), (7, 5)):
        x = torch.randn(n, 3, size, 5).double()
        same_step(fused, made, x)
        assert saved(fused, x) < 0.5 * saved(made, x)


# ------------------------------------------------------------------------------ Python in a forward


def test_side_effects_happen_at_every_call_and_not_in_fuse():
    class Collects(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.features, self.loss, self.calls = unit(), [], None, 0
            self.record = SimpleNamespace(means=[])
            self.stages = nn.ModuleList([self.a])
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            x = self.a(x)
            self.features.append(x.mean())
            self.record.means.append(float(x.mean()))  # breaks the graph
            self.seen += 1
            self.loss = x.sum()
            return x * self.calls

    made, x = Collects(), image()
    state = {n: t.clone() for n, t in made.state_dict().items()}
    fused = fuse(made, x)
    explain(made, x)
    for m in (made, fused):
        assert m.features == m.record.means == [] and m.loss is None and m.calls == 0
        assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
    tensors = [*fused.parameters(), *fused.buffers()]
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in tensors)
    assert all(p is q for p, q in zip(tensors, [*made.parameters(), *made.buffers()], strict=True))
    ours, theirs = (fuse(copy.deepcopy(made)), copy.deepcopy(made))
    for _ in range(3):
        torch.testing.assert_close(ours(x), theirs(x))
    assert ours.calls == theirs.calls == len(ours.features) == len(ours.record.means) == 3
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.seen == 3
    assert saved(ours, x) < saved(theirs, x)


def test_parameters_that_a_forward_writes():
    class Momentum(nn.Module):
        """A key encoder that follows the query's."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.c = unit(), unit(), conv(8, 8)

        @torch.no_grad()
        def update(self):
            for a, b in zip(self.q.parameters(), self.k.parameters(), strict=True):
                b.data = b.data * 0.9 + a.data * 0.1

        def forward(self, x):
            q = self.q(x)
            with torch.no_grad():
                self.update()
                k = self.k(x)
            self.c.weight.data = self.c.weight.data.clamp(-0.05, 0.05)
            return self.c(q - k)

    made, x = Momentum().double(), image().double()
    state = copy.deepcopy(made.state_dict())
    fused = fuse(copy.deepcopy(made), x, inplace=True)
    explain(fused, x)
    for name, t in fused.state_dict().items():
        assert torch.equal(t, state[name]), name
    for _ in range(3):
        torch.testing.assert_close(fused(x), made(x))
        for ours, theirs in zip(fused.parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("memory", ("auto", "min"))
def test_fuse_and_explain_leave_everything_alone(memory):
    for made, x in (
        (small(), picture()),
        (model(FORWARDS["a tensor as bool"], a=unit(), b=unit()), image()),
        (model(noisy_where_small, a=unit()), image()),
    ):
        made.eval()
        state = {n: t.clone() for n, t in made.state_dict().items()}
        versions = {n: t._version for n, t in made.state_dict().items()}
        drawn, python = torch.get_rng_state(), random.getstate()
        grad = torch.is_grad_enabled()
        fused = fuse(made, x, memory=memory, calibrate=memory == "min")
        explain(made, x, memory=memory)
        assert torch.equal(drawn, torch.get_rng_state()) and python == random.getstate()
        assert not any(m.training for m in (*made.modules(), *fused.modules()))
        assert grad == torch.is_grad_enabled()
        for name, t in made.state_dict().items():
            assert torch.equal(t, state[name]) and t._version == versions[name], name
        assert all(p.grad is None for p in made.parameters())


def test_questions_about_modes():
    def asks(question):
        return model(lambda self, x: self.a(x) * (2 if question() else 1), a=unit()).eval()

    made, x = asks(lambda: torch.is_autocast_enabled("cpu")), image()
    fused = fuse(made, x)
    torch.testing.assert_close(fused(x), made(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), made(x), rtol=1e-1, atol=1e-1)
    made = asks(torch.is_grad_enabled)
    fused = fuse(made, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), made(x))
    made = asks(torch.jit.is_tracing)
    ours, theirs = (torch.jit.trace(m, x, check_trace=False) for m in (fuse(made, x), made))
    torch.testing.assert_close(ours(x), theirs(x))
    made = asks(lambda: torch.get_default_dtype() == torch.float64)
    fused = fuse(made, x)
    torch.testing.assert_close(fused(x), made(x))
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(fused(x), made(x))
    finally:
        torch.set_default_dtype(torch.float32)


def test_errors_are_the_models_own():
    made = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm3d(8))
    fused = fuse(made)
    for m in (made, fused):
        with pytest.raises(ValueError, match="expected 5D input"):
            m(image())
    fused = fuse(small(), picture())
    with pytest.raises(TypeError, match="positional argument"):
        fused()
    with pytest.raises(RuntimeError, match=r"must match the size|broadcast|shape"):
        made = model(lambda self, x: self.a(x) + x[:, :3], a=unit())
        fuse(made)(image())


# ------------------------------------------------------------------------------------- falling back


def test_a_model_that_runs_unfused_says_so_once():
    def told(call):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call(), call()
        return [str(w.message) for w in found if "runs unfused" in str(w.message)]

    x = picture()
    fused = fuse(small(), x)
    with torch.compiler.set_stance("force_eager"):
        (message,) = told(lambda: fused(x))
    assert "force_eager" in message
    fused = fuse(small(), x)
    with torch._dynamo.config.patch(disable=True):
        (message,) = told(lambda: fused(x))
    assert "TORCHDYNAMO_DISABLE" in message
    fused = fuse(small(), x)
    assert not told(lambda: fused(x))

    def refuses(self, x):
        for _ in range(1):  # a break in a loop leaves the whole frame to Python
            torch._dynamo.graph_break()
        return self.conv(x)

    plain = fuse(model(refuses, conv=conv(8, 8)))
    (message,) = told(lambda: plain(image()))
    assert "TORCH_LOGS" in message


def test_the_limit_of_recompilations_is_told(monkeypatch):
    limits = {"recompile_limit": 2, "accumulated_recompile_limit": 2}
    monkeypatch.setattr(capture, "_SETTINGS", capture._SETTINGS | limits)
    made, x = unit(), image()
    fused = fuse(copy.deepcopy(made), memory="min")
    with pytest.warns(UserWarning, match="captured it too often"):
        for scale in (2, 3, 5, 7, 11):
            made[1].eps = fused[1].eps = 1e-3 * scale
            torch.testing.assert_close(fused(x), made(x))


def test_a_bar_is_shown_to_who_waits(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def flush(self):
            drawn.set()

    drawn = threading.Event()
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress.progress("fuse Net", 3) as stage:
        stage("capture")
        assert drawn.wait(60)
    shown = terminal.getvalue()
    assert "fuse Net" in shown and "capture" in shown and shown.endswith("\r\033[K")


def test_fuse_says_how_far_it_is(monkeypatch):
    said = []

    @contextlib.contextmanager
    def progress(title, stages):
        said.extend((title, stages))
        yield said.append

    monkeypatch.setattr(find, "progress", progress)
    fuse(small(), picture())
    assert said == ["fuse Sequential", 3, "capture", "chains", "plan"]


@pytest.mark.slow
def test_many_models_in_one_process_stay_fused():
    for i in range(32):
        made, x = (
            nn.Sequential(conv(3, 4 + i), nn.BatchNorm2d(4 + i), nn.ReLU()),
            image(2, 3, 12, 12),
        )
        fused = fuse(made, memory="min")
        for mode in (True, False):
            fused.train(mode), made.train(mode)
            torch.testing.assert_close(fused(x), made(x), rtol=1e-4, atol=1e-5)
        fused.train(), made.train()
        assert saved(fused, x) < 0.6 * saved(made, x), i


def test_one_model_in_many_ways_stays_fused():
    made = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    made.scale = 1.0
    fused = fuse(model(lambda self, x: self.a(x) * self.scale, a=made), memory="min")
    x = image(2, 3, 12, 12)
    for i in range(40):
        fused.scale = f"{i}" and float(i) if i % 2 else i
        fused(x)
    assert saved(fused, x) < 0.6 * saved(unfuse(fused), x)


def test_nothing_of_a_model_outlives_it():
    made, x = small(), picture()
    weight, maps = weakref.ref(made[0].weight), []
    explain(made, x)
    explain(model(FORWARDS["a tensor as bool"], a=unit(), b=unit()), image())
    fused = fuse(made, x)
    fused[1].register_forward_hook(lambda module, args, out: maps.append(weakref.ref(out)))
    fused(x).sum().backward()
    copy.deepcopy(fused)(x)
    del made, fused
    gc.collect()
    assert weight() is None and all(t() is None for t in maps)


def test_under_a_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    made, x = small(), picture()
    fused = fuse(made, x, memory="min")
    with FlopCounterMode(display=False) as counter:
        fused(x).sum().backward()
    assert any("fusedconvbn" in str(row) for row in counter.get_flop_counts()["Global"])
    with track_memory() as memory:
        fused(x)
    assert memory.saved < saved(made, x)
