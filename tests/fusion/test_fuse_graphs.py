"""fuse(model): arguments, results and graph breaks, and forwards that are written in other ways."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from fusing import Block, chains, conv, doubled, image, model, pair, same, saved, unit
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusedconvbn import FusedConvBN2d, explain, fuse


def body(self, x):
    return F.relu(self.bn(self.conv(x)))


def layers_one_by_one(self, x):
    for layer in self.a:
        x = layer(x)
        if x.shape[-1] < 1:
            break
    return x


INPUTS = {
    "optional": (
        lambda self, x, m=None: body(self, x) if m is None else body(self, x) * m,
        (image(), image(3, 1, 7, 6)),
    ),
    "none": (
        lambda self, x, m=None: body(self, x) if m is None else body(self, x) * m,
        (image(), None),
    ),
    "number": (lambda self, x, t: body(self, x) * t, (image(), 2.5)),
    "dict": (lambda self, batch: body(self, batch["image"]), ({"image": image()},)),
    "list": (lambda self, xs: body(self, xs[0]) + xs[1], ([image(), image()],)),
    "tuple": (lambda self, xs: body(self, xs[0]) + xs[1], ((image(), image()),)),
    "one by one": (layers_one_by_one, (image(),)),
    "slices": (lambda self, x: self.a[2:](self.a[:2](x)), (image(),)),
    "int of a size": (
        lambda self, x: body(self, F.pad(x, [int(x.shape[-1]) * 0 + 1] * 4)),
        (image(),),
    ),
    "dict out": (lambda self, x: OrderedDict(out=body(self, x), aux=[self.a(x)]), (image(),)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_and_results(name):
    forward, inputs = INPUTS[name]
    same(model(forward, **pair(), a=unit()), *inputs)


class Branches(nn.Module):
    """A branch on values in the middle."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > -1e9 else x


@pytest.mark.slow
def test_several_graphs():
    report = explain(Branches(), image())
    assert (report.fused_pairs, report.pairs) == (6, 6)
    here = "test_fuse_graphs.py"
    assert any(w.startswith("at ") and here in w for w in report.untraceable)
    same(Branches(), image())
    same(nn.Sequential(Block(), Branches(), Block()), image(), memory="min")


@pytest.mark.slow
def test_several_graphs_of_one_code_and_several_sizes(monkeypatch):
    monkeypatch.setattr("fusedconvbn.fusion.model._STATIC", 2)
    made = nn.Sequential(Branches(), nn.AvgPool2d(2), Branches())
    fused = same(made, image(3, 8, 16, 12), memory=0.7)
    for n in (2, 4, 5, 6):  # sizes become dynamic
        fused(image(n, 8, 16, 12).double())
    captures = fused._fusion.captures
    fused(image(7, 8, 16, 12).double()), fused(image(8, 8, 16, 12).double())
    assert fused._fusion.captures == captures


def test_a_budget_for_several_graphs():
    made, x = nn.Sequential(Branches(), Branches()).double(), image().double()
    report = explain(made, x, memory="min")
    budget = (report.least + report.eager) // 2
    fused = fuse(made, x, memory=budget)
    assert report.least < saved(fused, x) <= budget


def test_the_convolution_in_a_module_and_the_batch_norm_outside():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 1)

        def forward(self, x, lengths):
            mask = torch.arange(x.size(-1)).expand(len(lengths), -1) >= lengths[:, None]
            return self.conv(x.masked_fill(mask[:, None], 0)), lengths

    def forward(self, x, lengths):
        y, lengths = self.a(x, lengths)
        return F.relu(self.bn(y))

    made = model(forward, a=Masked(), bn=nn.BatchNorm1d(8))
    same(made, image(2, 8, 40), torch.tensor([40, 30]), memory="min")
    assert chains(made, doubled(image(2, 8, 40)), torch.tensor([40, 30])) == ["a.conv → bn"]


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpoint_inside(reentrant):
    def forward(self, x):
        return checkpoint(self.a, self.b(x), use_reentrant=reentrant)

    made, x = model(forward, a=nn.Sequential(unit(), unit()), b=unit()), image(3, 8, 24, 20)
    for name, module in made.named_modules():  # eager's statistics move twice in a checkpoint
        if isinstance(module, nn.BatchNorm2d) and name.startswith("a"):
            module.track_running_stats, module.num_batches_tracked = False, None
    same(made, x, memory="min")
    inputs = 2 * x.double().nbytes + (8 << 10)
    assert saved(fuse(made, x.double(), memory="min"), x.double()) < inputs


def test_layers_that_are_fused_already_stay():
    made = nn.Sequential(FusedConvBN2d(3, 8, 3), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    assert chains(made, image(3, 3, 7, 6)) == ["1 → 2"]
    same(made, image(3, 3, 7, 6))


def test_nothing_is_kept_of_what_no_gradient_reaches():
    made = nn.Sequential(conv(8, 32), nn.BatchNorm2d(32), nn.ReLU(), conv(32, 4), nn.BatchNorm2d(4))
    fused = same(made, image(), memory="min")
    x = torch.ones(4, 8, 32, 32)
    for frozen in (("0.", "1."), ("0.", "1.", "3."), ("0.",), ("3.",), ("0.", "1.", "3.", "4.")):
        for m in (made, fused):
            m.train().float()
            for name, p in m.named_parameters():
                p.requires_grad_(not name.startswith(frozen))
        assert saved(fused, x) <= saved(made, x) + 4096, frozen


def test_on_the_meta_device():
    fused = fuse(nn.Sequential(unit(8, 4), unit(4, 2)).to("meta"), image().to("meta"))
    assert fused(image().to("meta")).shape == (3, 2, 7, 6)
