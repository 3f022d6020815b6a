"""What the operator promises about bytes: what it saves, and what it allocates."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedconvbn import FusedConvBN2d, conv_bn, track_memory
from fusedconvbn.activations import ACTIVATIONS, activation_module
from fusedconvbn.chain import Conv, Norm, pack

SMALL = (
    64 << 10
)  # vectors of C values, weights and their gradients, and what autograd allocates by the way
CHANNELS_IN, CHANNELS_OUT, SIZE, BATCH = 12, 20, 40, 8
MAP = BATCH * CHANNELS_OUT * SIZE * SIZE * 4
INPUT = BATCH * CHANNELS_IN * SIZE * SIZE * 4

LAYOUTS = pytest.mark.parametrize(
    "format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc")
)


def tensors(format, input_grad=True, weight_grad=True, device="cpu"):
    x = torch.randn(BATCH, CHANNELS_IN, SIZE, SIZE, device=device).to(memory_format=format)
    w = torch.randn(CHANNELS_OUT, CHANNELS_IN, 3, 3, device=device).to(memory_format=format)
    dout = torch.randn(BATCH, CHANNELS_OUT, SIZE, SIZE, device=device).to(memory_format=format)
    return x.requires_grad_(input_grad), w.requires_grad_(weight_grad), dout


def layer(x, w):
    return conv_bn(x, w, padding=1, activation="relu")


@LAYOUTS
def test_saves_its_input_and_nothing_of_its_size(format, device):
    x, w, _ = tensors(format, input_grad=False, device=device)
    with track_memory(device) as fused:
        layer(x, w)
    with track_memory(device) as eager:
        F.relu(F.batch_norm(F.conv2d(x, w, padding=1), None, None, training=True))
    assert INPUT <= fused.saved < INPUT + SMALL
    assert eager.saved >= INPUT + 2 * MAP

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        layer(x, w)
    assert saved[0].data_ptr() == x.data_ptr()  # the input itself, not a copy


def step(function, *arguments, dout=None):
    """What a call takes, or a call and its backward; the first one makes the library's own
    buffers."""
    for _ in range(2):
        with track_memory() as memory:
            out = function(*arguments)
            if dout is not None:
                out.backward(dout)
    return memory


def convolution(x, w):
    return F.conv2d(x, w, padding=1)


@LAYOUTS
def test_forward_allocates_one_map(format):
    """The convolution's result becomes the layer's; oneDNN's own workspace is the convolution's in
    both."""
    x, w, _ = tensors(format)
    memory = step(layer, x, w)
    assert MAP <= memory.end_of_forward < MAP + SMALL
    assert memory.peak < step(convolution, x, w).peak + SMALL


@pytest.mark.parametrize("input_grad", (True, False))
@LAYOUTS
def test_backward_allocates_the_recomputed_map_and_the_gradient_asked_for(format, input_grad):
    x, w, dout = tensors(format, input_grad=input_grad)
    memory = step(layer, x, w, dout=dout)
    assert memory.peak < step(convolution, x, w, dout=dout).peak + MAP + SMALL
    if format == torch.channels_last:  # where the convolution has no workspace
        assert memory.peak < 2 * MAP + input_grad * INPUT + 2 * SMALL


def test_backward_lets_go_of_the_gradient_that_it_was_given():
    """It is used up when the gradient of the map is made, before that of the input is."""
    x, w, dout = tensors(torch.channels_last)
    memory = step(lambda x, w: layer(x, w) * 2, x, w, dout=dout)
    assert memory.peak < 3 * MAP + 2 * SMALL  # the result, its gradient halfway, the recomputed map


@LAYOUTS
def test_eval_with_gradients_takes_a_convolution(format):
    x, w, dout = tensors(format)
    running = {"running_mean": torch.zeros(CHANNELS_OUT), "running_var": torch.ones(CHANNELS_OUT)}

    def evaluate(x, w):
        return conv_bn(x, w, padding=1, training=False, **running)

    memory, plain = step(evaluate, x, w, dout=dout), step(convolution, x, w, dout=dout)
    assert memory.end_of_forward < MAP + SMALL
    assert memory.peak < plain.peak + SMALL
    assert memory.saved < SMALL  # the input is a leaf that requires grad, and not counted


@pytest.mark.parametrize(
    ("trained", "masks"),
    [
        ("input", [(True, False, False)]),
        ("weight", [(False, True, False)]),
        ("bn_bias", []),
        ("bn_weight", []),
        ("bias", []),
    ],
)
def test_nothing_is_computed_that_nobody_asked_for(trained, masks):
    """The gradients asked of the convolution, seen at the dispatcher."""
    x, w, dout = tensors(torch.contiguous_format, False, False)
    named = {"input": x, "weight": w, "bn_weight": torch.ones(CHANNELS_OUT)}
    named["bn_bias"], named["bias"] = torch.zeros(CHANNELS_OUT), torch.zeros(CHANNELS_OUT)
    named[trained].requires_grad_()
    out = conv_bn(**named, padding=1, activation="relu")
    with torch.profiler.profile(record_shapes=True) as profiler:
        out.backward(dout)
    events = [e for e in profiler.events() if e.name == "aten::convolution_backward"]
    assert len(events) == len(masks)
    assert [tuple(e.concrete_inputs[-1]) for e in events] == masks
    convolutions = [e for e in profiler.events() if e.name == "aten::convolution"]
    assert len(convolutions) == (
        trained != "bias"
    )  # the map that is recomputed; a bias has the gradient 0 anyway


@pytest.mark.parametrize("saved", ([], [1], [2], [1, 3], [1, 2, 3]), ids=str)
def test_a_chain_saves_what_its_plan_keeps(saved):
    x, w, _ = tensors(torch.channels_last)
    second = torch.randn(16, CHANNELS_OUT, 1, 1, requires_grad=True)
    packed = pack(x, [Conv(w, padding=(1, 1)), Norm(activation="relu"), Conv(second), Norm()])
    with track_memory() as memory:
        out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, saved)[0]
    sizes = {1: MAP, 2: MAP, 3: BATCH * 16 * SIZE * SIZE * 4}
    expected = sum(sizes[i] for i in saved)
    assert expected <= memory.saved < expected + SMALL
    assert memory.end_of_forward < expected + out.nbytes + SMALL


@pytest.mark.parametrize("pattern", ("cncncn", "ncnc"))
def test_a_chain_never_needs_more_than_keeping_everything(pattern):
    """Neither in forward nor at the peak, whatever its plan keeps; and with nothing saved it needs
    less."""
    x = torch.randn(8, 16, 40, 40).to(memory_format=torch.channels_last).requires_grad_()
    links = []
    for letter in pattern:
        weight = torch.randn(16, 16, 1, 1).to(memory_format=torch.channels_last)
        links.append(Norm(activation="relu") if letter == "n" else Conv(weight.requires_grad_()))
    packed = pack(x, links)
    inner = range(1, len(links))
    dout = torch.randn_like(x)
    peaks = {}
    for count in range(len(links)):
        for saved in combinations(inner, count):

            def run(x, saved=saved):
                tensors = [x, *packed.tensors[1:]]
                return torch.ops.fusedconvbn._chain_forward(tensors, *packed.options, saved)[0]

            peaks[saved] = step(run, x, dout=dout).peak
    everything = peaks[tuple(inner)]
    assert all(peak <= everything + SMALL for peak in peaks.values())
    assert min(peaks.values()) < everything - x.nbytes


def test_the_parts_of_a_concatenation_are_saved_and_not_the_whole():
    parts = [torch.randn(8, c, 40, 40).to(memory_format=torch.channels_last) for c in (8, 16, 24)]
    weight = torch.randn(8, 48, 1, 1, requires_grad=True)
    packed = pack(parts, [Norm(activation="relu"), Conv(weight)])
    with track_memory() as memory:
        out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, [])[0]
    whole = sum(t.nbytes for t in parts)
    assert whole <= memory.saved < whole + SMALL
    assert memory.end_of_forward < out.nbytes + SMALL
    assert memory.peak < whole + out.nbytes + SMALL


class Network(nn.Module):
    """The experiment's network, on a smaller batch."""

    def __init__(self, fused):
        super().__init__()

        def pair(*sizes):
            if fused:
                return FusedConvBN2d(*sizes, activation="relu")
            return nn.Sequential(nn.Conv2d(*sizes, bias=False), nn.BatchNorm2d(sizes[1]), nn.ReLU())

        self.layers = nn.Sequential(
            pair(1, 32, 3), pair(32, 64, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9216, 128)
        )

    def forward(self, x):
        return self.layers(x)


@LAYOUTS
def test_the_experiments_network(format):
    reports = []
    for fused in (False, True):
        network = Network(fused).to(memory_format=format)
        x = torch.randn(64, 1, 28, 28)
        network(x).sum().backward()
        network.zero_grad()
        with track_memory() as memory:
            network(x).sum().backward()
        reports.append(memory)
    eager, fused = reports
    assert fused.saved <= 0.61 * eager.saved
    assert fused.end_of_forward <= 0.61 * eager.end_of_forward
    assert fused.peak <= eager.peak


# ------------------------------------------------------------------------ activations and residuals

ACTIVATED = pytest.mark.parametrize("activation", ACTIVATIONS)


class Layers(nn.Module):
    """`count` layers of `channels` channels in a row, each with its input as residual if asked
    for."""

    def __init__(self, fused, activation, residual=False, frozen=False, count=4, channels=8):
        super().__init__()
        self.fused, self.residual = fused, residual
        self.layers = nn.ModuleList(
            FusedConvBN2d(channels, channels, 3, padding=1, activation=activation)
            for _ in range(count)
        )
        self.layers.train(not frozen)

    def forward(self, x):
        for layer in self.layers:
            residual = x if self.residual else None
            if self.fused:
                x = layer(x, residual)
            else:
                u = layer.bn(layer.conv(x))
                u = u if residual is None else u + residual
                x = activation_module(layer.activation)(u)
        return x


def saved(model, *arguments):
    with track_memory() as memory:
        out = model(*arguments)
    del out
    return memory.saved


def of_a_row(activation, **options):
    """Bytes of one map, and what the unfused and the fused row save."""
    x = torch.randn(4, 8, 32, 24)
    return x.nbytes, *(saved(Layers(fused, activation, **options), x) for fused in (False, True))


@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("activation", ("silu", "mish", "gelu", "gelu_tanh", "hardswish"))
def test_a_row_of_layers_saves_one_map_of_three(activation, residual):
    a_map, eager, fused = of_a_row(activation, residual=residual)
    assert eager >= 12 * a_map
    assert 4 * a_map <= fused < 4 * a_map + SMALL // 8
    assert fused <= 0.36 * eager


@pytest.mark.parametrize("frozen", (False, True), ids=("batch", "frozen"))
@pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))
@ACTIVATED
def test_never_more_than_the_unfused_layers(activation, residual, frozen):
    """Neither in a row nor in one layer with a residual that nobody else keeps."""
    _, eager, fused = of_a_row(activation, residual=residual, frozen=frozen)
    assert fused <= eager

    layer = FusedConvBN2d(8, 8, 3, padding=1, activation=activation)
    layer.train(not frozen)
    x, residual = torch.randn(4, 8, 32, 24), torch.randn(4, 8, 32, 24) if residual else None

    def unfused(x):
        u = layer.bn(layer.conv(x))
        return activation_module(activation)(u if residual is None else u + residual)

    assert saved(lambda x: layer(x, residual), x) <= saved(unfused, x) + SMALL // 8


@pytest.mark.parametrize("following", ("plain", "fused"))
@LAYOUTS
def test_the_tail_of_a_residual_block(format, following):
    """ReLU's slope is read from the result, which the next convolution keeps anyway: eager keeps
    one map more."""
    x, shortcut = (torch.randn(4, 8, 32, 24).to(memory_format=format) for _ in range(2))
    shortcut.requires_grad_()
    tail = FusedConvBN2d(8, 8, 3, padding=1, activation="relu").to(memory_format=format)
    head = FusedConvBN2d(8, 8, 3, padding=1).to(memory_format=format)
    next_layer = head.conv if following == "plain" else head

    fused = saved(lambda: next_layer(tail(x, residual=shortcut * 1)))
    eager = saved(lambda: next_layer(F.relu(tail.bn(tail.conv(x)) + shortcut * 1)))
    assert 2 * x.nbytes <= fused < 2 * x.nbytes + SMALL // 8  # x and the tail's result
    assert eager - fused >= 0.99 * x.nbytes


def test_a_residual_without_activation_is_not_kept():
    x = torch.randn(4, 8, 32, 24)
    layer = FusedConvBN2d(8, 8, 3, padding=1)
    assert saved(lambda: layer(x, residual=torch.randn_like(x))) < x.nbytes + SMALL // 8


@ACTIVATED
def test_backward_with_a_residual_recomputes_one_map(activation):
    """Allocated next to the result and its gradients are the recomputed map, and the residual's
    gradient."""
    a_map = 4 * 8 * 64 * 48 * 4
    x, residual, dout = (
        torch.randn(4, 8, 64, 48).to(memory_format=torch.channels_last) for _ in range(3)
    )
    x.requires_grad_(), residual.requires_grad_()
    layer = FusedConvBN2d(8, 8, 1, activation=activation).to(memory_format=torch.channels_last)
    memory = step(lambda x: layer(x, residual), x, dout=dout)
    # result, recomputed map, gradients of residual and of x
    assert memory.peak < 4 * a_map + 2 * SMALL
