"""`rescue`: a step that ran out of memory is repeated with a tighter plan, and nothing else shows
that it was."""

import copy
import os
import random
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, unit
from torch import nn

from fusedconvbn import fuse, is_fused, rescue, track_memory

pytestmark = pytest.mark.filterwarnings("ignore:fuse. Net saves 1.00")


def oom() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


class Net(nn.Module):
    """With dropout, so that random numbers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(unit(3, 8), Block(), nn.Dropout(0.3), Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 12, 10).double()


def made(memory: float | str = 1.0) -> nn.Module:
    torch.manual_seed(1)
    return fuse(Net().double(), images(), memory=memory)


class Fails:
    """Something that raises the error of an allocator when it is called, so many times."""

    def __init__(self, times: int, error: Exception | None = None) -> None:
        self.times, self.error = times, error or oom()

    def __call__(self, *_) -> None:
        if self.times:
            self.times -= 1
            raise self.error


def trained(net: nn.Module, fails: Fails | None, where: str, zero: str = "") -> list[torch.Tensor]:
    """Three steps, of which some run out of memory at `where`; all that they leave."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)

    def step(x, y):
        if zero == "first":
            optimizer.zero_grad()
        x = x + random.random()
        if where == "forward" and fails:
            handle = net.register_forward_hook(fails)  # statistics are updated by then
        try:
            out = net(x)
        finally:
            if where == "forward" and fails:
                handle.remove()
        if where == "backward":
            net.features[1](x.new_zeros(1, 8, 4, 4)).sum().backward()  # a part of the gradients
            out.register_hook(fails or (lambda grad: None))
        loss = F.cross_entropy(out, y)
        loss.backward()
        if where == "end" and fails:
            fails()
        optimizer.step()
        if zero == "last":
            optimizer.zero_grad()
        return loss.detach()

    run = rescue(net, step) if fails else step
    losses = []
    for i in range(3):
        torch.manual_seed(i)
        random.seed(i)
        losses.append(run(images(), torch.tensor([0, 4, 2, 1])))
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in net.parameters()]
    return [*losses, *net.state_dict().values(), *grads, torch.get_rng_state().double()]


@pytest.mark.filterwarnings("ignore:rescue")
@pytest.mark.parametrize("zero", ["first", "last"])
@pytest.mark.parametrize("where", ["forward", "backward", "end"])
def test_nothing_shows_that_a_step_was_repeated(where, zero):
    fails = Fails(2)
    net, twin = made(), made()
    ours, theirs = trained(net, fails, where, zero), trained(twin, None, where, zero)
    assert not fails.times
    assert net._fusion.plan.share < 0.5 * twin._fusion.plan.share
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "error",
    [
        oom(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_errors_of_allocators(error):
    net, fails = made(), Fails(1, error)
    before = net._fusion.plan.share

    def step(x):
        fails()
        return net(x)

    with pytest.warns(UserWarning, match=rf"rescue: .* saves 0\.\d\d .* instead of {before:.2f}"):
        assert rescue(net, step)(images()).shape == (4, 5)
    assert is_fused(net)
    assert net._fusion.plan.share <= 0.7 * before


def test_the_plan_is_made_again_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        net = fuse(Net(), images().float(), memory=1.0)
    bytes_in_half, fails = net._fusion.plan.eager, Fails(1)
    with pytest.warns(UserWarning, match="rescue"):
        rescue(net, fails)()
    assert net._fusion.plan.eager == bytes_in_half


def test_other_errors_pass():
    net = made()
    step = rescue(net, Fails(1, RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        step()


def test_plans_get_tighter_until_there_is_none():
    net, shares = made("auto"), []

    def step(x):
        shares.append(net._fusion.plan.share)
        fails()
        return net(x)

    fails = Fails(100)
    run = rescue(net, step)
    with (
        pytest.warns(UserWarning, match="rescue"),
        pytest.raises(torch.OutOfMemoryError, match=r"20.00 MiB\nrescue: .* no plan needs less"),
    ):
        run(images())
    assert 2 <= len(shares) <= 5
    assert shares == sorted(shares, reverse=True)
    # The last one has the lowest peak, and stays.
    with track_memory() as memory:
        net(images()).sum().backward()
    other = made("min")
    with track_memory() as least:
        other(images()).sum().backward()
    assert memory.peak <= least.peak


def test_a_model_of_several_graphs():
    class Breaks(Net):
        def forward(self, x):
            out = self.features[:2](x)
            torch._dynamo.graph_break()
            return self.head(self.features[2:](out).mean((2, 3)))

    x = images()
    net = fuse(Breaks().double(), x, memory=1.0)
    fails = Fails(2)

    def step(x):
        fails()
        net(x).sum().backward()

    with pytest.warns(UserWarning, match="rescue"):
        rescue(net, step)(x)
    least = fuse(unfused(net), x, memory="min")
    assert net._fusion.plan.share < 0.5
    assert net._fusion.plan.parts == least._fusion.plan.parts == 2


def unfused(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net)


def undone_steps():
    """Steps that change what cannot be brought back, and the reason that the error gives."""

    def optimizer(net, x):
        net(x).sum().backward()
        torch.optim.Adam(net.parameters()).step()
        raise oom()

    def optimizer_at_once(net, x):
        """Its state has changed, no parameter has."""
        adam = torch.optim.Adam(net.parameters())
        adam.register_step_pre_hook(Fails(1))
        net(x).sum().backward()
        adam.step()

    def parameter(net, x):
        with torch.no_grad():
            net.head.weight.mul_(0.9)
        raise oom()

    def argument(net, x):
        x.mul_(2)
        raise oom()

    def gradient(net, x):
        net(x).sum().backward()
        raise oom()

    def zeroed(net, x):
        net.zero_grad(set_to_none=False)
        raise oom()

    return [
        (optimizer, "an optimizer had begun"),
        (optimizer_at_once, "an optimizer had begun"),
        (parameter, "a parameter or an argument"),
        (argument, "a parameter or an argument"),
        (gradient, "a gradient of an earlier step"),
        (zeroed, "a gradient of an earlier step"),
    ]


@pytest.mark.parametrize("step, reason", undone_steps())
def test_what_cannot_be_undone(step, reason):
    net, x = made(), images()
    net(x).sum().backward()  # an earlier step
    with pytest.raises(torch.OutOfMemoryError, match=f"MiB\nrescue: .*: {reason}"):
        rescue(net, step)(net, x)


def test_another_process_waits(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(torch.OutOfMemoryError, match="other processes"):
        rescue(made(), Fails(1))()


def test_other_modules_of_a_step():
    net, other, fails = made(), nn.BatchNorm1d(5).double(), Fails(1)

    def step(x):
        out = other(net(x))
        out.sum().backward()
        fails()
        return out

    with pytest.warns(UserWarning, match="rescue"):
        rescue(net, step, also=[other])(images())
    assert other.num_batches_tracked == 1
    assert other.weight.grad is not None


@pytest.mark.parametrize(
    "model, what",
    [
        (Net(), "an unfused one"),
        (fuse(Net()), "fused without example_inputs"),
        (nn.Sequential(fuse(Net())), "has it inside"),
    ],
)
def test_errors(model, what):
    expected = rf"rescue: expected a model that fuse made with example_inputs, got .*{what}"
    with pytest.raises(ValueError, match=expected):
        rescue(model, lambda: None)


def test_gradients_of_arguments():
    """As of an adversarial example: those of a failed step are not added to."""
    net, fails, grads = made(), Fails(1), []

    def step(x):
        net(x).square().sum().backward()
        fails()

    for _ in range(2):
        torch.manual_seed(0)
        x = images().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rescue(net.eval(), step)(x)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_buffers_that_are_made_in_a_step():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", None)
            self.register_buffer("grid", torch.arange(3.0).expand(2, 3))  # nobody can write to it

        def forward(self, x):
            self.seen = torch.ones(()) if self.seen is None else self.seen + 1
            self.register_buffer(f"step_{self.seen:.0f}", x.sum())
            return x

    net, counts, fails = made(), Counts(), Fails(1)

    def step(x):
        net(counts(x)).sum().backward()
        fails()

    with pytest.warns(UserWarning, match="rescue"):
        rescue(net, step, also=[counts])(images())
    assert counts.seen == 1
    assert [*counts._buffers] == ["seen", "grid", "step_1"]


def test_a_batch_that_is_taken_apart():
    net, fails = made(), Fails(1)

    def step(batch):
        out = net(batch.pop("x"))
        fails()
        return out

    with pytest.warns(UserWarning, match="rescue"):
        assert rescue(net, step)({"x": images()}).shape == (4, 5)


def test_a_model_that_saves_nothing():
    net = fuse(Net().double().requires_grad_(False), images(), memory="min")
    fails = Fails(100)
    with (
        pytest.warns(UserWarning, match="rescue"),
        pytest.raises(torch.OutOfMemoryError, match="no plan needs less memory"),
    ):
        rescue(net, fails)()
    assert fails.times == 98


def test_a_model_that_cannot_be_planned_from_shapes():
    class Decides(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    x = images()
    net = fuse(Decides().double(), x, memory=1.0)

    def step(x):
        net(x).sum().backward()
        raise oom()

    with pytest.raises(torch.OutOfMemoryError, match=r"MiB\nrescue: .*cannot be planned again"):
        rescue(net, step)(x)


def test_a_batch_is_not_held():
    net, x = made(), images()
    rescue(net, lambda x: net(x).sum().backward())(x)
    reference = weakref.ref(x)
    del x
    assert reference() is None


def test_a_step_holds_nothing_more():
    """But copies of the buffers, and the state of the random numbers."""
    net, x = made("min"), images()

    def step(x):
        net.zero_grad()
        net(x).sum().backward()

    run = rescue(net, step)
    peaks = []
    for f in (step, run):
        f(x)
        with track_memory() as memory:
            f(x)
        peaks.append(memory.peak)
    buffers = sum(b.nbytes for b in net.buffers())
    assert peaks[1] <= peaks[0] + buffers + torch.get_rng_state().nbytes


def test_an_allocator_with_a_limit(device):
    """A step that needs more memory than the process may have, in a process of its own."""
    worker = Path(__file__).with_name("rescued.py")
    # Each block of malloc's that is freed goes back to the system.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, worker, device], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rescue: a step ran out of memory" in done.stderr
