"""What test_distributed.py checks of DDP, FSDP2 and DTensor, in the processes of
distributed_worker.py."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_worker import SAMPLES, Unfused, exact, summed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedconvbn
from fusedconvbn import FusedConvBN2d


class Net(nn.Module):
    """Three layers, one of them with a residual. `fused` says how they are run."""

    fused = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = FusedConvBN2d(3, 6, 3, activation="silu", bias=True)
        self.narrow = FusedConvBN2d(6, 5, 1, activation="relu")
        self.widen = FusedConvBN2d(5, 6, 3, padding=1, activation="relu")
        self.head = nn.Linear(6, 4)

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        return layer(*inputs) if self.fused else Unfused(layer)(*inputs)

    def forward(self, input: Tensor) -> Tensor:
        t = self.run(self.stem, input)
        t = self.run(self.widen, self.run(self.narrow, t), t)
        return self.head(t.mean((2, 3)))


def nets(dtype: torch.dtype = torch.float64) -> tuple[Net, Net]:
    """The same network twice, to be run with and without fusion."""
    fused = Net().to(dtype)
    unfused = copy.deepcopy(fused)
    unfused.fused = False
    return fused, unfused


class Batches:
    """Three joined batches; `loss` is the mean over one of them, from all samples or, times the
    number of processes, from those of this process: what the average of gradients over the
    processes makes of it is the same."""

    def __init__(self, samples: Sequence[int]) -> None:
        self.samples, self.total = list(samples), sum(samples)
        self.batches = [torch.randn(self.total, 3, 7, 6, dtype=torch.float64) for _ in range(3)]

    def own(self, step: int) -> Tensor:
        return self.batches[step].split(self.samples)[dist.get_rank()]

    def loss(self, model: nn.Module, step: int, joined: bool = False) -> Tensor:
        if joined:
            return model(self.batches[step]).square().sum() / self.total
        return model(self.own(step)).square().sum() * len(self.samples) / self.total


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def state(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    full = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return [t.detach().clone() for t in full]


def check_ddp(static_graph: bool) -> None:
    """DDP of the fused network is DDP of the unfused one, with the buffers of process 0 in both."""
    fused, unfused = nets()
    models = []
    batches = Batches((3,) * dist.get_world_size())
    for model in (fused, unfused):
        model.stem.bn.running_mean.fill_(dist.get_rank())
        models.append(
            DistributedDataParallel(
                model, static_graph=static_graph, gradient_as_bucket_view=static_graph
            )
        )
    assert not fused.stem.bn.running_mean.any()
    optimizers = [sgd(model) for model in models]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            batches.loss(model, step).backward()
            optimizer.step()
        torch.testing.assert_close(state(fused), state(unfused), **exact)
    own = fused.stem.bn.running_mean.clone()
    with torch.no_grad():  # a forward begins with the buffers of process 0
        fused.eval(), models[0](batches.own(0))
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, own) == (dist.get_rank() == 0)
    assert torch.equal(fused.stem.bn.running_mean, first)


def check_ddp_synchronised(static_graph: bool) -> None:
    """DDP of the synchronised network, with uneven batches, is one process on the joined batch."""
    fused, unfused = nets()
    model = DistributedDataParallel(
        nn.SyncBatchNorm.convert_sync_batchnorm(fused), static_graph=static_graph
    )
    batches = Batches(SAMPLES[dist.get_world_size()]["uneven"])
    optimizers = [sgd(model), sgd(unfused)]
    for step in range(3):
        losses = [batches.loss(model, step), batches.loss(unfused, step, joined=True)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(state(fused), state(unfused), **exact)


def check_ddp_autocast() -> None:
    """bf16 autocast under DDP, synchronised: gradients near those of float64 on the joined batch,
    equal everywhere."""
    fused, wide = nets()
    fused = fused.float()
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(fused))
    batches = Batches((16,) * dist.get_world_size())
    batches.loss(wide, 0, joined=True).backward()
    batches.batches = [batch.float() for batch in batches.batches]
    with torch.autocast("cpu", torch.bfloat16):
        batches.loss(model, 0).backward()

    own, right = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (fused, wide))
    assert own.dtype == fused.stem.bn.running_mean.dtype == torch.float32
    assert (own - right).norm() / right.norm() < 0.03
    for mine, theirs in zip(fused.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=5e-3)
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, own)


def check_fsdp(synchronised: bool, whole: bool) -> None:
    """Parameters sharded by layer, or all of the network's as one, against the network on one
    process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fused, unfused = nets()
    batches = Batches(SAMPLES[dist.get_world_size()]["uneven" if synchronised else "even"])
    if synchronised:
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not whole:
        for layer in (fused.stem, fused.narrow, fused.widen):
            fully_shard(layer, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    optimizers = [sgd(fused), sgd(unfused)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        batches.loss(fused, step).backward()
        batches.loss(unfused, step, joined=synchronised).backward()
        if not synchronised:
            for p in unfused.parameters():
                p.grad = summed([p.grad])[0] / dist.get_world_size()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(state(fused), state(unfused), **exact)
    assert fused.stem.conv.weight.to_local().numel() < unfused.stem.conv.weight.numel()


# ---------------------------------------------------------------------------- DTensor, fused models


class Residual(nn.Module):
    """Two convolutions, and two such in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


def fused_pair() -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    unfused = nn.Sequential(Residual(), nn.MaxPool2d(2), Residual()).double()
    return fusedconvbn.fuse(copy.deepcopy(unfused), x, memory="min"), unfused, x


def operators(run: Callable[[], Any]) -> set[str]:
    """Those with FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return {str(name) for name in counter.get_flop_counts()["Global"]}


def check_fsdp_fused_model(inner: bool) -> None:
    """It stays fused where its modules get the class of `fully_shard`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fused, unfused, x = fused_pair()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*(fused if inner else ()), fused]:
        fully_shard(module, mesh=mesh)
    names = operators(lambda: fused(x).square().sum().backward())
    assert names == {
        "fusedconvbn._chain_forward",
        "fusedconvbn._chain_backward",
        "fusedconvbn.recomputed",
    }
    unfused(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), unfused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, **exact)


def check_dtensor(after: str) -> None:
    """Replicated ones, where what comes after distributes its result, so that the gradient comes in
    parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )

    fused, unfused, x = fused_pair()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    distribute_module(fused, mesh)
    for training in (True, False):
        fused.train(training), unfused.train(training)
        given = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        plain = x.clone().requires_grad_()
        out, expected = fused(given), unfused(plain)
        assert isinstance(out, DTensor)
        torch.testing.assert_close(out.full_tensor(), expected, **exact)
        result = out.redistribute(placements=[Shard(0)]) if after == "sharded" else out
        if after == "local":  # each process has a part of the loss
            part = result.to_local(grad_placements=[Partial()])
            (part.square().sum() / dist.get_world_size()).backward()
        else:
            result.square().sum().backward()
        expected.square().sum().backward()
        for ours, theirs in zip(
            (given, *fused.parameters()), (plain, *unfused.parameters()), strict=True
        ):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, **exact)
        for ours, theirs in zip(fused.buffers(), unfused.buffers(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, **exact)
    assert "fusedconvbn._chain_forward" in operators(lambda: fused(given).sum())


def check_dtensor_refusals() -> None:
    """Nothing but replicated ones, before a running statistic has moved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, weight, bias = torch.randn(4, 2, 6, 6), torch.randn(4, 2, 3, 3), torch.randn(4)
    names = {
        "input": "input",
        "weight": r"the convolution's weight \(link 0\)",
        "bn_bias": r"the batch norm's bias \(link 1\)",
    }
    running = {
        name: distribute_tensor(torch.ones(4), mesh) for name in ("running_mean", "running_var")
    }

    def call(name: str, other: Callable[[Tensor], Tensor]) -> None:
        tensors = {"input": x, "weight": weight, "bn_bias": bias}
        replicated = {n: distribute_tensor(t, mesh, [Replicate()]) for n, t in tensors.items()}
        fusedconvbn.conv_bn(**replicated | {name: other(tensors[name])}, **running)

    for name, said in names.items():
        with pytest.raises(
            NotImplementedError, match=rf"replicated DTensors, got {said} placed \(Shard"
        ):
            call(name, lambda t: distribute_tensor(t, mesh, [Shard(0)]))
        with pytest.raises(TypeError, match=f"DTensors where one is, got {said} that is not"):
            call(name, lambda t: t)
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    with pytest.raises(ValueError, match="on one mesh"):
        call("weight", lambda t: distribute_tensor(t, other, [Replicate(), Replicate()]))
    for statistic in running.values():
        assert torch.equal(statistic.full_tensor(), torch.ones(4))
