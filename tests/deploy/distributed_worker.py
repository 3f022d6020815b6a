"""Processes for test_distributed.py, and the checks that run in them.

Every process draws the joined batch, takes its own samples from it, and compares with the plain
modules that it runs on the joined batch itself. So nothing but the layers under test talks to other
processes, save where a sum is taken.
"""

import contextlib
import copy
import datetime
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedconvbn
from fusedconvbn import FusedConvBN2d
from fusedconvbn.activations import activation_module

SAMPLES = {  # of each process
    2: {"even": (2, 2), "uneven": (1, 4), "empty": (3, 0), "empty first": (0, 3)},
    4: {"even": (2, 2, 2, 2), "uneven": (3, 1, 4, 2), "empty": (2, 0, 1, 0)},
}
exact = {"rtol": 1e-10, "atol": 1e-10}

# ---------------------------------------------------------------------------------------- processes


class Processes:
    """`world_size` gloo processes on the loopback interface that run one check after another. They
    are started anew after a failure: a process that failed leaves the others waiting for it."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self.folder, self.starts = world_size, folder, 0
        self.running: list[tuple[Any, Connection]] = []

    def run(self, check: Callable[..., None], *args: Any) -> None:
        """Runs check(*args) in every process; an error names the first that failed."""
        if not self.running:
            self._start()
        for _, connection in self.running:
            connection.send((check, args))
        pending = [connection for _, connection in self.running]
        while pending:
            ready = wait(pending, timeout=120)
            for connection in ready:
                error = connection.recv()
                if error is not None:
                    self.stop()
                    raise AssertionError(error)
                pending.remove(connection)
            if not ready:
                self.stop()
                raise AssertionError(f"{check.__name__}{args}: {len(pending)} processes hang")

    def stop(self) -> None:
        for process, connection in self.running:
            connection.close()
            process.kill()
            process.join()
        self.running = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.starts += 1
        rendezvous = self.folder / f"rendezvous-{self.world_size}-{self.starts}"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self.world_size, rendezvous, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.running.append((process, ours))


def serve(rank: int, world_size: int, rendezvous: Path, connection: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    with contextlib.suppress(EOFError):
        while True:
            check, args = connection.recv()
            torch.manual_seed(0)
            try:
                check(*args)
                connection.send(None)
            except BaseException:
                connection.send(f"process {rank}: {traceback.format_exc()}")


# ------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """A synchronised layer, and how its input looks."""

    kind: str
    sizes: Sequence[Any]
    sample: Sequence[int]  # shape, without the batch
    conv: dict[str, Any] = field(default_factory=dict)
    bn: dict[str, Any] = field(default_factory=dict)
    activation: str = "none"
    residual: bool = False
    format: torch.memory_format = torch.contiguous_format

    def build(self, group: dist.ProcessGroup | None = None) -> tuple[nn.Module, "Unfused"]:
        fused = getattr(fusedconvbn, f"Fused{self.kind}")(
            *self.sizes, **self.conv, **self.bn, activation=self.activation, dtype=torch.float64
        )
        for p in fused.parameters():
            nn.init.normal_(p)
        unfused = Unfused(copy.deepcopy(fused))
        return nn.SyncBatchNorm.convert_sync_batchnorm(fused, group), unfused


class Unfused(nn.Module):
    """The children of a fused layer one after another."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = layer.conv, layer.bn
        self.activation = activation_module(layer.activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(input))
        return self.activation(out if residual is None else out + residual)


LAYERS = {
    "1d": Layer("ConvBN1d", (4, 6, 3), (4, 11), dict(stride=2, padding=1), activation="silu"),
    "2d bias": Layer("ConvBN2d", (4, 6, (3, 2)), (4, 7, 5), dict(bias=True), activation="relu"),
    "2d channels last": Layer(
        "ConvBN2d", (4, 6, 3), (4, 7, 5), activation="silu", format=torch.channels_last
    ),
    "2d depthwise": Layer(
        "ConvBN2d",
        (5, 5, 3),
        (5, 6, 7),
        dict(groups=5, padding=1, dilation=2),
        dict(momentum=0.3, eps=0.2),
        activation="hardswish",
        format=torch.channels_last,
    ),
    "2d relu residual": Layer(
        "ConvBN2d",
        (4, 6, 1),
        (4, 6, 5),
        activation="relu",
        residual=True,
        format=torch.channels_last,
    ),
    "2d gelu residual": Layer(
        "ConvBN2d", (3, 4, 2), (3, 6, 5), dict(bias=True), activation="gelu", residual=True
    ),
    "2d plain residual": Layer("ConvBN2d", (3, 4, 2), (3, 6, 5), residual=True),
    "2d no affine": Layer("ConvBN2d", (4, 6, 3), (4, 7, 5), bn=dict(affine=False)),
    "2d cumulative average": Layer(
        "ConvBN2d",
        (4, 6, 3),
        (4, 7, 5),
        dict(bias=True),
        bn=dict(momentum=None),
        activation="leaky_relu(0.2)",
    ),
    "2d no running statistics": Layer(
        "ConvBN2d",
        (4, 6, 3),
        (4, 7, 5),
        bn=dict(track_running_stats=False),
        activation="tanh",
    ),
    "3d": Layer("ConvBN3d", (3, 5, (2, 3, 1)), (3, 4, 5, 3), dict(padding=(1, 0, 2))),
    "3d channels last": Layer(
        "ConvBN3d", (3, 5, 2), (3, 4, 3, 3), activation="mish", format=torch.channels_last_3d
    ),
    "transposed 1d": Layer(
        "ConvTransposeBN1d", (4, 6, 3), (4, 5), dict(stride=2, output_padding=1)
    ),
    "transposed 2d": Layer(
        "ConvTransposeBN2d",
        (4, 6, 3),
        (4, 5, 3),
        dict(stride=(2, 3), groups=2, bias=True),
        activation="elu",
        format=torch.channels_last,
    ),
    "transposed 3d": Layer("ConvTransposeBN3d", (4, 2, 2), (4, 2, 3, 2), dict(stride=2)),
}
ONE_VALUE = Layer("ConvBN2d", (3, 4, (3, 2)), (3, 3, 2), activation="sigmoid")


def own_leaf(
    joined: Tensor, samples: Sequence[int], rank: int, layout: torch.memory_format
) -> Tensor:
    return joined.split(list(samples))[rank].clone(memory_format=layout).requires_grad_()


def summed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Over the processes."""
    # Gloo adds up memory as it lies, and a gradient from an empty channels-last batch lies in the
    # contiguous order.
    tensors = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
    for t in tensors:
        dist.all_reduce(t, group=group)
    return tensors


def trains_as_joined_batch(
    fused: nn.Module,
    unfused: nn.Module,
    layer: Layer,
    samples: Sequence[int],
    group: dist.ProcessGroup | None = None,
    steps: int = 2,
) -> None:
    rank = dist.get_rank(group)
    for step in range(steps):
        joined = torch.randn(sum(samples), *layer.sample, dtype=torch.float64) + step
        leaves = [joined.requires_grad_()]
        out_shape = unfused.conv(joined.detach()).shape
        if layer.residual:
            leaves.append(torch.randn(out_shape, dtype=torch.float64, requires_grad=True))
        dout = torch.randn(out_shape, dtype=torch.float64)
        expected = unfused(*leaves)
        expected_grads = torch.autograd.grad(expected, [*leaves, *unfused.parameters()], dout)

        own = [own_leaf(t.detach(), samples, rank, layer.format) for t in leaves]
        out = fused(own[0]) if len(own) == 1 else fused(own[0], residual=own[1])
        own_dout = dout.split(list(samples))[rank]
        grads = torch.autograd.grad(out, [*own, *fused.parameters()], own_dout)

        n = len(leaves)
        torch.testing.assert_close(out, expected.split(list(samples))[rank], **exact)
        for grad, t in zip(grads[:n], expected_grads[:n], strict=True):
            torch.testing.assert_close(grad, t.split(list(samples))[rank], **exact)
        torch.testing.assert_close(summed(grads[n:], group), list(expected_grads[n:]), **exact)
        torch.testing.assert_close(list(fused.buffers()), list(unfused.buffers()), **exact)


def check_joined_batch(name: str, split: str) -> None:
    layer = LAYERS[name]
    samples = SAMPLES[dist.get_world_size()][split]
    fused, unfused = layer.build()
    trains_as_joined_batch(fused, unfused, layer, samples)
    x = torch.randn(2, *layer.sample, dtype=torch.float64)
    if layer.bn.get("track_running_stats", True) and not layer.residual:
        torch.testing.assert_close(fused.eval()(x), unfused.eval()(x), **exact)


def check_one_value() -> None:
    fused, unfused = ONE_VALUE.build()
    world_size = dist.get_world_size()
    trains_as_joined_batch(fused, unfused, ONE_VALUE, (1,) * world_size)
    trains_as_joined_batch(fused, unfused, ONE_VALUE, (0,) * (world_size - 2) + (1, 1))


def check_no_samples_anywhere() -> None:
    fused, _ = LAYERS["2d bias"].build()
    fused.bn.running_mean.normal_()
    before = [b.clone() for b in (fused.bn.running_mean, fused.bn.running_var)]
    x = torch.empty(0, *LAYERS["2d bias"].sample, dtype=torch.float64, requires_grad=True)
    out = fused(x)
    out.sum().backward()
    assert out.shape == (0, 6, 5, 4) and x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in fused.parameters())
    torch.testing.assert_close(
        [fused.bn.running_mean, fused.bn.running_var], before, rtol=0, atol=0
    )


def check_groups() -> None:
    """Two groups of every other process; what is outside one does not matter to it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(first, world_size, 2))) for first in (0, 1)]
    layer, group = LAYERS["2d channels last"], groups[rank % 2]
    torch.manual_seed(rank % 2)
    fused, unfused = layer.build(group)
    samples = (3, 1)[: world_size // 2]
    scripted = torch.jit.script(copy.deepcopy(fused))
    for each in (fused, scripted):
        trains_as_joined_batch(each, copy.deepcopy(unfused), layer, samples, group)


def check_group_of_some() -> None:
    """All processes but the first; that one has nothing to do with it, and its own layer is not
    synchronised."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(1, world_size)))
    layer = LAYERS["2d bias"]
    fused, unfused = layer.build(group)
    if rank > 0:
        samples = (2, 1, 3)[: world_size - 1]
        trains_as_joined_batch(fused, unfused, layer, samples, group)
    else:
        x = torch.randn(2, *layer.sample, dtype=torch.float64)
        torch.testing.assert_close(fused(x), unfused(x), **exact)


def check_large_mean() -> None:
    """|mean| = 10⁴·std in float32: one-pass float32 sums would be off by more than the variance
    itself."""
    rank, samples = dist.get_rank(), SAMPLES[dist.get_world_size()]["uneven"]
    fused = FusedConvBN2d(3, 3, 1, groups=3, momentum=1.0, activation="relu")
    nn.init.ones_(fused.conv.weight)
    unfused = Unfused(copy.deepcopy(fused)).double()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    scale = torch.tensor([1.0, 0.01, 30.0])[:, None, None]
    joined = (torch.randn(sum(samples), 3, 9, 8) + 1e4) * scale
    out = fused(joined.split(samples)[rank])
    expected = unfused(joined.double())
    torch.testing.assert_close(
        fused.bn.running_var.double(), unfused.bn.running_var, rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        fused.bn.running_mean.double(), unfused.bn.running_mean, rtol=1e-7, atol=0
    )
    torch.testing.assert_close(out.double(), expected.split(samples)[rank], rtol=1e-3, atol=2e-3)


# -------------------------------------------------------------------------------------- collectives


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """The names of the collectives that are run, in this thread and in autograd's."""
    names: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield names
    names += [event.name for event in profile.events() if event.name.startswith("c10d::")]


def check_collectives() -> None:
    layer = LAYERS["2d gelu residual"]
    fused, _ = layer.build()
    x = torch.randn(2, *layer.sample, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    with collectives() as forward:
        out = fused(x, residual)
    with collectives() as backward:
        out.sum().backward()
    assert forward == backward == ["c10d::allreduce_"]
    with collectives() as no_grad, torch.no_grad():
        fused(x, residual)
    assert no_grad == ["c10d::allreduce_"]
    fused.eval()
    with collectives() as evaluation:
        fused(x, residual).sum().backward()
    assert evaluation == []


# ------------------------------------------------------------------------------------- whole models


class Dense(nn.Module):
    """Growing concatenations, whose parts' statistics several chains share, and a block with a
    residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.conv1, self.bn1 = nn.Conv2d(9, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 9, 1), nn.BatchNorm2d(9)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + x)


def check_fused_model(split: str, memory: str | float) -> None:
    model = Dense().double()
    unfused = copy.deepcopy(model)
    fused = fusedconvbn.fuse(model, torch.randn(2, 3, 6, 5, dtype=torch.float64), memory=memory)
    assert bool(fused._fusion.plan.segments) == (memory == 0.1)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    samples = SAMPLES[dist.get_world_size()][split]
    first = sum(samples[: dist.get_rank()])
    joined = torch.randn(sum(samples), 3, 6, 5, dtype=torch.float64)
    own = joined[first : first + samples[dist.get_rank()]].clone().requires_grad_()
    joined.requires_grad_()
    with collectives() as forward:
        ours = fused(own)
    with collectives() as backward:
        ours.sin().sum().backward()
    # Statistics of a part are found once, those of what is recomputed never again: 4 parts and 2
    # inner maps.
    assert forward == 6 * ["c10d::allreduce_"]
    assert backward == 5 * ["c10d::allreduce_"]
    theirs = unfused(joined)
    theirs.sin().sum().backward()
    torch.testing.assert_close(ours, theirs[first : first + len(own)], **exact)
    torch.testing.assert_close(own.grad, joined.grad[first : first + len(own)], **exact)
    gradients = summed([p.grad for p in fused.parameters()])
    for ours, p in zip(gradients, unfused.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, **exact)
    for ours, theirs in zip(fused.buffers(), unfused.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


class Necked(nn.Module):
    """The batch norm at the end is in no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.neck = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(torch.relu(self.bn(self.conv(x))).exp()) * 2


def check_batch_norm_in_no_chain() -> None:
    model = Necked().double()
    unfused = copy.deepcopy(model)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fusedconvbn.fuse(model))
    joined = torch.randn(2 * dist.get_world_size(), 3, 6, 5, dtype=torch.float64)
    own = joined.chunk(dist.get_world_size())[dist.get_rank()]
    ours, theirs = fused(own), unfused(joined).chunk(dist.get_world_size())[dist.get_rank()]
    torch.testing.assert_close(ours, theirs, **exact)
    for ours, theirs in zip(fused.buffers(), unfused.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


# -------------------------------------------------------------------------------- compilers, errors


def check_compiled(split: str) -> None:
    rank, samples = dist.get_rank(), SAMPLES[dist.get_world_size()][split]
    layer = LAYERS["2d relu residual"]
    fused, _ = layer.build()
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(samples[rank], *layer.sample, dtype=torch.float64)
        residual = torch.randn(samples[rank], 6, 6, 5, dtype=torch.float64)
        results = []
        for model in (fused, compiled):
            leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
            out = model(*leaves)
            grads = torch.autograd.grad(out.square().sum(), [*leaves, *model.parameters()])
            results.append([out, *grads, *model.buffers()])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    with collectives() as forward:
        out = compiled(x, residual)
    assert forward == ["c10d::allreduce_"]


def check_scripted() -> None:
    layer, samples = LAYERS["2d bias"], SAMPLES[dist.get_world_size()]["uneven"]
    fused, unfused = layer.build()
    model = nn.Sequential(fused)
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert list(loaded.state_dict()) == list(model.state_dict())
    trains_as_joined_batch(loaded, copy.deepcopy(unfused), layer, samples, steps=3)
    # These two share their buffers. The eager model is as it was.
    trains_as_joined_batch(scripted, unfused, layer, samples, steps=3)
    trains_as_joined_batch(model, unfused, layer, samples)
    model = fusedconvbn.revert_sync_batchnorm(model)
    with collectives() as reverted:
        model(torch.randn(2, *layer.sample, dtype=torch.float64))
    assert reverted == []


def check_errors() -> None:
    layer = LAYERS["2d bias"]
    fused, _ = layer.build()
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(2, *layer.sample, dtype=torch.float64, requires_grad=True)
    arguments = (x, fused.conv.weight, fused.conv.bias, fused.bn.weight, fused.bn.bias)
    running = {name: getattr(fused.bn, name) for name, _ in fused.bn.named_buffers()}
    with pytest.raises(RuntimeError, match="nobody"):
        fusedconvbn.conv_bn(*arguments, **running, process_group="nobody")
    with pytest.raises(RuntimeError, match="type 'str'"):
        fusedconvbn.conv_bn(*arguments, **running, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="arithmetic"):
        fusedconvbn.conv_bn(*arguments, process_group="0", arithmetic="tutorial")
    torch.testing.assert_close(fused.state_dict(), before, rtol=0, atol=0)
    # Documented refusals (docs/distributed.md): the formulas for these hold for one process's
    # batch, and would be silently wrong for the joined one.
    with pytest.raises(NotImplementedError, match="synchronised"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="synchronised"):
        torch.func.jvp(fused, (x.detach(),), (x.detach(),))


def check_recompute_check() -> None:
    layer = LAYERS["2d bias"]
    fused, _ = layer.build()
    fusedconvbn.check_recompute(True)
    try:
        x = torch.randn(dist.get_rank(), *layer.sample, dtype=torch.float64)
        fused(x).sum().backward()
        x = torch.randn(2, *layer.sample, dtype=torch.float64)
        loss = fused(x).sum()
        x.data.add_(torch.randn_like(x))
        with pytest.raises(RuntimeError, match="FusedConvBN2d"):
            loss.backward()
    finally:
        fusedconvbn.check_recompute(False)
