"""fuse(model): what a forward writes besides its result, and what fuse itself must not."""

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import conv, image, model, pair, same, saved, unit
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusedconvbn import explain, fuse, track_memory
from fusedconvbn.fusion import capture
from fusedconvbn.fusion import model as fusion_model


def sum_in_an_input(self, x, y):
    y += self.bn(self.conv(x))
    return F.relu(y)


def sum_in_a_buffer(self, x, y):
    self.state.add_(self.bn(self.conv(x)))
    return F.relu(self.state)


def gate_of_an_input(self, x, y):
    y *= x.mean((2, 3), keepdim=True)
    return F.relu(self.bn(self.conv(y)))


def gate_of_a_view(self, x, y):
    h = x * 2
    v = h[:2]
    v *= y.mean((2, 3), keepdim=True)[:2]
    return F.relu(self.bn(self.conv(v))), h


def swish_of_an_input(self, x, y):
    y.mul_(y.sigmoid())
    return F.relu(self.bn(self.conv(y)))


def swish_under_two_names(self, x, y):
    h = self.bn(self.conv(x))
    v = h[:, :4]
    h.mul_(h.sigmoid())
    return torch.cat([h, v], 1)


def list_of_weights(self, x, y):
    with torch.no_grad():
        h = self.conv(x)
        torch._foreach_mul_([self.conv.weight], 3.0)
        return F.relu(self.bn(h))


WRITES = {
    f.__name__.replace("_", " "): f
    for f in (
        *(sum_in_an_input, sum_in_a_buffer, gate_of_an_input, gate_of_a_view),
        *(swish_of_an_input, swish_under_two_names, list_of_weights),
    )
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_in_place_is_there(name):
    made, x, y = model(WRITES[name], **pair()), image(), image()
    made.register_buffer("state", torch.zeros(3, 8, 7, 6))
    fused = fuse(copy.deepcopy(made), (x, y), inplace=True)
    results = []
    for net in (made, fused):
        given = x.clone(), y.clone()
        results.append([net(*given), *given, *net.state_dict().values()])
    torch.testing.assert_close(results[1], results[0])


def test_numpys_random_numbers_are_its_own():
    def forward(self, x):
        return self.a(x) + torch.from_numpy(np.random.randn(8, 1, 1)).float()

    made, x, found = model(forward, a=unit()), image(), []
    for net in (made, fuse(made, x)):
        np.random.seed(0), torch.manual_seed(0)
        found.append([net(x), torch.tensor(np.random.rand()), torch.rand(1)])
    torch.testing.assert_close(found[0], found[1])


def test_numpys_state_is_kept_where_a_graph_breaks():
    def forward(self, x):
        y = self.a(x)
        print(end="")
        return y * np.random.beta(1, 1)

    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    explain(model(forward, a=unit()), image())
    assert np.array_equal(np.random.get_state()[1], before)


class Merged(nn.Conv2d):
    """Adds a second weight to the first in evaluation, as LoRA's layers do."""

    def __init__(self):
        super().__init__(8, 8, 3, padding=1)
        self.more, self.merged = nn.Parameter(torch.randn_like(self.weight)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.more.data if mode else self.more.data
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.more
        return self._conv_forward(x, weight, self.bias)


def test_a_train_of_ones_own_is_not_called():
    made, x = nn.Sequential(Merged(), nn.BatchNorm2d(8), nn.ReLU()).eval(), image()
    weight = made[0].weight.clone()
    report, fused = explain(made, x), fuse(made, x)
    assert made[0].merged and torch.equal(made[0].weight, weight) and report.fused_pairs == 1
    torch.testing.assert_close(fused(x), made(x), rtol=1e-4, atol=1e-4)
    assert saved(fused.train(), x) == report.saved


def test_a_batch_norm_that_also_runs_alone():
    """PyTorch's saves running_mean and running_var for backward, so that they must not get a new
    version."""

    def forward(self, x, alone=False):
        return self.bn(x) * 2 if alone else F.relu(self.bn(self.conv(x)))

    def broken(self, x):
        y = self.bn(x) * 2
        print(end="")
        return y + F.relu(self.bn(self.conv(x)))

    x = image()
    for f, loss in (
        (forward, lambda net: net(x, True).sum() + net(x).sum()),
        (forward, lambda net: net.bn(x).sum() + net(x).sum()),
        (broken, lambda net: net(x).sum()),
    ):
        made = model(f, **pair())
        fused = fuse(copy.deepcopy(made))
        for net in (made, fused):
            loss(net).backward()
        for ours, theirs in zip(fused.parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(made.named_buffers()))


def test_a_class_that_keeps_a_register_of_its_subclasses():
    known = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, name):
            known[name] = cls

    class Net(Registered, name="net"):
        def __init__(self):
            super().__init__()
            self.a = unit()

        def forward(self, x):
            return self.a(x)

    fuse(Net(), image())
    assert known == {"net": Net}


def test_hooks_on_all_modules_are_seen_later_too():
    made, x, seen = unit(), image(), []
    fused = fuse(made)
    fused(x)

    def hook(module, args, out):
        seen.append(type(module).__name__)
        return out + 5 if isinstance(module, nn.Conv2d) else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        expected, count = made(x), len(seen)
        torch.testing.assert_close(fused(x), expected)
        assert len(seen) == 2 * count
    finally:
        handle.remove()
    fused(x)
    assert len(seen) == 2 * count


def test_a_batch_of_one_raises_pytorchs_error():
    def forward(self, x):
        return self.b(self.a(x).mean((2, 3), keepdim=True))

    fused = fuse(model(forward, a=unit(), b=nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))), image())
    fused(image())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused(image(1, 8, 7, 6))


def test_threads_that_capture_at_once():
    """The second waits, or would take what the first has put there for PyTorch's own."""
    own, inside, leave = _BatchNorm.forward, threading.Event(), threading.Event()

    def first():
        with capture._captures():
            leave.wait(60)

    def second():
        with capture._captures():
            inside.set()
            done.wait(60)

    done, threads = threading.Event(), [threading.Thread(target=f) for f in (first, second)]
    threads[0].start()
    while not capture.is_capturing():
        pass
    threads[1].start()
    assert not inside.wait(0.5)
    leave.set()
    threads[0].join()
    done.set()
    threads[1].join()
    assert _BatchNorm.forward is own and not capture.is_capturing()


def test_memory_is_counted_where_a_graph_breaks():
    made, x = nn.Sequential(unit(), unit()), image(3, 8, 24, 20)
    made[0][0].register_full_backward_pre_hook(lambda module, grads: None)
    fused = fuse(made)
    for _ in range(2):
        with track_memory() as memory:
            result = fused(x)
        assert memory.saved > 0
        result.sum().backward()


def test_what_is_promised_where_numbers_are_taken_out_of_tensors():
    def at_the_end(self, x):
        x = self.b(self.a(x))
        self.means.append(x.mean().item())
        return x

    def in_a_loop(self, x):  # of which Dynamo captures nothing
        for block in (self.a, self.b):
            x = block(x)
            self.means.append(x.mean().item())
        return x

    for forward, most in ((at_the_end, 0.5), (in_a_loop, 1.0)):
        made, x = model(forward, a=unit(), b=unit()), image(3, 8, 24, 20)
        made.means = []
        report, fused = explain(made, x, memory="min"), fuse(made, x, memory="min")
        assert not made.means and report.untraceable
        assert saved(fused, x) == report.saved <= most * report.eager
        assert fused.means and all(type(mean) is float for mean in fused.means)


def test_a_tensor_as_a_fill_value():
    """Of YOLO's anchors."""

    def forward(self, x):
        x = self.b(self.a(x))
        if self.training:
            return x
        anchors = [x.new_full((x.shape[-1], 1), self.stride[i]) for i in range(2)]
        return x, torch.cat(anchors)

    made, x = model(forward, a=unit(), b=unit()), image(3, 8, 24, 20)
    made.stride = torch.tensor([8.0, 16.0])
    fused = fuse(copy.deepcopy(made), x, memory="min", inplace=True)
    for mode in (True, False, True):
        with warnings.catch_warnings(), torch.set_grad_enabled(mode):
            warnings.simplefilter("error")
            torch.testing.assert_close(fused.train(mode)(x), made.train(mode)(x))
    assert saved(fused, x) < 0.5 * saved(made, x)


def test_sizes_that_depend_on_values():
    def forward(self, x):
        return self.b(self.a(x[..., x[0, 0, 0] > -9]))

    x = image(3, 8, 24, 20)
    made = model(forward, a=unit(), b=unit())
    for memory in ("auto", "min", 0.5):
        assert explain(made, x, memory=memory).fused_pairs > 0
        for inputs in (None, x) if isinstance(memory, str) else (x,):
            fused = fuse(copy.deepcopy(made), inputs, memory=memory, inplace=True)
            torch.testing.assert_close(fused(x), copy.deepcopy(made)(x), rtol=1e-4, atol=1e-4)
            assert saved(fused, x) < 0.8 * saved(made, x)


def test_what_cannot_be_captured_runs_unfused_and_is_tried_once(monkeypatch):
    made, x, tries = unit(), image(), []
    fused, own = fuse(copy.deepcopy(made)), fusion_model.fused_graph

    def failing(*args, **kwargs):
        if fused.training:
            return own(*args, **kwargs)
        tries.append(1)
        raise ValueError("another torch")

    monkeypatch.setattr(fusion_model, "fused_graph", failing)
    made.eval(), fused.eval()
    with pytest.warns(
        UserWarning, match="runs unfused: TorchDynamo cannot capture it.*another torch"
    ):
        torch.testing.assert_close(fused(x), made(x))
    torch.testing.assert_close(fused(x), made(x))
    assert len(tries) == 1
    made.train(), fused.train()  # which can be captured
    torch.testing.assert_close(fused(x), made(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(made.named_buffers()))
    assert saved(fused, x) < 0.6 * saved(made, x)


def test_a_sum_with_zero_is_another_tensor():
    def forward(self, x):
        h = self.bn(self.conv(x))
        y = h + 0
        y += 1
        return h * y + self.a(x)

    same(model(forward, **pair(), a=unit()), image())
