"""What is promised about the bytes and the FLOPs of whole models.

Run by `benchmarks/models.py --check`.
"""

import argparse

from common import print_table
from tqdm import tqdm
from workloads import ON_CPU, Workload, ratios

# Shares of eager's, at most: bytes live at the end of forward, peak, and added convolution FLOPs.
# Batch 8 at 224², channels last, float32.
PROMISED = {
    ("resnet50", "auto"): (0.53, 0.62, 0.11),
    ("resnet50", "min"): (0.36, 0.48, 0.34),
    ("mobilenet_v2", "auto"): (0.53, 0.60, 0.15),
    ("mobilenet_v2", "min"): (0.16, 0.32, 0.40),
    ("densenet121", "auto"): (0.25, 0.38, 0.12),
    ("efficientnet_b0", "auto"): (0.26, 0.32, 0.15),
}
FUSE_SECONDS = {"resnet50": 5.0}


def check(arguments: argparse.Namespace) -> bool:
    """Whether every promise about the chosen models holds; prints promised and measured values."""
    lines, holds = [], True
    for name in tqdm([m for m in arguments.models if any(m == p for p, _ in PROMISED)]):
        load = Workload.of(name, arguments, ON_CPU[0])
        eager = load.memory(load.model)
        for (of, memory), (forward, peak, flops) in PROMISED.items():
            if of != name:
                continue
            net, facts = load.fused(memory)
            share = ratios(load.memory(net), eager)
            found = {
                "end of forward": (forward, share["end_of_forward"]),
                "peak": (peak, share["peak"]),
                "added conv FLOPs": (flops, facts["added_flops"]),
            }
            if name in FUSE_SECONDS:
                found["seconds to fuse"] = (FUSE_SECONDS[name], facts["fuse_seconds"])
            for what, (most, value) in found.items():
                holds &= value <= most
                verdict = "" if value <= most else "MISSED"
                lines.append([f"{name} {memory}: {what}", f"{most:.2f}", f"{value:.3f}", verdict])
    print_table("Promised, of eager's", ["", "at most", "reached", ""], lines)
    return holds
