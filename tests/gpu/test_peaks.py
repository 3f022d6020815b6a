"""`memory="peak ..."` keeps its promise: the benchmark of it, for one model."""

import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import peaks
from workloads import Configuration, Workload


def test_a_step_stays_below_its_promise(device):
    batch, size = (64, 224) if device == "cuda" else (8, 128)
    of = Namespace(device=torch.device(device), batch=batch, size=size)
    load = Workload.of("resnet18", of, Configuration("float32", "channels last", None))
    found = peaks.promises(load, "float32")
    assert found
    for promise in found:
        assert 0.95 <= promise.measured / promise.promised <= 1, promise
