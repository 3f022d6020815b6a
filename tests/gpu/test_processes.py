"""Data-parallel training with synchronised statistics: NCCL, in as many processes as there are
GPUs, two at most; gloo in two processes on the CPU."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fusedconvbn import fuse

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")
SAMPLES = 6  # of all processes


def check_process(rank, world_size, kind, rendezvous):
    """The joined batch in one eager model is the truth, which every process computes for itself."""
    torch.manual_seed(0)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=50),
    )
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU()]
    eager = nn.Sequential(*layers).double().to(device)
    images = torch.randn(SAMPLES, 3, 9, 8, dtype=torch.float64).to(device)
    own = images.tensor_split(world_size)[rank]

    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(eager))
    fused = fuse(synchronised, own)
    # DistributedDataParallel takes no nn.SyncBatchNorm on the CPU: its average is taken here.
    wrapped = DistributedDataParallel(fused) if kind == "cuda" else fused
    for _ in range(2):
        for model, batch in ((eager, images), (wrapped, own)):
            model.zero_grad()
            F.softplus(model(batch)).sum().div(len(batch)).backward()
    for p in fused.parameters() if kind == "cpu" else ():
        dist.all_reduce(p.grad)
        p.grad /= world_size
    for (name, p), q in zip(eager.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, b), c in zip(eager.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(c, b, rtol=1e-9, atol=1e-9, msg=name)

    # One process alone synchronises nothing: the collective is asked for here.
    group = dist.group.WORLD.group_name
    mean, var = torch.ops.fusedconvbn._channel_stats(own, group)[:2]
    exact_var, exact_mean = torch.var_mean(images, (0, 2, 3), correction=0)
    torch.testing.assert_close((mean, var), (exact_mean, exact_var))
    dist.destroy_process_group()


def test_equals_one_process_on_the_joined_batch(device, tmp_path):
    world_size = min(torch.cuda.device_count(), 2) if device == "cuda" else 2
    mp.spawn(check_process, (world_size, device, tmp_path / "rendezvous"), world_size)
