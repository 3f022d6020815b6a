"""track_memory: exact bytes of known sequences, what counts as saved, and that it keeps nothing."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusedconvbn import track_memory

KIB = 1024


def block(kib, device):
    return torch.empty(kib * KIB, dtype=torch.uint8, device=device)


def test_known_sequence_without_backward(device):
    with track_memory(device) as memory:
        a = block(1, device)
        b = block(6, device)
        del b
        c = block(4, device)
    assert (memory.end_of_forward, memory.peak, memory.saved) == (5 * KIB, 7 * KIB, 0)
    assert str(memory) == ("end of forward 0.00 MiB, peak 0.01 MiB, saved for backward 0.00 MiB")
    del a, c


def test_known_sequence_with_backward(device):
    w = torch.ones(256, device=device, requires_grad=True)
    x = torch.ones(4, 256, device=device)
    one = 4 if device == "cpu" else 512  # the allocator's smallest block
    (w * x).sum().backward()  # warms up
    w.grad = None
    with track_memory(device) as memory:
        y = w * x  # 4 KiB
        loss = y.sum()  # one element
        loss.backward()  # one element to start from; then 4 KiB and w.grad
    assert memory.end_of_forward == 4 * KIB + 2 * one
    assert memory.peak == 4 * KIB + 2 * one + 4 * KIB + KIB
    assert memory.saved == 4 * KIB


def test_memory_from_before_is_not_counted():
    before = [torch.empty(5000) for _ in range(50)]
    with track_memory() as memory:
        before.clear()
        kept = block(1, "cpu")
    assert (memory.end_of_forward, memory.peak) == (KIB, KIB)
    del kept


def test_earlier_context_leaves_no_trace():
    # The CPU profiler remembers the sizes of the first blocks; the second ones reuse addresses.
    with track_memory():
        first = [torch.empty(5000) for _ in range(50)]
    del first
    second = [torch.empty(3000) for _ in range(100)]
    with track_memory() as memory:
        second.clear()
    assert (memory.end_of_forward, memory.peak) == (0, 0)


def test_saved_counts_distinct_storages_without_parameters(device):
    layer = nn.Linear(256, 64, device=device)
    with track_memory(device) as memory:
        x = torch.ones(8, 256, device=device).requires_grad_() * 1.0
        y = layer(x)  # saves x, and a view of the parameter
        z = torch.relu_(y)  # saves its output
        (z * z[:, :]).sum() + x.view(-1).square().sum() + x[2:].square().sum()
    assert memory.saved == 4 * (8 * 256 + 8 * 64)


def test_saved_counts_a_nested_view_once_and_whole():
    x = torch.ones(8, 8, requires_grad=True) + 0
    with track_memory() as memory:
        (x[1:][:, 2:][0] ** 2).sum() + (x.t()[3] ** 2).sum()
    assert memory.saved == 4 * 8 * 8


def test_saved_of_storages_that_follow_each_other_at_one_address():
    with track_memory() as memory:
        for _ in range(3):
            x = torch.ones(256, requires_grad=True) + 0
            y = x.square()
            del x, y
    assert memory.saved == 3 * KIB


def test_saved_ignores_what_backward_saves():
    x = torch.ones(256, requires_grad=True)

    def function(x):
        return x.exp().exp().exp()

    with track_memory() as memory:
        y = checkpoint(function, x + 0, use_reentrant=True)
        y.sum().backward()
    assert memory.saved == KIB


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_change_no_number_of_a_network(inplace, monkeypatch):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace),
    )
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))

    def step():
        net.zero_grad()
        with track_memory() as memory:
            F.dropout(net(x), 0.0).square().sum().backward()
        return memory, [parameter.grad for parameter in net.parameters()]

    step()
    memory, grads = step()
    monkeypatch.setattr("fusedconvbn.memory.saved_tensors_hooks", lambda *hooks: nullcontext())
    plain, plain_grads = step()
    assert plain.saved == 0 < memory.saved
    assert (memory.end_of_forward, memory.peak) == (plain.end_of_forward, plain.peak)
    torch.testing.assert_close(grads, plain_grads, rtol=0, atol=0)


def test_keeps_nothing_alive():
    gc.collect()
    gc.disable()
    try:
        with track_memory() as memory:
            x = torch.ones(4, requires_grad=True) + 0
            y = x.exp()  # saves its output
            z = (x * y).relu_()
            references = [weakref.ref(each) for each in (x, y, z)]
            storages = [weakref.ref(each.untyped_storage()) for each in (x, y, z)]
            del x, y, z
            assert [reference() for reference in references + storages] == [None] * 6
        assert memory.end_of_forward == 0
    finally:
        gc.enable()


def test_second_derivative_inside():
    x = torch.tensor([2.0, 3.0], dtype=torch.double, requires_grad=True)
    with track_memory():
        (grad,) = torch.autograd.grad((x**3).exp().log().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())


def test_inplace_change_of_a_saved_tensor_is_still_an_error():
    with track_memory():
        x = torch.ones(4, requires_grad=True) + 0
        y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["end_of_forward", "peak", "saved"])
def test_reading_too_early_is_an_error(name):
    with (
        track_memory() as memory,
        pytest.raises(RuntimeError, match=f"'{name}' can be read only after the context has ended"),
    ):
        getattr(memory, name)


def test_reading_after_an_error_is_an_error():
    with pytest.raises(KeyError), track_memory() as memory:
        raise KeyError
    with pytest.raises(RuntimeError, match="without an error"):
        print(memory)
    with track_memory() as memory:  # nothing of the first was left behind
        pass
    assert memory.peak == 0


def test_nesting_is_an_error():
    with track_memory() as memory:
        kept = block(1, "cpu")
        with pytest.raises(RuntimeError, match="no other profiler"), track_memory():
            pass
    assert memory.peak == kept.nbytes


def test_device_must_be_cpu_or_cuda():
    with (
        pytest.raises(ValueError, match="must be a cpu or cuda device, got 'meta'"),
        track_memory("meta"),
    ):
        pass
