"""torch.compile of fused layers against the same layers run eagerly: values, graphs, compilations
and bytes."""

import copy
from collections import Counter

import pytest
import torch
from deployed import Network
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from fusedconvbn import track_memory


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


def backpropagated(function, x):
    """The result, and the gradient of x; those of the parameters are where they belong."""
    x = x.detach().clone().requires_grad_()
    out = function(x)
    (out * out).sum().backward()
    return out.detach(), x.grad


def compare(compiled, model, eager, x, **tolerance):
    """One step of both: results with strides, all gradients, and every parameter and buffer."""
    for m in (model, eager):
        m.zero_grad()
    (out, grad), (expected, expected_grad) = (backpropagated(f, x) for f in (compiled, eager))
    assert out.stride() == expected.stride()
    assert_close((out, grad), (expected, expected_grad), **tolerance)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert_close(p.grad, q.grad, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    assert_close(dict(model.state_dict()), dict(eager.state_dict()), **tolerance)


@pytest.mark.parametrize(
    ("backend", "dynamic", "dtype", "format"),
    [
        ("aot_eager", False, torch.float64, torch.channels_last),
        ("aot_eager", True, torch.float64, torch.contiguous_format),
        ("inductor", False, torch.float64, torch.contiguous_format),
        ("inductor", True, torch.float32, torch.channels_last),
    ],
)
def test_steps_of_training_and_evaluation(backend, dynamic, dtype, format):
    model = Network().to(dtype, memory_format=format)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else {}

    def batch(*shape):
        return torch.randn(*shape, dtype=dtype).to(memory_format=format)

    for size in (2, 5) if dynamic else (3, 3):
        compare(compiled, model, eager, batch(size, 3, 14, 20), **tolerance)
    assert model.tail.bn.num_batches_tracked == 2
    assert model.frozen.bn.num_batches_tracked == 0

    saved_as_in_eager(compiled, eager, batch(3, 3, 14, 20))

    model.load_state_dict(eager.state_dict())
    model.eval(), eager.eval()
    if backend == "aot_eager":
        compare(compiled, model, eager, x := batch(3, 3, 14, 20))
        torch._dynamo.reset()
    with torch.no_grad():
        assert_close(compiled(x := batch(3, 3, 14, 20)), eager(x), **tolerance)


def saved_as_in_eager(compiled, eager, x):
    """A compiled step keeps no more for backward than an eager one: maps, but for vectors and
    folded weights."""
    reports = []
    for function in (eager, compiled):
        function(x).sum().backward()
        with track_memory() as memory:
            function(x).sum().backward()
        reports.append(memory)
    eager, compiled = reports
    small = 8 << 10  # the smallest map has 10 KiB
    assert abs(compiled.saved - eager.saved) < small
    assert compiled.end_of_forward < eager.end_of_forward + small


def test_autocast():
    model = Network()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = (backpropagated(f, torch.ones(3, 3, 7, 6)) for f in (compiled, eager))
    assert out[0].dtype == torch.bfloat16
    assert_close(out, expected, rtol=0, atol=0)


def test_batch_sizes_and_switches_of_mode_compile_once_each():
    model = Network()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    seen = []
    for training in (True, False) * 3:
        model.train(training)
        for batch in (2, 3, 4, 6, 9, 16):
            compiled(torch.randn(batch, 3, 7, 6)).sum().backward()
            seen.append(counter.frame_count)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for each mode
    assert set(seen[:6]) == {seen[0]}
    assert set(seen[6:]) == {seen[6]}


def test_automatic_dynamic_shapes_compile_twice():
    model = Network()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (2, 3, 4, 6, 9, 16):
        compiled(torch.randn(batch, 3, 7, 6))
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    )  # for the first size, and for any


def operators(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def captured(model, x, training, grad):
    """The operators of the forward and, where there is one, of the backward graph."""
    graphs = []

    def compiler(module, _):
        graphs.append(operators(module.graph))
        return make_boxed_func(module)

    compiled = torch.compile(
        model.train(training), fullgraph=True, backend=aot_autograd(fw_compiler=compiler)
    )
    with torch.set_grad_enabled(grad):
        out = compiled(x)
    if grad:
        out.sum().backward()
    return graphs


def test_what_the_graphs_run():
    model, x = Network(), torch.randn(2, 3, 7, 6)
    forward, backward = captured(model, x, training=True, grad=True)
    # four layers are four chains: forward once, and once more in their backward
    assert forward["fusedconvbn._chain_forward.default"] == 4
    assert backward["fusedconvbn._chain_backward.default"] == 4
    assert "aten.convolution.default" not in forward + backward

    (evaluation,) = captured(model, x, training=False, grad=False)
    assert evaluation["aten.convolution.default"] == 4
    assert not [name for name in evaluation if "fusedconvbn" in name or "batch_norm" in name]


def test_compiled_autograd_of_a_compiled_step():
    model, x = Network().double(), torch.randn(3, 3, 7, 6, dtype=torch.float64)
    eager = copy.deepcopy(model)

    def step(x):
        model(x).square().sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    eager(x).square().sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert_close(p.grad, q.grad)


def test_compiled_autograd_of_an_eager_step():
    model, x = Network().double(), torch.randn(3, 3, 7, 6, dtype=torch.float64)
    eager = copy.deepcopy(model)
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        out, grad = backpropagated(model, x)
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1
    assert_close((out, grad), backpropagated(eager, x))
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert_close(p.grad, q.grad)
