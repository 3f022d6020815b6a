"""What `fuse` finds in the models of tests/zoo.py, and the bytes it predicts.

Run by `benchmarks/models.py --count`.
"""

import sys

import torch
from common import ROOT
from workloads import definition

import fusedconvbn

sys.path.append(str(ROOT / "tests"))

from zoo import MODELS

OTHER_SIZES = {"inception_v3": (299, 299), "r3d_18": (16, 112, 112)}


def count(batch: int, size: int) -> None:
    """Prints a row for each model; nothing is computed."""
    print("| model | pairs fused / found | chains | saved, auto | saved, min |")
    print("|---|---|---|---|---|")
    for name in MODELS:
        model = definition(name)
        images = torch.empty(batch, 3, *OTHER_SIZES.get(name, (size, size)))
        reports = [fusedconvbn.explain(model, images, memory=memory) for memory in ("auto", "min")]
        shares = " | ".join(f"{r.saved / r.eager:.2f}" for r in reports)
        report = reports[0]
        pairs = f"{report.fused_pairs} / {report.pairs}"
        print(f"| {name} | {pairs} | {len(report.chains)} | {shares} |", flush=True)
