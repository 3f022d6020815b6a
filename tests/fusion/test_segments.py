"""Segments: parts of a model that save their inputs alone and run again in backward."""

import copy
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, conv, model, same, saved, tensors_of, unit
from torch import Tensor, fx, nn
from zoo import MODELS

from fusedconvbn import explain, fuse, track_memory
from fusedconvbn.fusion import graph
from fusedconvbn.fusion.capture import capture_whole, paths_of
from fusedconvbn.fusion.curve import Curve, Point
from fusedconvbn.fusion.find import find
from fusedconvbn.fusion.layouts import Row, _peaks_of
from fusedconvbn.fusion.plan import H200, OutOfReach
from fusedconvbn.fusion.profile import profile
from fusedconvbn.fusion.report import _report
from fusedconvbn.fusion.segments import Intervals, _runs_twice, boundaries


def deep(blocks: int = 4) -> nn.Sequential:
    """A network that saves little with segments."""
    return nn.Sequential(
        unit(3, 8), *(Block() for _ in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def least(made: nn.Module, *inputs: Any) -> int:
    """The smallest budget of a model."""
    return explain(made, inputs).front[-1].saved


def segmented(made: nn.Module, *inputs: Any) -> nn.Module:
    """The model fused with the smallest budget, for which it has segments."""
    fused = fuse(copy.deepcopy(made), inputs, memory=least(made, *inputs), inplace=True)
    assert fused._fusion.plan.segments
    return fused


def test_a_small_network():
    x = torch.randn(4, 3, 12, 10)
    fused = same(deep(), x, memory=0.15)
    assert fused._fusion.plan.segments
    plain = fuse(deep().double(), x.double(), memory="min")
    assert saved(fused, x.double()) < 0.8 * saved(plain, x.double())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("googlenet", marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x1_0", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_large", marks=pytest.mark.slow),
        pytest.param("regnet_y_400mf", marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50", marks=pytest.mark.slow),
        pytest.param("r3d_18", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_without_segments(name):
    """Results and running statistics to the bit; dropout and stochastic depth included."""
    made, images = MODELS[name]()
    made, images = made.double().train(), images.double()
    fused, plain = segmented(made, images), fuse(made, images, memory="min")
    assert saved(fused, images) < saved(plain, images)

    def run(net: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        net = copy.deepcopy(net)
        torch.manual_seed(7)
        results = tensors_of(net(images))
        sum(r.square().mean() for r in results).backward()
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        return results, grads, [*net.buffers()], torch.get_rng_state()

    ours, theirs = run(fused), run(plain)
    for a, b in zip([*ours[0], *ours[2]], [*theirs[0], *theirs[2]], strict=True):
        assert torch.equal(a, b)
    scale = max(g.abs().max() for g in theirs[1])
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale.item())
    assert torch.equal(ours[3], theirs[3])  # no random number was drawn twice


def test_the_second_run_has_the_random_numbers_of_the_first():
    x = torch.randn(4, 3, 12, 10)
    layers = list(deep())
    made = nn.Sequential(*layers[:2], nn.Dropout(0.5), layers[2], nn.Dropout2d(0.3), *layers[3:])
    assert same(made, x, memory=0.15)._fusion.plan.segments


@pytest.mark.parametrize("planned", (0.0, 0.5))
def test_random_numbers_on_a_device(device, planned):
    """With 0.0 there is no dropout yet while the plan is made."""
    x, layers = torch.randn(4, 3, 12, 10).double().to(device), list(deep().double())
    made = nn.Sequential(*layers[:2], nn.Dropout(planned), *layers[2:]).to(device)
    fused, plain = segmented(made, x), fuse(made, x, memory="min")
    grads = []
    for net in (fused, plain):
        net[2].p = 0.5
        torch.manual_seed(3)
        net.zero_grad()
        net(x).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("evaluated", ("all", "one"))
def test_norms_in_evaluation(evaluated):
    """Backward needs their statistics again, whether they change their mode before the plan is made
    or later."""
    x, made = torch.randn(4, 3, 12, 10).double(), deep().double()
    made(x)
    later = segmented(made, x)
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms if evaluated == "all" else norms[3:4]:
        norm.eval()
    for ours, theirs in zip(later.modules(), made.modules(), strict=True):
        ours.training = theirs.training
    results = []
    for net in (made, segmented(made, x), later):
        net = copy.deepcopy(net)
        net.zero_grad()
        out = net(x)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters()), *net.buffers()])
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0], rtol=1e-9, atol=1e-9)


def test_batches_are_counted_once():
    x = torch.randn(4, 3, 12, 10)
    fused = segmented(deep(), x)
    for _ in range(3):
        fused(x).sum().backward()
    assert {m.num_batches_tracked.item() for m in fused.modules() if hasattr(m, "eps")} == {3}


def test_backward_runs_as_often_as_it_is_asked_for():
    x = torch.randn(4, 3, 12, 10).double().requires_grad_()
    made = deep().double()
    fused = segmented(made, x.detach())
    grads = []
    for net in (fused, made):
        result = net(x).square().sum()
        first = torch.autograd.grad(result, x, retain_graph=True)[0]
        grads.append(torch.autograd.grad(result, x)[0])
        assert torch.equal(first, grads[-1])
    torch.testing.assert_close(*grads)
    grads = []
    for net in (fused, made):
        (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), [*net.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_other_sizes_and_modes_keep_the_segments():
    x, other = torch.randn(4, 3, 12, 10), torch.randn(6, 3, 12, 10)
    made = deep()
    fused = segmented(made, x)
    assert saved(fused, other) == pytest.approx(1.5 * saved(fused, x), rel=0.01)
    fused.eval()
    made.load_state_dict(fused.state_dict())
    made.eval()
    torch.testing.assert_close(fused(x), made(x))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), made(x))


@pytest.mark.parametrize("frozen", ("stem", "norms", "all but the last"))
def test_what_needs_no_gradient_gets_none(frozen):
    x, made = torch.randn(4, 3, 12, 10), deep()
    for name, p in made.named_parameters():
        last = name.startswith("4.")
        kind = {"stem": name.startswith("0."), "norms": "bn" in name}.get(frozen, not last)
        p.requires_grad_(not kind)
    same(made, x, memory=0.9)


def test_under_autocast():
    x, made = torch.randn(4, 3, 24, 20), deep()
    with torch.autocast("cpu", torch.bfloat16):
        fused = segmented(made, x)

        plain = fuse(copy.deepcopy(made), x, memory="min", inplace=True)
    grads = []
    for net in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(x).float().square().sum()
        loss.backward()  # outside of autocast, whose state the second run needs
        grads.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def overwrites_what_is_read(self: Any, x: Tensor) -> Tensor:
    a = self.first(x)
    kept = a + 1
    b = self.second(a)
    c = self.third(b + kept)
    return c + kept.mul_(2)  # nothing has saved it


def adds_to_memory_from_outside(self: Any, x: Tensor) -> Tensor:
    a = self.first(x)
    total = a.detach().clone()
    b = self.second(a)
    total.add_(b.detach())
    return self.third(b + total)


def counts_in_a_buffer(self: Any, x: Tensor) -> Tensor:
    b = self.second(self.first(x))
    self.mean.mul_(0.5).add_(b.detach().mean((0, 2, 3)))
    return self.third(b.exp())


def writes_to_its_own_memory(self: Any, x: Tensor) -> Tensor:
    b = self.second(self.first(x)).clone()
    b[:, 0] = 0
    return self.third(b.add_(1))


def writes_through_views(self: Any, x: Tensor) -> Tensor:
    b = self.second(self.first(x)).clone()
    b[:, 0].add_(1)
    F.relu(b[:, :4], inplace=True)
    return self.third(b)


def reads_running_statistics(self: Any, x: Tensor) -> Tensor:
    b = self.second(self.first(x))
    return self.third(b * self.third[1].running_var.mean())


@pytest.mark.parametrize(
    "forward",
    (
        overwrites_what_is_read,
        adds_to_memory_from_outside,
        counts_in_a_buffer,
        writes_to_its_own_memory,
        writes_through_views,
        reads_running_statistics,
    ),
)
def test_every_interval_that_may_be_a_segment(forward):
    """Each is one alone: results, gradients and buffers are eager's."""
    torch.manual_seed(0)
    made = model(forward, first=unit(3, 8), second=unit(), third=unit()).double()
    made.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64)

    def captured(net: nn.Module) -> tuple[graph.Graph, list[Any]]:
        module, inputs = capture_whole(net, type(net).forward, (x,), {})
        return graph.Graph.of(module, inputs, paths_of(net)), inputs

    found, _ = captured(made)
    nodes = list(found.module.graph.nodes)
    at, intervals = boundaries(nodes, found.calls), Intervals(nodes)
    allowed = [(a, b) for a in at for b in at if at[b] > at[a] and at[b] in intervals.ends(at[a])]
    assert allowed
    pairs = len(at) * (len(at) - 1) // 2
    own = (writes_to_its_own_memory, writes_through_views)
    assert (len(allowed) == pairs) == (forward in own)
    expected = copy.deepcopy(made)
    result = expected(x)
    result.square().sum().backward()
    for segment in allowed:
        net = copy.deepcopy(made)
        ours, inputs = captured(net)
        ours.save(())
        ours.cut({segment: ()})
        assert "_run_segment" in ours.module.code
        (out,) = ours.module(*inputs)
        out.square().sum().backward()
        torch.testing.assert_close(out, result)
        for a, b in zip(net.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        for a, b in zip(net.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_what_may_not_run_twice():
    """What speaks to other processes, and functions of unknown libraries."""
    nodes, functional = fx.Graph(), torch.ops._c10d_functional
    x = nodes.placeholder("x")
    for target in (functional.all_reduce, functional.all_gather_into_tensor.default):
        assert not _runs_twice(nodes.call_function(target, (x, "sum", "group")))

    def function(x: Tensor) -> Tensor:
        return x

    call = nodes.call_function(function, (x,))
    call.meta["example_value"] = torch.empty(2)
    for function.__module__, runs in (("torch_of_a_user", False), ("torch.nn.functional", True)):
        assert _runs_twice(call) == runs


def test_where_there_are_no_segments_nothing_more_is_saved():
    """Maps that are saved inside segments, by what does not make them."""
    x, made = torch.randn(4, 3, 12, 10), deep()
    fused, plain = fuse(made, x, memory=0.15), fuse(made, x, memory="min")
    assert any(fused._fusion.plan.segments.values())
    module, inputs = capture_whole(made, type(made).forward, (x,), {})
    whole = graph.Graph.of(module, inputs, paths_of(made))
    whole.save(fused._fusion.plan.of(whole.maps, whole.device))
    assert profile(whole.module, inputs).saved == saved(plain, x)


def test_a_report_names_the_boundaries_of_segments():
    """Between which there may be no chain."""
    made = model(lambda self, x: self.second(self.first(x).exp()), first=unit(), second=unit())
    found = find(made, (torch.randn(3, 8, 7, 6),), {}, "min", False)
    ends = ("after", "first.0"), ("before", "second.0")
    found.plan.segments = {ends: frozenset()}
    assert _report("model", found, "").segments == ["after first.0 … before second.0"]


class Growing(nn.Module):
    """Concatenations, whose parts' statistics are computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * i) for i in range(5))
        self.convs = nn.ModuleList(conv(3 + 2 * i, 2) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], 1)
        return x


def partly_evaluated() -> nn.Module:
    made = deep(2)
    for norm in [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)][1:4]:
        norm.eval()
    return made


@pytest.mark.parametrize("network", (deep, Growing, partly_evaluated))
def test_the_bytes_of_each_segment(network):
    """What a plan with it alone saves is exact."""
    made, x = network(), torch.randn(4, 3, 12, 10)

    def captured() -> graph.Graph:
        module, inputs = capture_whole(made, type(made).forward, (x,), {})
        return graph.Graph.of(module, inputs, paths_of(made))

    row = Row(captured())
    segments = [segment for found in row._segments for segment in found]
    assert len(segments) > 5
    for segment in segments:
        parts = row.parts[segment.first : segment.last]
        cut = captured()
        cut.cut({(parts[0].begin, parts[-1].end): ()})
        assert profile(cut.module, cut.example_inputs).saved == row.least((segment,))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("efficientnet_b0", "densenet121")),
    ],
)
def test_the_curve(name):
    """A smaller budget neither takes less time nor has a higher peak, and saves what was said."""
    made, images = MODELS[name]()
    report = explain(made.train(), images)
    points = report.front
    assert points[-1].saved < 0.9 * report.least
    for more, less in itertools.pairwise(points):
        assert less.saved <= more.saved
        assert less.added_seconds >= more.added_seconds - 1e-12
        assert less.peak <= more.peak
    for point in points[:: len(points) // 3]:
        fused = fuse(made, images, memory=point.saved)
        assert saved(fused, images) == pytest.approx(point.saved, rel=0.03)
        with track_memory() as memory:
            sum(t.sum() for t in tensors_of(fused(images))).backward()
        made.zero_grad()
        assert memory.peak < 1.03 * point.peak


def test_a_budget_below_the_least():
    x = torch.randn(4, 3, 12, 10)
    nbytes = least(deep(), x)
    fuse(deep(), x, memory=nbytes)
    with pytest.raises(OutOfReach, match=f"at least {nbytes} bytes"):
        fuse(deep(), x, memory=nbytes - 1)


@pytest.mark.parametrize(
    ("name", "share"), (("resnet18", 0.8), ("resnet18", 0.6), ("mobilenet_v2", 0.4))
)
def test_a_budget_for_the_peak_of_a_step(name, share):
    """Parameters, buffers, images, gradients and the optimizer's state included."""
    last = torch.channels_last
    made, images = MODELS[name]()
    made, images = made.to(memory_format=last), torch.randn(8, 3, 160, 160).to(memory_format=last)
    trained = sum(p.nbytes for p in made.parameters())
    held = 2 * trained + images.nbytes + sum(b.nbytes for b in made.buffers())  # and a momentum

    def peak(net: nn.Module) -> int:
        net(images).sum().backward()
        net.zero_grad()
        with track_memory() as memory:
            net(images).sum().backward()
        net.zero_grad()
        return held + memory.peak

    budget = int(share * peak(made))
    if name == "resnet18" and share < 0.7:
        with pytest.raises(OutOfReach, match="a peak of at least") as error:
            fuse(made, images, memory=f"peak {budget}B", optimizer="sgd")
        budget = int(re.search(r"at least (\d+) bytes", str(error.value))[1])
    fused = fuse(made, images, memory=f"peak {budget}B", optimizer="sgd")
    assert 0.95 * budget < peak(fused) <= 1.001 * budget


def test_whose_peak_is_whose():
    """By what a chain reads alone; the highest of the others where that is not known."""
    frozen, trained, copied = (fx.Graph().placeholder("x") for _ in range(3))
    own = {frozen: set(), trained: {1, 4}, copied: {2}}  # of autocast's copies nothing is seen
    peak = _peaks_of(own, [(frozenset({1, 3}), 50), (frozenset({3}), 70), (frozenset(), 60)])
    assert [peak(chain) for chain in own] == [70, 50, 70]


def test_the_curve_leaves_out_what_is_slower_than_a_smaller_plan(monkeypatch):
    points = [(9, 0.0), (5, 2.0), (6, 1.0), (4, 3.0)]  # peak, seconds
    found = iter(Point(0, peak, seconds, 0, frozenset(), ()) for peak, seconds in points * 9)
    curve = Curve.__new__(Curve)
    curve.row, curve._least = SimpleNamespace(maps=lambda layout: []), 0
    monkeypatch.setattr(Curve, "floor", lambda self: 0)
    monkeypatch.setattr(Curve, "within", lambda self, budget: next(found))
    front = curve.front()
    assert [p.seconds for p in front] == sorted(p.seconds for p in front)
    assert [p.peak for p in front] == sorted((p.peak for p in front), reverse=True)


def test_errors_of_a_budget_for_the_peak():
    x = torch.randn(4, 3, 12, 10)
    with pytest.raises(ValueError, match="one of 'none', 'sgd', 'adam', 'adamw', got 'lamb'"):
        fuse(deep(), x, memory="peak 1GiB", optimizer="lamb")

    def breaks_at_once(self: Any, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.first(x)

    one = model(breaks_at_once, first=deep())  # all of it is in one graph, behind the break
    for broken in (nn.Sequential(deep(), Breaks()), one):
        with pytest.raises(ValueError, match="one graph for a peak as memory"):
            fuse(broken, x, memory="peak 1GiB")


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_the_curve_where_all_of_a_budget_would_lift_the_peak(monkeypatch):
    monkeypatch.setattr(graph, "device_figures", lambda device: H200)
    made, _ = MODELS["mobilenet_v2"]()
    images = torch.empty(4, 3, 160, 160).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        report = explain(made.to(memory_format=torch.channels_last).train(), images)
    assert report.front[-1].saved < 0.9 * report.least
