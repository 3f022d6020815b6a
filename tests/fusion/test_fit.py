"""fit(model, memory): what is said to fit is what a step takes, and nothing is allocated."""

import json
import sys

import pytest
import torch
from torch import nn

import fusedconvbn
from fusedconvbn import fit, fuse, track_memory
from fusedconvbn.fusion.capture import capture_whole, groups_of, paths_of
from fusedconvbn.fusion.clock import step_seconds
from fusedconvbn.fusion.graph import Graph
from fusedconvbn.fusion.plan import CPU, H100
from fusedconvbn.sources import factory_of, without_memory

pytestmark = pytest.mark.independent
fit_module = sys.modules["fusedconvbn.fusion.fit"]
largest = fit_module._largest


@pytest.fixture
def few_plans(monkeypatch):
    monkeypatch.setattr(fit_module, "_PLANS", ("eager", "min"))


def small() -> nn.Module:
    """A network with a rate that its constructor reads from a tensor, and an initialiser that reads
    from the parameter."""
    layers: list[nn.Module] = []
    for rate in torch.linspace(0, 0.5, 4).tolist():
        layers += [nn.Conv2d(3 if not layers else 32, 32, 3, padding=1), nn.BatchNorm2d(32)]
        layers += [nn.ReLU(), nn.Dropout(rate)]
    head = nn.Linear(32, 3000)
    nn.init.trunc_normal_(head.weight, std=0.02)
    assert layers[-1].p == 0.5
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.mark.parametrize("plan", ("auto", pytest.param("min", marks=pytest.mark.slow)))
def test_the_step_takes_what_was_said(plan, monkeypatch):
    monkeypatch.setattr(fit_module, "_PLANS", ("eager", plan))
    model = fusedconvbn._torchvision.models().resnet18(num_classes=10)
    found = fit(model, "150MiB", sample=(3, 64, 64), optimizer="sgd")
    eager, fused = (p.batch for p in found.plans)
    assert 0 < eager < fused
    model.to(memory_format=torch.channels_last)
    for p in found.plans:
        images = torch.randn(p.batch, 3, 64, 64).to(memory_format=torch.channels_last)
        net = model if p.plan == "eager" else fuse(model, images, memory=p.plan)
        net(images).sum().backward()  # captured, and the arena has its memory
        net.zero_grad()
        with track_memory() as step:
            net(images).sum().backward()
        net.zero_grad()
        held = [*net.parameters(), *net.parameters(), *net.buffers(), images]
        needed = step.peak + sum(t.nbytes for t in held)
        assert needed == pytest.approx(p.nbytes, rel=0.05)
        assert p.nbytes <= found.memory < p.nbytes * (p.batch + 2) / p.batch


def test_nothing_is_allocated(few_plans):
    with track_memory() as memory:
        found = fit("torchvision:vgg16_bn", "16GiB")
    assert memory.peak < 8 << 20  # the parameters alone are 528 MiB
    assert found.plans[0].batch > 16


def test_nothing_of_the_model_changes(few_plans):
    model = small().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = fit(model, "64MiB", sample=(3, 32, 32), optimizer="adam")
    assert not model.training and model[0].weight.grad is None
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert found.plans == fit(small, "64MiB", sample=(3, 32, 32), optimizer="adam").plans


def test_the_optimizer_takes_its_share(few_plans):
    batches = [
        fit(small, "16MiB", sample=(3, 8, 8), optimizer=optimizer).plans[0].batch
        for optimizer in ("none", "sgd", "adam")
    ]
    assert batches == sorted(set(batches), reverse=True)


def test_autocast_takes_less(few_plans):
    batches = [
        fit(small, "64MiB", sample=(3, 32, 32), dtype=dtype).plans[0].batch
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert 1.5 * batches[0] < batches[1] < 2.2 * batches[0]


def numbers_of(found):
    return [p.plan for p in found.plans]


def test_the_report():
    found = fit(small, "128MiB", sample=(3, 32, 32), device="h100")
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["memory"] == 128 << 20 and numbers["plans"][0]["batch"] == found.plans[0].batch
    lines = str(found).splitlines()
    assert lines[0] == "Sequential, 3×32×32, float32, optimizer adam, in 128.00 MiB"
    assert lines[2].split()[:2] == ["eager", str(found.plans[0].batch)] and "h100" in lines[1]
    assert f"{1e3 * found.plans[0].seconds:.3g} (1.00)" in lines[2]
    saved = [p.saved for p in found.plans]
    assert saved == sorted(saved, reverse=True)
    assert [p.plan for p in found.plans][:2] == ["eager", "auto"] and "min" in numbers_of(found)
    assert found.plans[-1].saved < 0.15  # with segments


@pytest.mark.parametrize("memory", (90, 1000, 10**6))
@pytest.mark.parametrize("fixed", (50, 30, 80))
@pytest.mark.parametrize("kinks", ([], [(0, 11)], [(400, 3), (0, 9)], [(90, 0)]))
def test_few_batches_are_counted(memory, kinks, fixed):
    """What a step needs is the largest of some straight lines."""

    def needs(n: int) -> int:
        counted.append(n)
        return max(a + b * n for a, b in [(50, 7), *kinks])

    counted: list[int] = []
    batch, needed = largest(memory, needs, fixed)
    assert len(counted) <= 6
    assert needed == needs(max(batch, 1))
    assert needs(batch + 1) > memory and (not batch or needs(batch) <= memory)


# ------------------------------------------------------------------ seconds


def captured(model, x):
    return capture_whole(model, type(model).forward, (x,), {})


def test_the_seconds_of_a_convolution():
    x, conv = torch.randn(2, 16, 8, 8), nn.Conv2d(16, 32, 3, padding=1, bias=False)
    forward = 2 * 2 * 32 * 64 * 16 * 9
    sum_and_gradient = 3 * H100.launch  # a sum, its gradient expanded: views do not count
    seconds = step_seconds(*captured(conv, x), CPU)
    nbytes = x.nbytes + conv.weight.nbytes + 2 * x.nbytes
    longer = max(forward / CPU.flops[4], nbytes / CPU.bandwidth)
    assert longer == forward / CPU.flops[4]
    # Twice, as the image needs no gradient; and the sum reads the result.
    assert seconds == pytest.approx(2 * longer, rel=0.05)
    on_gpu = step_seconds(*captured(conv, x), H100)
    assert 2 * H100.launch < on_gpu < 2 * H100.launch + sum_and_gradient


def test_recomputation_takes_seconds():
    model = fusedconvbn._torchvision.models().resnet18()
    module, inputs = captured(model, torch.empty(8, 3, 64, 64))
    eager = step_seconds(module, inputs, CPU)
    graph = Graph.of(module, inputs, paths_of(model), groups_of(model))
    graph.save([m.name for m in graph.maps])
    all_saved = step_seconds(graph.module, inputs, CPU)
    graph.save([])
    none_saved = step_seconds(graph.module, inputs, CPU)
    assert all_saved < eager
    added = sum(m.seconds for m in graph.maps)  # as the planner counts
    assert none_saved - all_saved == pytest.approx(added, rel=0.25)


# ------------------------------------------------------------------ sources

FILE = """
import torch
from torch import nn
from beside import WIDTH
def net():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU())
def three():
    return 3
def wide(width, depth=3):
    return net()
def fails():
    raise KeyError("weights")
text = "net"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "of_file.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("WIDTH = 8")
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "imports.py").write_text("import not_there")
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("of_file", "beside", "broken", "imports", "a_package", "a_package.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_sources(folder):
    for source in ("of_file.py:net", f"{folder}/of_file.py:net", "a_package.models:net"):
        assert factory_of(source)()[1].num_features == 8
    assert factory_of("torch.nn:ReLU")().inplace is False


@pytest.mark.parametrize("name", ("googlenet", "convnext_tiny", "deeplabv3_resnet50"))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_are_made_without_memory(name):
    with track_memory() as memory:
        model = without_memory(factory_of(f"torchvision:{name}"))
    assert memory.peak < 4 << 20 < sum(p.nbytes for p in model.parameters())


def test_timm():
    pytest.importorskip("timm", reason="timm is not installed")
    assert factory_of("timm:resnet18")().num_classes == 1000
    with pytest.raises(ValueError, match="a model that timm has, got 'resnet5'"):
        factory_of("timm:resnet5")


SOURCE_ERRORS = {
    "resnet18": "expected a source like torchvision:NAME, .* got 'resnet18'",
    ":resnet18": "expected a source like",
    "torchvision:": "expected a source like",
    "torchvision:resnet5": "expected a model that torchvision has, got 'resnet5'",
    "not_there.py:net": "expected the file of a source to exist, got 'not_there.py'",
    "of_file.py:nothing": "expected 'nothing' in of_file.py to be a function .* got nothing",
    "of_file.py:text": "expected 'text' in of_file.py to be a function or class, got str",
    "of_file.py:three": "expected of_file.py:three to return an nn.Module, got int",
    "of_file.py:wide": "expected of_file.py:wide to need no arguments, got one that needs width",
    "of_file.py:fails": "of_file.py:fails raised KeyError: 'weights'",
    "broken.py:net": "the import of broken.py raised ZeroDivisionError: division by zero",
    "imports.py:net": "the import of imports.py failed: No module named 'not_there'",
    "not_there:net": "the import of not_there failed: No module named 'not_there'",
}


@pytest.mark.parametrize("source", SOURCE_ERRORS)
def test_sources_that_name_no_model(folder, source):
    with pytest.raises((ValueError, ImportError), match=SOURCE_ERRORS[source]):
        factory_of(source)()


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


ERRORS = {
    "too little": (
        dict(memory=1000),
        "expected memory of at least [0-9]+ bytes, which a batch of 1",
    ),
    "auto": (dict(memory="auto"), "expected memory in bytes or a size like .* got 'auto'"),
    "a fraction": (dict(memory=0.5), "expected memory in bytes or a size like .* got 0.5"),
    "optimizer": (dict(optimizer="lion"), "expected optimizer to be one of none, sgd, .* 'lion'"),
    "device": (dict(device="tpu"), "expected device to be one of cpu, h100, h200, got 'tpu'"),
    "dtype": (dict(dtype=torch.float16), "expected dtype to be one of .* got torch.float16"),
    "a break": (dict(model=Breaks), "expected model to be one graph, got Breaks, which breaks at"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, few_plans):
    arguments, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"fit: {message}"):
        fit(**{"model": small, "memory": "64MiB", "sample": (3, 32, 32), **arguments})


def test_no_model():
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module"):
        fit(lambda: 3, "1GiB")
