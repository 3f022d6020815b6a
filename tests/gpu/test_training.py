"""What users do on a GPU, against float64: networks and their parts, in every type, under autocast,
within a memory budget. All of it also runs on the CPU, so that the tests themselves are known to be
right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import MODELS, NETWORKS

from fusedconvbn import check_recompute, conv_bn, explain, fuse, track_memory
from fusedconvbn.chain import Norm, pack

LAYOUTS = pytest.mark.parametrize(
    "format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc")
)
TYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
AUTOCAST = pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)


def error(values, truth):
    """Of all of the values together, in the euclidean norm."""
    ours, exact = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (values, truth))
    return ((ours - exact).norm() / exact.norm()).item()


def assert_as_good(ours, theirs, truth, dtype, record):
    """Results, gradients and statistics as `trained` gives them. In float64 they are eager's.
    Below, rounding is amplified by the network, in both alike: what counts is not to be worse than
    eager in the same type. For gradients one ReLU whose input is rounded to the other side of 0 is
    2 %, and may be in either."""
    names = ("results", "gradients", "gradients of vectors", "statistics")
    for name, *values in zip(names, ours, theirs, truth, strict=False):
        found, others = (error(v, values[2]) for v in values[:2])
        record(f"error of {name}, eager's", (found, others))
        floor = 2e-2 if "gradients" in name else 8 * torch.finfo(dtype).eps
        assert found <= (1e-8 if dtype == torch.float64 else 1.5 * others + floor), name


def without_chance(model):
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return model


def trained(net, images, dtype):
    """The result of a step under autocast, the gradients, those of vectors (γ, β and biases, which
    do not show in the norm of all), the running statistics."""
    net.zero_grad()
    lowered = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype if lowered else None, enabled=lowered):
        out = net(images)
    targets = torch.arange(len(images), device=images.device)
    F.cross_entropy(out.to(torch.promote_types(out.dtype, torch.float32)), targets).backward()
    statistics = [b for b in net.buffers() if b.is_floating_point()]
    gradients = [p.grad for p in net.parameters()]
    return [out], gradients, [g for g in gradients if g.dim() == 1], statistics


# -------------------------------------------------------------------------------------------- parts


SHAPES = {
    "stem": (16, 64, 56, 56),
    "last": (32, 2048, 7, 7),
    "a row of half blocks": (16, 520, 14, 14),
    "odd": (3, 24, 33, 29),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.smoke) for n in SHAPES])
@LAYOUTS
@TYPES
def test_maps_of_many_parts(name, dtype, format, device):
    """A norm link alone is the four kernels; the maps are as large as those of a network."""
    shape = SHAPES[name]
    if device == "cpu" and name != "odd":
        pytest.skip("the kernels of a GPU need large maps")
    y = (torch.randn(shape) + 2).to(device, dtype).to(memory_format=format)
    dout = torch.randn(shape).to(device, dtype).to(memory_format=format)
    weight, bias = (torch.rand(shape[1]) + 0.5).to(device), torch.randn(shape[1]).to(device)
    tensors = [t.requires_grad_() for t in (y, weight, bias)]
    packed = pack(y, [Norm(weight, bias, activation="relu")])
    out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    u = F.batch_norm(exact[0], None, None, *exact[1:], training=True)
    dout[u.abs() < 8 * torch.finfo(dtype).eps] = 0  # where a rounding decides which slope is right
    results = (out, *torch.autograd.grad(out, tensors, dout))
    truth = (u.relu(), *torch.autograd.grad(u.relu(), exact, dout.double()))
    for value, expected in zip(results, truth, strict=True):
        assert error([value], [expected]) < (1e-5 if dtype == torch.float32 else 1e-2)


class Excited(nn.Module):
    """A stem with a max pool, and a squeeze-and-excitation block: pools, a gate, a depthwise
    convolution, a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.expand, self.bn1 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.bn2, self.squeeze, self.excite = (
            nn.BatchNorm2d(24),
            nn.Conv2d(24, 6, 1),
            nn.Conv2d(6, 24, 1),
        )
        self.project, self.bn3 = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.bn3(self.project(y * gate)) + x)
        return self.head(y.mean((2, 3)))


@pytest.mark.thin(2)
@pytest.mark.smoke
@pytest.mark.parametrize("memory", ("auto", "min"))
@LAYOUTS
@TYPES
def test_gates_and_pools(dtype, format, memory, device, record_property):
    model = Excited().to(device, memory_format=format)
    images = torch.randn(6, 3, 36, 44).to(device, memory_format=format)
    fused = fuse(copy.deepcopy(model), images, memory=memory)
    exact = copy.deepcopy(model).double()
    ours, theirs = (trained(net, images, dtype) for net in (fused, model))
    truth = trained(exact, images.double(), torch.float64)
    assert_as_good(ours, theirs, truth, dtype, record_property)


# ----------------------------------------------------------------------------------------- networks


def network(name, device, format=torch.channels_last):
    model, images = MODELS[name]()
    return without_chance(model).to(device, memory_format=format), images.to(
        device, memory_format=format
    )


@pytest.mark.thin(1)
@pytest.mark.parametrize("memory", ("auto", "min"))
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet18", marks=pytest.mark.smoke),
        *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS[1:]),
    ],
)
@AUTOCAST
def test_a_fused_network(name, dtype, memory, device, record_property):
    model, images = network(name, device)
    if dtype == torch.float64:
        model, images = model.double(), images.double()
    exact, wide = copy.deepcopy(model).double(), images.double()
    fused = fuse(copy.deepcopy(model), images, memory=memory)
    ours, theirs = (trained(net, images, dtype) for net in (fused, model))
    truth = trained(exact, wide, torch.float64)
    assert_as_good(ours, theirs, truth, dtype, record_property)
    for net in (fused, model, exact):
        net.eval()
    with torch.no_grad():
        results = [[[net(x)]] for net, x in ((fused, images), (model, images), (exact, wide))]
    assert_as_good(*results, images.dtype, record_property)


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS[1:])]
)
def test_bytes_of_a_fused_network(name, device):
    model, images = network(name, device)
    nets = {"eager": model}
    nets |= {
        memory: fuse(copy.deepcopy(model), images, memory=memory) for memory in ("auto", "min")
    }
    measured = {}
    for which, net in nets.items():
        for _ in range(2):  # the first makes the libraries' own buffers
            net.zero_grad()
            with track_memory(device) as memory:
                net(images).sum().backward()
        measured[which] = memory
    for which in ("auto", "min"):
        expected = explain(model, images, memory=which).saved
        assert measured[which].saved == pytest.approx(expected, rel=0.02)
        # Blocks of a GPU are rounded up, by 1 MiB at most, and cuDNN's workspaces are among them.
        slack = 0 if device == "cpu" else 4 << 20
        assert measured[which].peak < measured["eager"].peak + slack
    assert measured["min"].saved < measured["auto"].saved < 0.65 * measured["eager"].saved


@pytest.mark.parametrize("name", NETWORKS[:2])
def test_trains_as_eager(name, device):
    """A few steps in float32, with an optimizer. Larger ones would amplify roundings, eager's as
    ours."""
    model, images = network(name, device)
    fused = fuse(copy.deepcopy(model), images)
    losses = []
    for net in (model, fused):
        optimizer = torch.optim.SGD(net.parameters(), lr=3e-5, momentum=0.9)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), torch.arange(len(images), device=device))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.smoke
@pytest.mark.parametrize("tf32", (False, True), ids=("ieee", "tf32"))
@LAYOUTS
@TYPES
def test_what_is_recomputed_is_what_forward_had(dtype, format, tf32, device):
    """However cuDNN chooses its algorithms, in forward and, in another thread, in backward."""
    check_recompute(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            for sizes, kernel in (((8, 16, 30, 28), 3), ((4, 64, 14, 15), 3), ((8, 32, 17, 9), 1)):
                for mean in (0.0, 3.0):
                    x = (torch.randn(sizes) + mean).to(device, dtype).to(memory_format=format)
                    w = torch.randn(48, sizes[1], kernel, kernel).to(device, dtype)
                    w = w.to(memory_format=format).requires_grad_()
                    out = conv_bn(x, w, padding=kernel // 2, activation="relu")
                    out.float().square().sum().backward()
    finally:
        check_recompute(False)


@pytest.mark.parametrize("memory", ("auto", "min"))
def test_compiled_by_inductor(memory, device):
    """With the fused model's operators in the graph."""
    torch._dynamo.reset()
    model = Excited().to(device, memory_format=torch.channels_last)
    images = torch.randn(6, 3, 36, 44).to(device, memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(model), images, memory=memory)
    compiled = torch.compile(copy.deepcopy(fused))
    ours, theirs = (trained(net, images, torch.float32) for net in (compiled, fused))
    for mine, other in zip(ours, theirs, strict=True):
        assert error(mine, other) < 1e-4
    torch._dynamo.reset()
