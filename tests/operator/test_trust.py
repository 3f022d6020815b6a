"""Threads, forks and failures in the middle of a call: parameters and running statistics are as
before, or updated, never half."""

import copy
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import leak
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fusedconvbn
from fusedconvbn import FusedConvBN, FusedConvBN2d, FusedConvTransposeBN2d

HERE = Path(__file__).parent


class Network(nn.Module):
    """Every kind of layer: with a residual, transposed, with the average over all batches, frozen,
    the tutorial's."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = FusedConvBN2d(3, 4, 3, padding=1, bias=True, activation="relu", dtype=dtype)
        self.block = FusedConvBN2d(4, 4, 3, padding=1, groups=2, activation="silu", dtype=dtype)
        self.up = FusedConvTransposeBN2d(
            4, 5, 2, stride=2, momentum=None, activation="gelu", dtype=dtype
        )
        self.frozen = FusedConvBN2d(5, 5, 1, activation="tanh", dtype=dtype)
        self.frozen.bn.eval()
        self.tutorial = FusedConvBN(5, 2, 3, dtype=dtype)

    def forward(self, x):
        x = self.first(x)
        x = self.up(self.block(x, x))
        return self.tutorial(self.frozen(x))


def network(seed=0):
    torch.manual_seed(seed)
    return Network(), torch.randn(2, 3, 6, 5)


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step(model, x, optimiser=None):
    loss = model(x).square().sin().sum()
    loss.backward()
    if optimiser is not None:
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


# ---------------------------------------------------------------------------- threads and processes


def train(model, x, steps=20):
    torch.set_num_threads(1)  # of this thread
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    return [step(model, x + i / 10, optimiser) for i in range(steps)]


@pytest.mark.parametrize("checked", (False, True))
def test_two_models_in_two_threads_are_what_they_are_alone(checked):
    alone, together = ([network(seed) for seed in (1, 2)] for _ in range(2))
    expected = [train(*pair) for pair in alone]
    losses = {}
    ready = threading.Barrier(2)

    def run(i):
        ready.wait()
        losses[i] = train(*together[i])

    fusedconvbn.check_recompute(checked)
    try:
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        fusedconvbn.check_recompute(False)
    for i in range(2):
        assert losses[i] == expected[i]
        assert same(state(together[i][0]), state(alone[i][0]))


class Steps(Dataset):
    """An item is what one training step of a layer returns."""

    def __init__(self):
        self.model, self.x = network()

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(1)
        model = copy.deepcopy(self.model)
        loss = step(model, self.x + i)
        return torch.tensor([loss, *(p.grad.double().sum() for p in model.parameters())])


def test_a_forked_worker_after_the_parent_used_the_layers():
    steps = Steps()
    expected = torch.stack([steps[i] for i in range(len(steps))])
    torch.set_num_threads(2)
    step(copy.deepcopy(steps.model), torch.randn(8, 3, 60, 50))  # with the threads of OpenMP
    loader = DataLoader(
        steps, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    assert torch.equal(torch.stack(list(loader)), expected)
    step(steps.model, steps.x)  # and the parent goes on


# Runs in a process of its own: it may hang.
FORKS = """
import os, signal, sys, threading, time, torch
from fusedconvbn import conv_bn, empty_cache

torch.set_num_threads(1)
x, w = torch.randn(1, 1, 512, 513), torch.randn(1, 1, 1, 1)
inherited = [conv_bn(x, w)]
stop = False

def work():
    while not stop:
        conv_bn(x, w)
        empty_cache()

threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
end = time.time() + 5
while time.time() < end:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        inherited.clear()
        mine = conv_bn(x, w)
        empty_cache()
        os._exit(0 if torch.isfinite(mine).all() else 1)
    _, status = os.waitpid(child, 0)
    if status != 0:
        print("a child ended with", status)
        os._exit(1)
os._exit(0)
"""


def test_forks_beside_a_thread_that_allocates(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr


# ------------------------------------------------------------------------------ allocation failures


@pytest.fixture(scope="module")
def allow(tmp_path_factory):
    """allow(n) lets n allocations pass, and fails those after them; allow(-1) ends that."""
    library = tmp_path_factory.mktemp("allocator") / "liballocator.so"
    torch_path = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", HERE / "failing_allocator.cpp"]
    command += ["-o", library, "-isystem", torch_path / "include"]
    command += ["-L", torch_path / "lib", "-lc10"]
    environment = {**os.environ, "LD_PRELOAD": ""}  # of `make sanitize`
    subprocess.run(command, check=True, env=environment)
    library = ctypes.CDLL(str(library))
    library.install()
    library.allow.argtypes = [ctypes.c_long]
    yield library.allow
    library.allow(-1)


def until_nothing_fails(allow, prepare, run, check):
    """Runs `run(prepare())` with 0, 1, … allocations before one fails, and `check`s what is left
    after each failure. Returns the result of the run that came through."""
    for count in range(1000):
        prepared = prepare()
        allow(count)
        try:
            result = run(prepared)
        except (RuntimeError, MemoryError) as error:
            allow(-1)
            assert "bad_alloc" in str(error)
            check(prepared)
        else:
            allow(-1)
            assert count > 3
            return result
        finally:
            allow(-1)
    raise AssertionError("every run failed")


CALLS = {
    "plain": dict(),
    "everything": dict(bias=True, affine=True, residual=True, activation="silu"),
    "average over all batches": dict(momentum=None, activation="relu"),
    "bfloat16": dict(dtype=torch.bfloat16, affine=True, activation="relu", residual=True),
    "channels last": dict(channels_last=True, bias=True),
    "strided": dict(strided=True, bias=True, activation="hardswish"),
    "tutorial": dict(arithmetic="tutorial"),
    "eval": dict(training=False, activation="mish", affine=True),
    "no samples": dict(batch=0),
}


def call(
    bias=False,
    affine=False,
    residual=False,
    dtype=torch.float32,
    channels_last=False,
    strided=False,
    batch=2,
    **options,
):
    """Arguments of conv_bn, with running statistics that are updated."""
    torch.manual_seed(0)
    arguments = {
        "input": torch.randn(batch, 3, 6, 5),
        "weight": torch.randn(4, 3, 3, 2),
        "running_mean": torch.randn(4),
        "running_var": torch.rand(4) + 0.5,
    }
    if bias:
        arguments["bias"] = torch.randn(4)
    if affine:
        arguments |= {"bn_weight": torch.randn(4), "bn_bias": torch.randn(4)}
    if residual:
        arguments["residual"] = torch.randn(batch, 4, 4, 4)
    arguments = {name: t.to(dtype) for name, t in arguments.items()}
    if channels_last:
        arguments["input"] = arguments["input"].to(memory_format=torch.channels_last)
    if strided:
        for name, t in arguments.items():
            arguments[name] = t.new_empty(*t.shape, 2)[..., 1].copy_(t)
    for name in arguments.keys() - {"running_mean", "running_var"}:
        arguments[name].requires_grad_()
    return arguments | {"num_batches_tracked": torch.tensor(3)} | options


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("name", CALLS)
def test_an_allocation_that_fails_in_forward(allow, name):
    torch.set_num_threads(1)
    options = CALLS[name]
    before = call(**options)
    after = call(**options)
    expected = fusedconvbn.conv_bn(**after)

    def buffers(arguments):
        return {name: arguments[name] for name in BUFFERS}

    def check(arguments):
        assert same(buffers(arguments), buffers(before)) or same(buffers(arguments), buffers(after))
        retried = fusedconvbn.conv_bn(**{**arguments, **copy.deepcopy(buffers(before))})
        assert torch.equal(retried, expected)

    out = until_nothing_fails(
        allow,
        lambda: call(**options),
        lambda arguments: (fusedconvbn.conv_bn(**arguments), arguments),
        check,
    )
    assert torch.equal(out[0], expected)
    assert same(buffers(out[1]), buffers(after))


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("activation", "accumulate"), (("relu", False), ("silu", True)))
def test_an_allocation_that_fails_in_backward(allow, activation, accumulate):
    torch.set_num_threads(1)
    model, x = network()
    model.block.activation = activation

    def prepare():
        again = copy.deepcopy(model)
        for p in again.parameters():
            p.grad = torch.ones_like(p) if accumulate else None
        return again, again(x).square().sin().sum()

    complete, loss = prepare()
    loss.backward()
    start = {n: torch.ones_like(p) if accumulate else None for n, p in model.named_parameters()}

    def is_either(name, grad):
        whole = grads(complete)[name]
        untouched = grad is None if start[name] is None else torch.equal(grad, start[name])
        return untouched or torch.equal(grad, whole)

    def check(prepared):
        failed, _ = prepared
        assert same(state(failed), state(complete))
        assert all(is_either(name, grad) for name, grad in grads(failed).items())
        failed.zero_grad()
        failed.load_state_dict(model.state_dict())
        for p in failed.parameters():
            p.grad = torch.ones_like(p) if accumulate else None
        step(failed, x)
        assert same(grads(failed), grads(complete))

    until_nothing_fails(allow, prepare, lambda prepared: prepared[1].backward(), check)


# -------------------------------------------------------------------------------------------- hooks


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def _fails_at_a_gradient(model, x):
    h = model.first(x)
    h.register_hook(stop)
    return model.tutorial(model.frozen(model.up(model.block(h, h))))


def _fails_in_a_module_hook(model, x):
    model.up.register_full_backward_hook(stop)
    return model(x)


def _fails_at_a_parameter(model, x):
    model.block.conv.weight.register_hook(stop)
    return model(x)


def _fails_where_a_tensor_is_unpacked(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, stop):
        h = model.block(model.first(x))
    return model.tutorial(model.frozen(model.up(h)))


@pytest.mark.parametrize(
    "forward",
    (
        _fails_at_a_gradient,
        _fails_in_a_module_hook,
        _fails_at_a_parameter,
        _fails_where_a_tensor_is_unpacked,
    ),
)
def test_a_hook_that_fails_in_backward(forward):
    model, x = network()
    expected = copy.deepcopy(model)
    step(expected, x)
    failed = copy.deepcopy(model)
    loss = forward(failed, x).square().sin().sum()
    after_forward = state(failed)
    with pytest.raises(Stop):
        loss.backward()
    assert same(state(failed), after_forward)
    got = grads(failed)
    assert any(g is None for g in got.values()), "the hook came too late"
    assert got["tutorial.conv_weight"] is not None, "the hook came too early"
    again = copy.deepcopy(model)
    step(again, x)
    assert same(grads(again), grads(expected))
    if forward is not _fails_where_a_tensor_is_unpacked:  # it leaves the block's residual out
        whole = grads(expected)
        assert all(g is None or torch.equal(g, whole[n]) for n, g in got.items())


def test_a_hook_that_fails_in_forward():
    model, x = network()
    model.block.register_forward_hook(stop)
    before = state(model)
    with pytest.raises(Stop):
        model(x)
    after = state(model)
    for layer, done in (("first", True), ("block", True), ("up", False)):
        for buffer in BUFFERS:
            changed = not torch.equal(before[f"{layer}.bn.{buffer}"], after[f"{layer}.bn.{buffer}"])
            assert changed == done


@pytest.mark.slow
def test_memory_does_not_grow():
    """`make leak` in small."""
    torch.set_num_threads(1)
    heap_per_step, resident = leak.measure(200)
    assert heap_per_step < 100
    assert resident < leak.RESIDENT_GROWTH
