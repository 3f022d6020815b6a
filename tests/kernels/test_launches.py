"""What runs on CUDA, on a device that is neither the CPU nor a GPU:
tests/kernels/cuda_shim/device.cpp, which writes down every launch."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from build_cuda import build_device
from links import links

from fusedconvbn.chain import Gate, Norm, pack

ops = torch.ops.fusedconvbn
HOST = {"copy_ from the host", "copy_ to the host", "_local_scalar_dense"}  # a launch that waits
LAYOUTS = {
    "float32": (torch.float32, torch.contiguous_format),
    "bfloat16, channels last": (torch.bfloat16, torch.channels_last),
}
pytestmark = pytest.mark.slow  # the device takes a minute to compile
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """The device. It stays for as long as the process lives, and PyTorch takes it for the
    accelerator: conftest.py has these tests run last."""
    if torch.cuda.is_available():
        pytest.skip("a process has one accelerator")
    path = tmp_path_factory.mktemp("standin") / "libdevice.so"
    build_device(path)
    torch.ops.load_library(path)
    module = SimpleNamespace(  # what torch.manual_seed and torch.autocast ask for
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module("standin", module)
    # Autograd has threads for the devices that were there when it first ran.
    with torch.autograd.set_multithreading_enabled(False):
        yield torch.device("standin")


def count_launches(function):
    """How often each kernel is launched while `function` runs. One of ours goes by the type of its
    first parameter."""
    launched = torch.ops.fusedconvbn_standin.launched
    launched()
    function()
    ours = r".*\(\*\)\((?:const )?(?:[\w{}]+::)*(\w+).*"
    return dict(Counter(re.sub(ours, r"\1", name) for name in launched()))


def _check_same(found, expected, dtype):
    """Of maps that are `dtype`. A sum over them is as far off as its largest value lets it be."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        one, other = one.detach().cpu().double(), other.detach().double()
        atol = TOLERANCE[dtype] * other.abs().max().clamp_min(1).item()
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=atol)


def _copies(tensors, device):
    """The tensors on a device, as leaves of their own."""
    return [t.detach().clone().to(device).requires_grad_(t.requires_grad) for t in tensors]


def _check_counts(forward, backward, *cpu):
    """Nothing waits for the device, and nothing of the CPU's is launched."""
    for name, launches in (("forward", forward), ("backward", backward)):
        print(f"{name}, {sum(launches.values())} launches: {launches}")
        assert launches and not launches.keys() & HOST
    assert cpu == ({}, {})


def _map(*shape, dtype, format):
    return torch.randn(shape).to(dtype).to(memory_format=format).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_pytorch_are_those_of_the_cpu(standin, layout):
    dtype, format = LAYOUTS[layout]
    given = (
        _map(2, 3, 5, 4, dtype=dtype, format=format),
        _map(6, 3, 3, 3, dtype=dtype, format=torch.contiguous_format),
        *(torch.randn(6, requires_grad=True) for _ in range(2)),
        *(torch.zeros(6), torch.ones(6)),
    )

    def run(device):
        x, weight, gamma, beta, mean, var = _copies(given, device)
        y = F.conv2d(x, weight, padding=1)
        out = F.batch_norm(y, mean, var, gamma, beta, training=True).relu()
        return out, mean, var, *torch.autograd.grad(out.square().sum(), (x, weight, gamma, beta))

    _check_same(run(standin), run("cpu"), dtype)


def test_views_share_memory_and_launch_nothing(standin):
    t = torch.zeros(4, 6, device=standin)

    def write():
        t.view(2, 2, 6).transpose(0, 2)[1:].select(1, 0).unsqueeze(0).fill_(1)

    assert count_launches(write) == {"fill_": 1}
    expected = torch.zeros(4, 6)
    expected.view(2, 2, 6)[:, 0, 1:] = 1
    torch.testing.assert_close(t.cpu(), expected)


@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_bn_is_that_of_the_cpu(standin, layout, activation, residual):
    """Where the map is in bfloat16 the parameters stay in float32, as under autocast."""
    dtype, format = LAYOUTS[layout]
    given = [
        _map(2, 8, 6, 5, dtype=dtype, format=format),
        torch.randn(16, 8, 3, 3).mul(0.2).requires_grad_(),
        *(torch.randn(16, requires_grad=True) for _ in range(2)),
        *(torch.zeros(16), torch.ones(16), torch.tensor(0)),
    ]
    if residual:
        given.append(_map(2, 16, 6, 5, dtype=dtype, format=format))
    dout = _map(2, 16, 6, 5, dtype=dtype, format=format).detach()
    counts = []

    def run(device):
        tensors, gradient = _copies(given, device), dout.to(device)
        results = tensors[4:7]

        def forward():
            x, weight, *rest = tensors
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                out = ops.conv_bn(x, weight, None, *rest, padding=1, activation=activation)
            results.append(out)

        def backward():
            inputs = [t for t in tensors if t.requires_grad]
            results.extend(torch.autograd.grad(results[3], inputs, gradient))

        counts.extend(map(count_launches, (forward, backward)))
        return results

    _check_same(run(standin), run("cpu"), dtype)
    _check_counts(*counts)


@pytest.mark.parametrize("saved_maps", ((), (1,)), ids=("", "saved_maps"))
@pytest.mark.parametrize("pattern", ("cn", "cnd", "cncn", "gcn", "cng", "fcn", "cnr", "ncsc", "n"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chains_are_those_of_the_cpu(standin, layout, pattern, saved_maps):
    """The letters of `pattern` are those of test_chain.links."""
    dtype, format = LAYOUTS[layout]
    saved_maps = saved_maps if len(pattern) > 1 else ()
    packed = pack(_map(2, 3, 6, 5, dtype=dtype, format=format), links(pattern))
    needs_grad = [i for i, t in enumerate(packed.tensors) if t.requires_grad]
    given = [
        t.detach().to(dtype if i == 0 else torch.float32) for i, t in enumerate(packed.tensors)
    ]
    dout = torch.randn_like(ops._chain_forward(given, *packed.options, [])[0])
    counts = []

    def run(device):
        (*tensors, gradient), results = (t.to(device) for t in (*given, dout)), []

        def forward():
            results.append(ops._chain_forward(tensors, *packed.options, saved_maps))

        def backward():
            _, *saved = results[0]
            saved = (gradient, tensors, *saved, *packed.options, saved_maps, needs_grad)
            results.append(ops._chain_backward(*saved))

        counts.extend(map(count_launches, (forward, backward)))
        (out, maps, statistics), grads = results
        return out, *maps, *statistics, *grads

    _check_same(run(standin), run("cpu"), dtype)
    _check_counts(*counts)


PAIR = {
    "forward": {"convolution": 1, "Stats": 1, "Moments": 1, "Apply": 1, "RunningEntries": 1},
    "backward": {"convolution": 1, "GradStats": 1, "Sums": 1, "GradApply": 1}
    | {f"convolution_backward, {name}": 1 for name in ("input", "weight")},
}


@pytest.mark.parametrize("residual", (False, True), ids=("", "residual"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_of_a_pair(standin, layout, residual):
    """A convolution, its batch norm with running statistics and ReLU, in training. Under autocast
    the weight is cast each way, and its gradient."""
    dtype, format = LAYOUTS[layout]
    x = _map(2, 8, 6, 5, dtype=dtype, format=format)
    added = _map(2, 16, 6, 5, dtype=dtype, format=format) if residual else None
    given = (x, torch.randn(16, 8, 3, 3).requires_grad_(), torch.randn(16).requires_grad_())
    x, weight, gamma = _copies(given, standin)
    buffers = [t.to(standin) for t in (torch.zeros(16), torch.ones(16), torch.tensor(0))]
    added = added if added is None else _copies([added], standin)[0]
    beta, results = torch.randn(16, device=standin).requires_grad_(), []
    dout = torch.randn(2, 16, 6, 5).to(dtype).to(memory_format=format).to(standin)

    def forward():
        with torch.autocast("standin", dtype, enabled=dtype != torch.float32):
            out = ops.conv_bn(
                x, weight, None, gamma, beta, *buffers, added, padding=1, activation="relu"
            )
        results.append(out)

    def backward():
        inputs = [t for t in (x, weight, gamma, beta, added) if t is not None]
        results.extend(torch.autograd.grad(results[0], inputs, dout))

    casts = (1, 2) if dtype == torch.bfloat16 else (0, 0)
    launches = [count_launches(forward), count_launches(backward)]
    for counted, expected, cast in zip(launches, PAIR.values(), casts, strict=True):
        assert counted == expected | ({"copy_": cast} if cast else {})
    assert sum(sum(counted.values()) for counted in launches) <= 16


@pytest.mark.parametrize("samples", (2, 40))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_of_a_gate_do_not_grow_with_the_samples(standin, layout, samples):
    dtype, format = LAYOUTS[layout]
    x = _map(samples, 8, 6, 5, dtype=dtype, format=format).detach()
    gate = torch.rand(samples, 8, 1, 1, dtype=dtype)
    packed = pack(x.to(standin), [Gate(gate.to(standin))])
    results = []

    def forward():
        results.append(ops._chain_forward(packed.tensors, *packed.options, [])[0])

    def backward():
        results.extend(
            ops._chain_backward(results[0], packed.tensors, [], [], *packed.options, [], [0, 1])
        )

    half = dtype == torch.bfloat16  # the gate as a vector in float
    assert count_launches(forward) == {"Apply": 1} | ({"copy_": 1} if half else {})
    expected = {"GradStats": 1, "Sums": 1, "Apply": 1} | ({"copy_": 2} if half else {})
    assert count_launches(backward) == expected


@pytest.mark.parametrize("norms", (1, 3, 40))
def test_running_statistics_of_a_chain_are_one_launch(standin, norms):
    """Of up to 32 norms; and of one that runs twice one for each time."""
    links, buffers = [], []
    for _ in range(norms):
        buffers += [torch.zeros(3), torch.ones(3), torch.tensor(0)]
        links.append(Norm(activation="relu"))
    packed = pack(torch.randn(2, 3, 6, 5), links)

    def run(device, buffers):
        tensors = [t.to(device) for t in packed.tensors]
        rest = ([3] * norms, [0.25] * norms, [1] * norms)
        return lambda: ops.conv_bn_chain(tensors, buffers, *packed.options[:2], *rest)

    there = [t.to(standin) for t in buffers]
    launches = count_launches(run(standin, there))
    assert launches == {"RunningEntries": -(-norms // 32)} | dict.fromkeys(
        ("Stats", "Moments", "Apply"), norms
    )
    run("cpu", buffers)()
    torch.testing.assert_close([t.cpu() for t in there], buffers)
    if norms == 3:
        again = there[:3] * norms
        assert count_launches(run(standin, again))["RunningEntries"] == norms
        run("cpu", buffers[:3] * norms)()
        torch.testing.assert_close([t.cpu() for t in there[:3]], buffers[:3])
        assert there[2].item() == 1 + norms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_max_pooling_is_that_of_the_cpu(standin, layout):
    dtype, format = LAYOUTS[layout]
    given = [_map(2, 8, 7, 6, dtype=dtype, format=format)]
    dout = _map(2, 8, 4, 3, dtype=dtype, format=format).detach()
    counts = []

    def run(device):
        (x,), gradient, results = _copies(given, device), dout.to(device), []

        def forward():
            results.append(ops.max_pool2d(x, [3], [2], 1))

        def backward():
            results.extend(torch.autograd.grad(results[0], x, gradient))

        counts.extend(map(count_launches, (forward, backward)))
        return results

    _check_same(run(standin), run("cpu"), dtype)
    _check_counts(*counts)
    assert counts[:2] == [{"PoolMap": 1}, {"PoolMap": 1}]
