"""fuse(model): copies, wrappers, compilers and exporters."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from functools import partial
from types import MethodType

import pytest
import torch
from fusing import Block, conv, doubled, image, picture, same, saved, small, unit
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fusedconvbn import fuse, is_fused, unfuse


def zeroed(net):
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net


def test_what_stays_and_how_it_shows():
    made = small()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    fused = fuse(made, picture())
    assert is_fused(fused) and not is_fused(made)
    assert isinstance(fused, nn.Sequential) and type(fused).__name__ == "Sequential"
    assert repr(fused).startswith("Fused[Sequential](") and repr(made).startswith("Sequential(")
    assert list(fused.state_dict()) == list(made.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in made.named_modules()]
    assert all(p is q for p, q in zip(made.parameters(), fused.parameters(), strict=True))
    assert all(p is q for p, q in zip(made.buffers(), fused.buffers(), strict=True))
    before = [p.clone() for p in fused.parameters()]
    fused(picture()).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, fused.parameters(), strict=True))


def test_a_deep_copy_is_fused_and_has_parameters_of_its_own():
    class Refers(nn.Module):
        """Has references to itself."""

        def __init__(self):
            super().__init__()
            self.a, self.impl = unit(), self.first
            self.__dict__["owner"] = self

        def first(self, x):
            return self.a(x)

        def forward(self, x):
            return self.owner.impl(x)

    made, x = Refers(), image()
    fused = fuse(made, x, memory="min")
    other = copy.deepcopy(fused)
    assert is_fused(other) and other.owner is other and other.impl.__self__ is other
    assert is_fused(fused) and fused.a[0] is not made.a[0] and fused.a[0].weight is made.a[0].weight
    torch.testing.assert_close(other(x), made(x))
    assert saved(other, x) == saved(fused, x) < saved(made, x)
    assert zeroed(other)(x).abs().sum() == 0
    torch.testing.assert_close(fused(x), made(x))


def test_a_shallow_copy_and_a_pickle_are_the_plain_model():
    fused, x = fuse(small(), picture()), picture()
    expected = fused(x)
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    for other in (
        copy.copy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(stream, weights_only=False),
    ):
        assert type(other) is nn.Sequential and not is_fused(other)
        torch.testing.assert_close(other(x), expected)
    assert is_fused(fused)
    other = copy.copy(fused)
    other._modules = dict(other._modules, **{"0": zeroed(conv(3, 8, bias=True))})
    assert not torch.equal(other(x), expected)
    torch.testing.assert_close(other(x), unfuse(other)(x))


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["fusedconvbn"] = None  # an import of it fails
x, expected = torch.load("data.pt")
torch.testing.assert_close(torch.load("model.pt", weights_only=False)(x), expected)
"""


def test_a_saved_model_loads_without_the_package(tmp_path):
    fused, x = fuse(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()), picture()), picture()
    torch.save(fused, tmp_path / "model.pt")
    torch.save((x, fused(x).detach()), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE], check=True, cwd=tmp_path)


def test_replicas_run_their_own_parameters():
    def replica(net):  # as torch.nn.parallel.replicate makes it
        modules = list(net.modules())
        made = {m: m._replicate_for_data_parallel() for m in modules}
        for m, r in made.items():
            for name, child in m._modules.items():
                r._modules[name] = made[child]
                setattr(r, name, made[child])
            for name, p in m._parameters.items():
                setattr(r, name, None if p is None else p.detach() * 0)
            for name, b in m._buffers.items():
                setattr(r, name, b.clone())
        return made[net]

    fused, x = fuse(unit(3, 8), picture()), picture()
    with pytest.warns(UserWarning, match="DataParallel"):
        assert replica(fused)(x).abs().sum() == 0
    assert fused(x).abs().sum() > 0 and is_fused(fused)


def test_a_wrapped_forward():
    """As accelerate wraps a model for mixed precision, and unwraps it."""

    def wrapped(function):
        def forward(*args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args, **kwargs).float()

        forward.__wrapped__ = function
        return forward

    made, x = Block(), image()
    fused = fuse(copy.deepcopy(made), x, memory="min", inplace=True)
    for m in (made, fused):
        m._original_forward = m.forward
        m.forward = MethodType(wrapped(m.forward.__func__), m)
    torch.testing.assert_close(fused(x), made(x), rtol=0.1, atol=0.1)
    assert saved(fused, x) < saved(made, x)
    for m in (made, fused):
        copied = zeroed(copy.deepcopy(m))(x)
        torch.testing.assert_close(copied, x.relu(), rtol=0.02, atol=0.02)
    plain, runs = unfuse(fused), fused._fusion.runs
    assert saved(plain, x) == saved(made, x)
    torch.testing.assert_close(plain(x), made(x))
    assert fused._fusion.runs == runs  # the plain one does not run the fused one's graphs
    fused.forward = MethodType(fused.__dict__["forward"].__wrapped__, fused)  # unwrapped
    del made.forward
    torch.testing.assert_close(fused(x), made(x))
    del fused.forward
    torch.testing.assert_close(fused(x), made(x))


def test_a_forward_of_one_object():
    made, x = Block().double(), image().double()
    made.forward = MethodType(lambda self, x: Block.forward(self, x) * 2, made)
    fused = same(made, x)
    plain = unfuse(copy.deepcopy(fused))
    assert plain.forward.__self__ is plain and "forward" not in fused.__dict__
    torch.testing.assert_close(plain(x), made(x))
    assert zeroed(copy.deepcopy(fused))(x).sum() == 2 * x.relu().sum()

    fused.forward = lambda x, forward=fused.forward: forward(x) + 1  # given after it was fused
    copy.copy(fused), copy.deepcopy(fused)
    torch.testing.assert_close(fused(x), made(x) + 1)
    torch.testing.assert_close(unfuse(fused, inplace=True)(x), made(x) + 1)


def test_averages():
    made, x = Block(), image()
    fused = fuse(made, x)
    average = AveragedModel(fused)
    average.update_parameters(fused)
    torch.optim.swa_utils.update_bn([x], average)
    torch.testing.assert_close(average.eval()(x), average.module(x))
    torch.testing.assert_close(average(x), unfuse(average.module)(x))


def test_hooks_before_and_after():
    made, x = small(), picture()
    seen = []
    made[3].register_forward_hook(lambda module, args, out: seen.append("before"))
    fused = fuse(copy.deepcopy(made), x, memory="min")
    fused[4].conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    fused.register_forward_hook(lambda module, args, out: out * 2)
    for _ in range(2):
        torch.testing.assert_close(fused(x), made(x) * 2)
    assert [s for s in seen if s != "before"] == [(4, 4, 6, 5)] * 2 and len(seen) == 6
    assert saved(fused, x) < saved(made, x)
    backward = []
    fused.register_full_backward_hook(lambda *_: backward.append("model"))
    fused[3].register_full_backward_hook(lambda *_: backward.append("block"))
    fused(x).sum().backward()
    assert sorted(backward) == ["block", "model"]


def test_surgery_and_fusing_again():
    made, x = small(), picture()
    fused = fuse(made, x, memory="min")
    again = fuse(fused, x, memory=0.9)
    assert is_fused(fused) and saved(fused, x) < saved(again, x)
    for m in (again, made):
        m[1] = nn.Identity()
        m[3].conv2 = nn.Conv2d(4, 4, 5, padding=2, bias=False)
    again[3].conv2.load_state_dict(made[3].conv2.state_dict())
    torch.testing.assert_close(again(x), made(x))
    assert saved(fuse(again, x, memory="min"), x) < saved(made, x)
    back = unfuse(again)
    assert not is_fused(back) and is_fused(again) and back[0].weight is again[0].weight
    assert type(back) is nn.Sequential
    assert unfuse(again, inplace=True) is again and not is_fused(again)
    torch.testing.assert_close(back(x), again(x))
    inner = nn.Sequential(fuse(unit(3, 8), picture()), nn.Conv2d(8, 2, 1))
    assert is_fused(inner[0]) and not is_fused(unfuse(inner)[0])
    plain = copy.deepcopy(unfuse(inner)).double()
    same(plain, picture(), fused=fuse(inner.double(), doubled(picture())))


def test_to_and_half():
    fused, made = fuse(small(), picture()), small()
    made.load_state_dict(fused.state_dict())
    for change in (
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float().to(memory_format=torch.channels_last),
        lambda m: m.to("cpu", torch.float64),
    ):
        ours, theirs = change(fused), change(made)
        x = picture().to(ours[0].weight.dtype)
        tolerance = 0.1 if x.element_size() == 2 else 1e-4
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
        assert saved(fused, x) < saved(made, x)


def test_autocast():
    made, x = small(), picture()
    fused = fuse(copy.deepcopy(made), x, inplace=True)
    for m in (made, fused):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
            m.bytes = saved(m, x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    assert fused.bytes < made.bytes
    for p, q in zip(made.parameters(), fused.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        torch.testing.assert_close(q.grad, p.grad, rtol=0.2, atol=0.2 * p.grad.abs().max().item())


def test_the_same_plan_for_any_batch_and_mode():
    made, x = nn.Sequential(Block(), Block(), Block()), image()
    fused = fuse(made, x, memory=0.7)
    plan = set(fused._fusion.plan.saved)
    assert 0 < len(plan) < 15
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
    fused.eval()(x)
    fused.train()
    for n in (2, 5, 4, 9):
        x = torch.randn(n, 8, 7, 6)
        fused(x)
        assert saved(fused, x) <= 0.7 * saved(made, x) + 4096
    assert fused._fusion.plan.saved == plan


# ----------------------------------------------------------------------------- other ways to run it


def test_transforms():
    fused, x = fuse(Block().double()), image().double()
    state = {n: t.detach() for n, t in (*fused.named_parameters(), *fused.named_buffers())}
    torch.testing.assert_close(
        torch.func.functional_call(fused, {n: t * 2 for n, t in state.items()}, (x,)),
        torch.func.functional_call(unfuse(fused), {n: t * 2 for n, t in state.items()}, (x,)),
    )

    def loss(module, state, x):
        return torch.func.functional_call(module, state, (x,)).sin().sum()

    results = []
    for module in (fused, unfuse(fused)):
        copied = {n: t.clone() for n, t in state.items()}
        results.append(torch.func.grad(partial(loss, module), argnums=1)(copied, x))
    torch.testing.assert_close(*results)
    fused.eval()
    xs = torch.stack([x, x * 2])
    torch.testing.assert_close(torch.func.vmap(fused)(xs), torch.stack([fused(x) for x in xs]))
    tangent = torch.func.jvp(fused, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(
        tangent, torch.func.jvp(unfuse(fused), (x,), (torch.ones_like(x),))[1]
    )


def test_second_derivatives():
    made, x = Block().double(), image().double().requires_grad_()
    fused, results = fuse(copy.deepcopy(made), x.detach()), []
    for m in (fused, made):
        (grad,) = torch.autograd.grad(m(x).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [x, *m.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpoint_around(reentrant):
    fused, x = fuse(Block().double(), image().double()), image().double().requires_grad_()
    before = [b.clone() for b in fused.buffers()]
    out = torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=reentrant)
    (ours,) = torch.autograd.grad(out.sin().sum(), x) if not reentrant else (None,)
    if reentrant:
        torch.utils.checkpoint.checkpoint(fused, x, use_reentrant=True).sin().sum().backward()
        ours = x.grad
    for b, value in zip(fused.buffers(), before, strict=True):
        b.data.copy_(value)
    (theirs,) = torch.autograd.grad(fused(x).sin().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_wrapper_that_calls_it_in_another_mode():
    class Twice(nn.Module):
        """Test-time augmentation while it trains."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            out = self.net(x)
            with torch.no_grad():
                self.net.eval()
                views = [self.net(x.flip(d)) for d in (2, 3)]
                self.net.train()
            return out + sum(views)

    made, x = Block().double(), image().double()
    ours, theirs = Twice(fuse(copy.deepcopy(made), x)), Twice(made)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x))
    assert saved(ours, x) < saved(theirs, x)


def test_tracers_see_the_original():
    made, x = small().eval(), picture()
    fused = fuse(made, x)
    traced = torch.jit.trace(fused, x)
    torch.testing.assert_close(traced(x), made(x))
    assert "conv_bn_chain" not in str(traced.inlined_graph)
    graph = torch.fx.symbolic_trace(nn.Sequential(fused, nn.ReLU()))
    torch.testing.assert_close(graph(x), made(x).relu())
    made_fx = torch.fx.experimental.proxy_tensor.make_fx(fused)(x)
    torch.testing.assert_close(made_fx(x), made(x))


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("strict", (False, True))
def test_export(strict):
    fused = fuse(small(), picture()).eval()
    x = picture()
    with torch.no_grad():
        program = torch.export.export(fused, (x,), strict=strict).run_decompositions()
    torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-5)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("fusedconvbn" in t for t in targets)


# -------------------------------------------------------------------------------------- TorchScript


class Scripted(nn.Module):
    """What a script has to keep: sizes, modes, several results."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, momentum=None), nn.SiLU()),
            nn.Sequential(
                conv(8, 4, bias=True), nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(0.2)
            ),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(4, track_running_stats=False),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.body(x)
        if self.training:
            x = x * 2
        return {"out": self.head(x.view(x.shape[0], 4, -1).mean(2)), "map": x}


FRESH_PROCESS = """
import sys, torch, fusedconvbn
model = torch.jit.load("model.pt")
x, expected = torch.load("data.pt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    out = model(x)
    (out["out"].square().mean() + out["map"].sin().mean()).backward()
    optimizer.step()
model.eval()
for batch, due in expected:
    torch.testing.assert_close(model(batch)["out"], due, rtol=1e-4, atol=1e-4)
"""


def test_a_scripted_model_trains_in_a_fresh_process(tmp_path):
    made, x = Scripted(), picture()
    fused = fuse(copy.deepcopy(made), x, memory="min", inplace=True)
    scripted = torch.jit.script(fused)
    assert list(scripted.state_dict()) == list(made.state_dict())
    assert "conv_bn_chain" in str(scripted.inlined_graph) and is_fused(fused)
    assert "conv_bn_chain" in str(torch.jit.script(copy.deepcopy(fused)).inlined_graph)
    state = copy.deepcopy(made.state_dict())
    for mode in (True, False, True):
        for batch in (picture(), torch.randn(7, 3, 6, 5)):
            ours, theirs = scripted.train(mode)(batch), made.train(mode)(batch)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for m in (scripted, made):
        m.load_state_dict(state)
        m.train()
    torch.testing.assert_close(dict(scripted.state_dict()), dict(made.state_dict()))
    assert saved(scripted, x) < saved(made, x)
    for m in (scripted, made):
        m.load_state_dict(state)
    scripted.save(tmp_path / "model.pt")
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = made(x)
        (out["out"].square().mean() + out["map"].sin().mean()).backward()
        optimizer.step()
    made.eval()
    expected = [(batch, made(batch)["out"].detach()) for batch in (x, torch.randn(6, 3, 6, 5))]
    torch.save((x, expected), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", FRESH_PROCESS], check=True, cwd=tmp_path)


def test_a_script_of_what_has_no_graph_is_that_of_the_original():
    made, x = small(), picture()
    with pytest.warns(UserWarning, match="example_inputs"):
        scripted = torch.jit.script(fuse(made))
    torch.testing.assert_close(scripted(x), made(x))


# ------------------------------------------------------------------------------------ torch.compile


def trains_like(call, model, made, x):
    """Of `call`, which runs `model`, and `made`: results and gradients in both modes."""
    for mode in (True, False):
        for m in (made, model):
            m.train(mode).zero_grad()
        ours, theirs = call(x), made(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        ours.sum().backward(), theirs.sum().backward()
        for p, q in zip(made.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.thin(1)
@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
@pytest.mark.parametrize("around", (False, True), ids=("model", "function"))
def test_an_outer_compile_keeps_the_chains(backend, around):
    made, x = small(), picture()
    fused = fuse(copy.deepcopy(made), x, memory=0.6, inplace=True)
    call = (lambda x: fused(x) * 1) if around else fused
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    trains_like(compiled, fused, made, x)
    for p, q in zip(made.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-4)
    made.train(), fused.train()
    ours, due = saved(compiled, x), saved(fused, x)
    assert due <= 0.6 * saved(made, x) and ours <= 1.1 * due
    assert backend != "eager" or ours == pytest.approx(due, rel=0.02)


def test_a_compiled_model_can_be_fused():
    made, x = small(), picture()
    fused = fuse(torch.compile(made, backend="aot_eager"), x)
    torch.testing.assert_close(fused(x), made(x))
    assert saved(fused, x) < saved(made, x)


@pytest.mark.parametrize("inner", (None, "aot_eager", "inductor"))
def test_the_backend(inner):
    made, x = small(), picture()
    options = {"memory": "min", "inner": inner}
    compiled = torch.compile(copy.deepcopy(made), backend="fusedconvbn", options=options)
    trains_like(compiled, compiled, made, x)
    made.train(), compiled.train()
    assert saved(compiled, x) < 0.8 * saved(made, x)


def test_the_backends_options():
    assert "fusedconvbn" in torch._dynamo.list_backends()
    made, x = small(), picture()
    theirs = saved(made, x)
    for memory, most in (
        (0.7, 0.7 * theirs),
        (int(0.6 * theirs), 0.6 * theirs),
        ("auto", 0.8 * theirs),
    ):
        compiled = torch.compile(made, backend="fusedconvbn", options={"memory": memory})
        assert saved(compiled, x) <= most
        torch._dynamo.reset()
    with pytest.raises(Exception, match="expected options 'memory', 'inner', got 'mode'"):
        torch.compile(made, backend="fusedconvbn", options={"mode": 1})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="expected memory of at least"):
        torch.compile(made, backend="fusedconvbn", options={"memory": "1KB"})(x)


# ------------------------------------------------------------------------------------------- errors


def test_fuse_leaves_no_trace_when_it_fails():
    made = small()
    with pytest.raises(ValueError, match="expected memory of at least"):
        fuse(made, picture(), memory=0.01, inplace=True)
    assert not is_fused(made) and type(made) is nn.Sequential
    with pytest.raises(ValueError, match=r"expected example_inputs with memory=0.5, got None"):
        fuse(made, memory=0.5)
    with pytest.raises(ValueError, match=r"expected example_inputs with calibrate=True, got None"):
        fuse(made, calibrate=True)
    for wrong in ("half", 0.0, -1, None, True, "6 apples"):
        with pytest.raises((ValueError, TypeError), match='expected memory "auto", "min"'):
            fuse(made, memory=wrong)
    with pytest.raises(TypeError, match=r"expected model to be an nn.Module"):
        fuse(torch.jit.script(nn.Linear(2, 2)))
    fused = fuse(made, picture(), memory="min")
    with pytest.raises(ValueError, match="expected memory of at least"):
        fuse(fused, picture(), memory="1KB", inplace=True)
    assert is_fused(fused)
    made.lock = threading.Lock()
    with pytest.raises(TypeError, match="inplace=True makes no copy"):
        fuse(made, picture())
    assert is_fused(fuse(made, picture(), inplace=True))
    fused.__class__ = type("Sharded", (type(fused),), {})
    with pytest.raises(TypeError, match="before fully_shard"):
        unfuse(fused, inplace=True)
