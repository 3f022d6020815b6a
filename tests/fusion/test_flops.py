"""`FlopCounterMode` counts a chain: forward and gradients as eager's convolutions, and apart from
them what backward makes again."""

import copy
import subprocess
import sys

import pytest
import torch
from cases import CASES, unfused
from links import PATTERNS, differentiable, draw, links, plans
from links import unfused as unfused_chain
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.profiler import profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_backward_flop,
    conv_flop_count,
    flop_registry,
    mm_flop,
)
from zoo import MODELS

import fusedconvbn
from fusedconvbn import conv_bn, fuse
from fusedconvbn.chain import Conv, pack, unpack
from fusedconvbn.flops import RECOMPUTED, backward_flops, forward_flops

aten, ops = torch.ops.aten, torch.ops.fusedconvbn


def counted(run):
    """FLOPs of a function by operator."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts().get("Global", {})


def grad(out, needs_grad):
    torch.autograd.grad(out.sum(), needs_grad, allow_unused=True)


def step(function, tensors):
    """Forward and the gradients of what requires them."""
    out = function(*tensors)
    needs_grad = [t for t in tensors if t.requires_grad]
    torch.autograd.grad(out.sum(), needs_grad, allow_unused=True)


def assert_eager(ours, theirs):
    """Forward and gradients have eager's number of FLOPs. Returns those of recomputing."""
    assert ours.keys() <= {ops._chain_forward, ops._chain_backward, RECOMPUTED}
    assert ours.get(ops._chain_forward, 0) == theirs.get(aten.convolution, 0)
    assert ours.get(ops._chain_backward, 0) == theirs.get(aten.convolution_backward, 0)
    return ours.get(RECOMPUTED, 0)


def done(run):
    """FLOPs of all convolutions and matrix products that the profiler sees: what was run, whatever
    was planned."""
    with profile(record_shapes=True) as profiler:
        run()
    total = 0
    for event in profiler.profiler.kineto_results.events():
        name, shapes, inputs = event.name(), event.shapes(), event.concrete_inputs()
        if name == "aten::mm":
            total += mm_flop(*shapes[:2], out_val=None)
        if name == "aten::convolution":
            x, w = shapes[:2]
            total += conv_flop_count(x, w, result(x, w, inputs[3:]), inputs[6])
        if name == "aten::convolution_backward":
            shapes, mask = shapes[:3], inputs[10]
            total += conv_backward_flop(*shapes, *inputs[3:10], mask, out_val=shapes[1:])
    return total


def result(x, w, options):
    x, w = torch.empty(x, device="meta"), torch.empty(w, device="meta")
    return torch.convolution(x, w, None, *options).shape


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unpacking(pattern):
    for input in (torch.ones(2, 3), [torch.ones(2, 1), torch.ones(2, 2)]):
        packed = pack(input, links(pattern))
        parts, chain = unpack(packed.tensors, packed.links, packed.scalars)
        assert vars(pack(parts, chain)) == vars(packed)


@pytest.mark.parametrize("name", CASES)
def test_a_layer(name):
    """In training its convolution is recomputed."""
    case = CASES[name]
    tensors = case.tensors()

    def counted_step(function):
        def run(*values):
            return function(dict(zip(tensors, values, strict=True)))

        return counted(lambda: step(run, list(tensors.values())))

    ours = counted_step(lambda t: conv_bn(**t, **case.options))
    theirs = counted_step(lambda t: unfused(t, case))
    assert assert_eager(ours, theirs) == theirs[aten.convolution]


@pytest.mark.parametrize("pattern", (*PATTERNS, "npn", "pn", "cnpnd"))
def test_every_plan(pattern):
    """What is counted is what the profiler saw run. Where only some gradients are asked for,
    too."""
    chain, input = links(pattern), draw(2, 3, 4, 3)
    packed = pack(input, chain)
    tensors = differentiable(packed, chain)
    for needs_grad in (tensors, tensors[:1], tensors[1:2], tensors[-1:]):
        theirs = counted(lambda w=needs_grad: grad(unfused_chain(input, chain), w))
        for saved in [*plans(len(chain)), [len(chain)]]:

            def run(saved=saved, needs_grad=needs_grad):
                grad(ops._chain_forward(packed.tensors, *packed.options, saved)[0], needs_grad)

            recomputed = assert_eager(counted(run), theirs)
            assert done(run) == sum(theirs.values()) + recomputed


@pytest.mark.parametrize("pattern", ("cncn", "ncnc", "ccnn"))
def test_what_is_not_saved_is_recomputed(pattern):
    """All convolutions but the last of which backward reads no result."""
    chain, input = links(pattern), draw(2, 3, 4, 3)
    packed = pack(input, chain)
    convolutions = [i for i, link in enumerate(chain) if isinstance(link, Conv)]
    flops = {}
    for i in convolutions:
        x = unfused_chain(input, chain[:i])
        (flops[i + 1],) = counted(lambda x=x, i=i: unfused_chain(x, chain[i : i + 1])).values()
    flops.pop(len(chain), None)
    for saved in plans(len(chain)):
        ours = counted(
            lambda saved=saved: grad(
                ops._chain_forward(packed.tensors, *packed.options, saved)[0], packed.tensors
            )
        )
        assert ours.get(RECOMPUTED, 0) == sum(f for i, f in flops.items() if i not in saved)


@pytest.mark.parametrize("chain", ("cn", "ncn", "c", "pn"))
def test_a_virtual_concatenation(chain):
    chain, parts = links(chain), [draw(2, 1, 4, 3), draw(2, 2, 4, 3)]
    packed = pack(parts, chain)
    theirs = counted(lambda: grad(unfused_chain(parts, chain), packed.tensors))

    def run():
        grad(ops._chain_forward(packed.tensors, *packed.options, [])[0], packed.tensors)

    assert done(run) == sum(theirs.values()) + assert_eager(counted(run), theirs)


@pytest.mark.parametrize(
    "name, memory",
    [
        ("resnet18", "auto"),
        ("resnet18", "min"),
        pytest.param("densenet121", "min", marks=pytest.mark.slow),
    ],
)
def test_models(name, memory):
    """`explain` foretells what is recomputed."""
    model, x = MODELS[name]()
    fused = fuse(copy.deepcopy(model), x, memory=memory)
    ours, theirs = (counted(lambda m=m: m(x).sum().backward()) for m in (fused, model))
    assert ours.pop(aten.addmm) == theirs[aten.addmm] and ours.pop(aten.mm) == theirs[aten.mm]
    recomputed = assert_eager(ours, theirs)
    assert recomputed == fusedconvbn.explain(model, x, memory=memory).added_flops


def block(activation=nn.SiLU):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation())
    return model, fuse(copy.deepcopy(model), memory="min"), torch.randn(2, 3, 8, 8)


def test_without_data():
    _, fused, x = block()
    expected = counted(lambda: fused(x).sum().backward())
    assert RECOMPUTED in expected
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert counted(lambda: fused(fake).sum().backward()) == expected
    assert counted(lambda: fused.to("meta")(x.to("meta")).sum().backward()) == expected


@pytest.mark.parametrize("activation, recomputed", [(nn.SiLU, 1), (nn.ReLU, 0)])
def test_evaluation(activation, recomputed):
    """ReLU's slope is read from the result."""
    model, fused, x = block(activation)
    model.eval(), fused.eval()
    ours, theirs = (counted(lambda m=m: m(x).sum().backward()) for m in (fused, model))
    assert assert_eager(ours, theirs) == recomputed * theirs[aten.convolution]
    with torch.no_grad():
        assert counted(lambda: fused(x)) == counted(lambda: model(x))


@pytest.mark.filterwarnings("ignore:.*global hooks on modules")
def test_compiled():
    """(Under a mode as this one a compiled model runs as if it were not.)"""
    _, fused, x = block()
    expected = counted(lambda: fused(x).sum().backward())
    assert RECOMPUTED in expected
    compiled = torch.compile(fused, backend="aot_eager")
    compiled(x).sum().backward()
    assert counted(lambda: compiled(x).sum().backward()) == expected


def test_modules_have_their_own():
    _, fused, x = block()
    with FlopCounterMode(display=False) as counter:
        nn.Sequential(fused)(x).sum().backward()
    counts = counter.get_flop_counts()
    assert counts["Sequential.0"] == counts["Global"] and RECOMPUTED in counts["Global"]


def test_the_formula_alone_has_both():
    """For what reads the registry and is no `FlopCounterMode`."""
    packed = pack(draw(2, 3, 4, 3), links("cn"))
    out, maps, statistics = ops._chain_forward(packed.tensors, *packed.options, [])
    arguments = (out, packed.tensors, maps, statistics, *packed.options, [], [0, 1])
    total = flop_registry[ops._chain_backward](*arguments, out_val=None)
    assert (
        total
        == sum(backward_flops(*arguments))
        == 3 * forward_flops(*arguments[1:2], *packed.options)
    )


@pytest.mark.parametrize("first", ("fusedconvbn", "torch.utils.flop_counter"))
def test_the_counter_is_imported_by_who_wants_it(first, tmp_path):
    code = f"""
import sys
import torch, {first}
assert "torch.utils.flop_counter" not in sys.modules or "{first}" != "fusedconvbn"
import fusedconvbn, torch.utils.flop_counter as counter
assert torch.ops.fusedconvbn._chain_forward in counter.flop_registry
assert counter.__spec__.loader is counter.__loader__
assert counter.__loader__.get_source(counter.__name__)
for name in [n for n in sys.modules if n.startswith("fusedconvbn")]:
    del sys.modules[name]
import fusedconvbn
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
