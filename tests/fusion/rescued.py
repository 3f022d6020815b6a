"""For test_rescue.py: `python rescued.py cpu|cuda` trains where the allocator has a limit between
what the fastest plan needs and what the tightest one does."""

import os
import resource
import sys
from pathlib import Path

MIB = 2**20
if sys.argv[1] == "cpu":
    # The operators' own cache is a range of addresses as large as the machine's memory. Without
    # room for it they take theirs from malloc, which meets the limit.
    resource.setrlimit(resource.RLIMIT_AS, (os.sysconf("SC_PHYS_PAGES") * 2**12 // 2,) * 2)

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fusing import Block, unit
from torch import nn

from fusedconvbn import fuse, rescue, track_memory

SLACK = 24 * MIB  # of an allocator, in either direction


def main(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 112, 112, device=device)
    net = nn.Sequential(unit(3, 8), *(Block() for _ in range(6))).to(device)
    peaks = {}
    for memory in (1.0, "min"):
        fused = fuse(net, x, memory=memory)
        fused(x).sum().backward()
        net.zero_grad()
        with track_memory(device) as tracked:
            fused(x).sum().backward()
        peaks[memory] = tracked.peak
        net.zero_grad()
    assert peaks["min"] + 2 * SLACK < peaks[1.0], peaks
    room = (peaks["min"] + peaks[1.0]) // 2

    fused = fuse(net, x, memory=1.0)

    def step() -> None:
        fused.zero_grad()
        fused(x).sum().backward()

    limit(device, room)
    try:
        step()
    except RuntimeError as error:
        assert "memory" in str(error), error
        del error
    else:
        raise AssertionError("the limit was not reached")
    fused.zero_grad()
    rescue(fused, step)()
    assert all(p.grad is not None for p in fused.parameters())


def limit(device: str, room: int) -> None:
    """From now on no more than `room` bytes can be allocated beside what is in use."""
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        return
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + room, in_use + room))


if __name__ == "__main__":
    main(sys.argv[1])
