"""explain(model): what is predicted is what is measured, and the report says all of it."""

import json

import pytest
import torch
from fusing import unit
from torch import nn
from zoo import MODELS, NETWORKS, SMALL

from fusedconvbn import explain, fuse, track_memory

pytestmark = pytest.mark.independent
NAMES = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS[1:])]


@pytest.mark.parametrize("memory", ("auto", "min", 0.7))
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_predicted(name, memory):
    model, x = MODELS[name]()
    report = explain(model, x, memory=memory)
    fused = fuse(model, x, memory=memory)
    with track_memory() as eager:
        model(x)
    with track_memory() as ours:
        fused(x)
    assert report.eager == pytest.approx(eager.saved, rel=0.001)
    assert report.saved == pytest.approx(ours.saved, rel=0.001)
    assert report.least <= report.saved
    if memory == 0.7:
        assert report.saved <= 0.7 * report.eager
    if memory == "min":
        assert report.saved == report.least
    assert report.fused_pairs == report.pairs > 0


def test_the_report(tmp_path):
    model, x = MODELS["resnet18"]()
    report = explain(model, x, memory=0.6)
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["saved"] == report.saved and len(numbers["chains"]) == 12
    maps = [m for chain in numbers["chains"] for m in chain["maps"]]
    kept = sum(m["nbytes"] for m in maps if m["kept"])
    assert report.saved - kept == report.least
    assert report.added_flops == sum(m["added_flops"] for m in maps)
    assert all(m["added_flops"] == 0 for m in maps if m["kept"])
    before = sum(chain.before for chain in report.chains)
    after = sum(chain.after for chain in report.chains)
    assert 0.8 * report.eager < before <= report.eager
    assert after <= report.saved

    printed = str(report)
    for words in ("layer1.0: conv1 → bn1 → conv2 → bn2", "saved", "recomputed", "20 of 20 pairs"):
        assert words in printed
    # Less memory is never had for fewer operations.
    saved, seconds = ([getattr(p, n) for p in report.front] for n in ("saved", "added_seconds"))
    assert saved == sorted(saved, reverse=True) and seconds == sorted(seconds)
    assert saved[-1] < report.least and report.front[0].added_flops == 0
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_measured_times_are_taken_where_asked_for():
    torch.manual_seed(0)
    cheap = nn.Sequential(nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
    dear = nn.Sequential(nn.Conv2d(64, 64, 7, padding=3), nn.BatchNorm2d(64), nn.ReLU())
    model, x = nn.Sequential(cheap, dear), torch.randn(4, 4, 48, 48)
    report = explain(model, x, memory=0.8, calibrate=True)
    (chain,) = report.chains
    assert {m.path: m.kept for m in chain.maps}["1.0"]  # the 7×7 convolution is not run again
    assert report.front[-1].added_seconds > 0


def test_errors():
    with pytest.raises(ValueError, match="explain: expected example_inputs, got None"):
        explain(nn.Conv2d(3, 3, 1), None)


class Draws(nn.Module):
    """As a detector does that draws the size of its images from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.sizes = unit(3, 8), [8, 8]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.sizes[int(torch.empty(1).uniform_(0.0, 2.0).item())]
        return self.net(nn.functional.interpolate(x, size=(size, size)))


def test_an_index_that_depends_on_a_value_breaks_the_graph():
    report = explain(Draws(), torch.randn(2, 3, 16, 16))
    assert report.fused_pairs == report.pairs == 1
    assert "the graph breaks" in str(report)  # the words are torch's from 2.14 on
    assert not report.unfused
