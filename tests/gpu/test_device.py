"""What only a GPU shows: streams, graphs, indices above 2³¹. The tests with a `device` argument run
there too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import requires_cuda
from zoo import MODELS

from fusedconvbn import conv_bn, fuse
from fusedconvbn.chain import Norm, pack

pytestmark = requires_cuda


def unfused(x, w):
    return F.relu(F.batch_norm(F.conv2d(x, w, padding=1), None, None, training=True))


def fused(x, w):
    return conv_bn(x, w, padding=1, activation="relu")


def test_the_current_stream_is_used():
    x, w = torch.randn(8, 16, 64, 64, device="cuda"), torch.randn(32, 16, 3, 3, device="cuda")
    expected = unfused(x + 1, w)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x + 1
        out = fused(late, w)
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.smoke
@pytest.mark.parametrize("memory", ("auto", "min"))
def test_whole_steps_captured_in_a_graph(memory):
    """Of a fused network under autocast with its optimizer; a replay is a step like any other."""
    model, images = MODELS["resnet18"]()
    model, images = model.cuda().to(memory_format=torch.channels_last), images.cuda()
    captured, plain = (fuse(copy.deepcopy(model), images, memory=memory) for _ in range(2))

    def step_of(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def step():
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(net(images), targets)
            loss.backward()
            optimizer.step()

        return step

    targets = torch.arange(len(images), device="cuda")
    warm_up, replays = 3, 4
    step, plain_step = step_of(captured), step_of(plain)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # is not run
        step()
    for _ in range(replays):
        graph.replay()
    for _ in range(warm_up + replays):
        plain_step()
    torch.cuda.synchronize()
    assert captured.bn1.num_batches_tracked == warm_up + replays
    for (name, ours), theirs in zip(
        captured.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.smoke  # where nothing else takes memory
@pytest.mark.parametrize("channels_last", (False, True))
def test_indices_above_32_bits(channels_last):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    shape = (2, 8, 11_600, 11_600)  # 2.15e9 values
    format = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=format).normal_()
    y[-1, -1] += 3
    packed = pack(y, [Norm(activation="relu")])
    out, _, (statistics,) = torch.ops.fusedconvbn._chain_forward(
        packed.tensors, *packed.options, []
    )
    last = torch.stack([y[n, -1].double().mean() for n in range(2)]).mean()
    torch.testing.assert_close(statistics[0, -1].double(), last, rtol=1e-4, atol=1e-4)
    mean, var = statistics[:, -1]
    expected = ((y[-1, -1, -1].float() - mean) * (var + 1e-5).rsqrt()).relu()
    torch.testing.assert_close(out[-1, -1, -1].float(), expected, rtol=1e-2, atol=1e-2)
    del out
    pool = [3, 3, 2, 2, 1, 1, 1, 1, 0]
    pooled, offsets = torch.ops.fusedconvbn._max_pool2d(y, pool)
    last = y[-1:, :, -400:].clone()  # whose windows begin as those of the whole do
    dout = torch.randn_like(pooled)
    due, indices = F.max_pool2d(last, 3, 2, 1, return_indices=True)
    torch.testing.assert_close(pooled[-1:, :, -198:], due[:, :, -198:], rtol=0, atol=0)
    dinput = torch.ops.fusedconvbn._max_pool2d_backward(dout, offsets, pool, y.shape, channels_last)
    part = dout[-1:, :, -200:].contiguous(memory_format=format)
    due = torch.ops.aten.max_pool2d_with_indices_backward(
        part, last, [3, 3], [2, 2], [1, 1], [1, 1], False, indices
    )
    torch.testing.assert_close(dinput[-1:, :, -390:], due[:, :, -390:], rtol=1e-2, atol=1e-2)
