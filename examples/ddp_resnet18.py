"""Trains a fused torchvision ResNet-18 with DistributedDataParallel, and loads its checkpoint into
the unfused model.

Two processes on this machine, over gloo on the loopback interface, share the 1,797 digits that come
with scikit-learn. The checkpoint is the state_dict of torchvision's own model: the parent process
loads it into an unfused ResNet-18. A table shows that both models compute the same, and how much
each saves for backward.

Without --sync each process normalises by, and keeps, the statistics of its own images, as with any
batch norm under DistributedDataParallel. So the processes' running statistics differ, which is
normal; the checkpoint has those of process 0.

    python examples/ddp_resnet18.py
    python examples/ddp_resnet18.py --sync      # batch statistics over both processes
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fusedconvbn
from fusedconvbn import _torchvision

MIB = 2**20
PROCESSES = 2
TRAINING_IMAGES = 1536


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Images ``[N, 3, 32, 32]``, enlarged from 8×8, and labels: to train on, and to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    data = images.repeat(1, 3, 1, 1), torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return TensorDataset(*(t[train] for t in data)), TensorDataset(*(t[test] for t in data))


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in images.split(64)])


def saved_for_backward(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes saved for one batch in training mode. Updates the running statistics."""
    model.train()
    with fusedconvbn.track_memory() as memory:
        F.cross_entropy(model(images), labels)
    return memory.saved


def statistics_differ_by(model: nn.Module) -> float:
    """The largest difference between a running statistic of this process and that of process 0."""
    own = torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()])
    first = own.clone()
    dist.broadcast(first, 0)
    difference = (own - first).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return difference.item()


def work(
    rank: int,
    arguments: argparse.Namespace,
    folder: Path,
    train: TensorDataset,
    test_images: Tensor,
) -> None:
    """What each process runs; process 0 writes the checkpoint and its results."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)

    sampler = DistributedSampler(train, seed=arguments.seed)
    batches = DataLoader(train, arguments.batch_size, sampler=sampler, drop_last=True)
    example = next(iter(batches))

    model = DistributedDataParallel(
        fusedconvbn.fuse(_torchvision.models().resnet18(num_classes=10), example[0])
    )
    if arguments.sync:
        # After DDP, which refuses nn.SyncBatchNorm on CPU. Parameters and buffers stay the same
        # objects.
        nn.SyncBatchNorm.convert_sync_batchnorm(model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=arguments.epochs * len(batches)
    )
    losses = []
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())

    results = {"losses": losses, "statistics": statistics_differ_by(model.module)}
    if rank == 0:
        torch.save(model.module.state_dict(), arguments.checkpoint)
        results["logits"] = logits_of(model.module, test_images)
    # In both processes, as synchronised layers wait for each other.
    results["saved"] = saved_for_backward(model.module, *example)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def table(fused: dict, plain: dict, labels: Tensor, sync: bool) -> str:
    rows = [
        ("test accuracy (%)", *(100 * accuracy(r["logits"], labels) for r in (fused, plain))),
        ("saved for backward (MiB)", *(r["saved"] / MIB for r in (fused, plain))),
    ]
    lines = [f"{'':26}{'fused':>10}{'plain':>10}"]
    lines += [f"{name:26}{a:>10.2f}{b:>10.2f}" for name, a, b in rows]
    difference = (fused["logits"] - plain["logits"]).abs().max()
    lines += [
        "",
        f"loss of the first and the last step: {fused['losses'][0]:.4f}, {fused['losses'][-1]:.4f}",
        f"largest difference of the logits: {difference:.1e}",
        f"largest difference of the processes' running statistics: {fused['statistics']:.1e}",
        "(0, as --sync gives all processes the same)"
        if sync
        else "(normal: each process has the statistics of its own images; --sync makes them equal)",
    ]
    return "\n".join(lines)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sync", action="store_true", help="synchronise the batch norms")
    parser.add_argument("--checkpoint", type=Path, help="default: in a temporary folder")
    arguments = parser.parse_args(argv)
    largest = TRAINING_IMAGES // PROCESSES
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")
    if not 2 <= arguments.batch_size <= largest:
        parser.error(f"--batch-size must be from 2 to {largest}, got {arguments.batch_size}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    # The profiler, which measures the memory, otherwise logs its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    train, test = load_data()
    images, labels = test.tensors
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments.checkpoint = arguments.checkpoint or folder / "resnet18.pt"
        arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        mp.spawn(work, (arguments, folder, train, images), nprocs=PROCESSES)
        fused = torch.load(folder / "results.pt")
        model = _torchvision.models().resnet18(num_classes=10)
        model.load_state_dict(torch.load(arguments.checkpoint))

    plain = {"logits": logits_of(model, images)}
    batch = (t[: arguments.batch_size].clone() for t in train.tensors)
    plain["saved"] = saved_for_backward(model, *batch)
    print(table(fused, plain, labels, arguments.sync))


if __name__ == "__main__":
    main()
