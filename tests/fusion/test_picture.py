"""The picture of a report: every chain has a row, and names stay readable."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedconvbn import explain
from fusedconvbn.fusion.picture import _rows, _short
from fusedconvbn.fusion.report import ChainReport

pytestmark = pytest.mark.independent


@pytest.fixture(scope="module")
def report():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return explain(model, torch.randn(2, 3, 32, 32))


def test_names():
    assert _short(["conv1 → bn1", "layer1.0: conv → bn"]) == ["conv1 → bn1", "layer1.0: conv → bn"]
    deep = ["net.body: conv → bn", "net.body.a.0: conv → bn", "net.body.a.1: conv → bn"]
    assert _short(deep) == ["conv → bn", "a.0: conv → bn", "a.1: conv → bn"]
    assert _short(["net.a: conv → bn", "net.ab: conv → bn"]) == ["a: conv → bn", "ab: conv → bn"]
    (short,) = _short(["features: " + " → ".join(f"{i}.conv.bn" for i in range(9))])
    assert short == "features: 0.conv.bn → 1.conv.bn … 8.conv.bn (9 calls)"


@pytest.mark.parametrize("chains", [0, 1, 20, 50])
def test_rows_sum_up_to_the_model(report, chains):
    many = [ChainReport(f"layer.{i}: conv → bn", 10 + i, i, []) for i in range(chains)]
    rows = _rows(replace(report, chains=many, eager=10_000, saved=3_000))
    assert [sum(row[i] for row in rows) for i in (1, 2)] == [10_000, 3_000]
    assert len(rows) == min(chains, 20) + 1
    assert rows[0][0] == (f"{chains - 1}: conv → bn" if chains > 1 else rows[0][0])
    assert (f"{chains - 19} smaller chains" in [row[0] for row in rows]) == (chains == 50)


def test_all_of_it_is_drawn(report, tmp_path):
    import matplotlib

    backend = matplotlib.rcParams["backend"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters as letters
        report.plot(tmp_path / "report.svg")
    written = re.findall(r">([^<>\n]+)</text>", (tmp_path / "report.svg").read_text("utf-8"))
    assert {"0 → 1", "outside of chains", "eager", "fused"} <= {*written}
    share = report.saved / report.eager
    assert any(text.startswith(f"this plan: {share:.2f}, ") for text in written)
    assert matplotlib.rcParams["backend"] == backend  # that of a notebook, too


def test_labels_of_benchmarks_cover_nothing(tmp_path):
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    pictures = pytest.importorskip("pictures")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    ax = figure.subplots()
    near = {
        f"fuse {memory}": {"of_eager": {"saved": 0.5 + shift}, "ratio": 0.9 + shift}
        for memory, shift in (("auto", 0), ("min", 0.002), (0.3, 0.004), (0.2, 0.006), (0.1, 0.008))
    }
    near["eager"] = {"of_eager": {"saved": 1.0}, "ratio": 1.0}
    labels = pictures.plot_model(ax, near)
    figure.draw_without_rendering()
    pictures.write_labels(ax, labels)
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert {"fuse", "eager", "auto", "min"} <= boxes.keys()
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for key, other in boxes.items() if key != name)
