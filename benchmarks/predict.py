"""Predicts the step of whole models on a GPU, eager and fused, in bfloat16, channels last.

    python benchmarks/predict.py [--models resnet50 ...] [--batch 128] [--memory 1.0 auto min]
        [--device H100]

This is a prediction, not a measurement: nothing is computed, on any device. A step is captured on
the CPU, with stand-ins for tensors and the CPU's autocast, and its kernels are counted. One rule
holds for eager's kernels and ours: a kernel takes a launch and the longer of its FLOPs and its
bytes, at the rates that `fuse` plans with (fusedconvbn/fusion/plan.py). It is assumed that no cache
holds anything, that no kernel is slower than the memory, that no two overlap, and that the host is
always ahead. Our kernels are those of docs/design.md; a max pool is one kernel each way. The loss
and the optimizer are left out. Prints a table and writes benchmarks/results/predicted-cuda.json.
Needs torchvision.
"""

import argparse
import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, Row, commit, save
from torch import Tensor, fx
from workloads import definition

from fusedconvbn.chain import Conv, Norm
from fusedconvbn.fusion.calls import ADD, MUL, activation_of, conv_of, is_norm, parts_of
from fusedconvbn.fusion.capture import capture_whole, paths_of
from fusedconvbn.fusion.graph import Graph, inner_map
from fusedconvbn.fusion.match import Link, Match
from fusedconvbn.fusion.model import original_forward
from fusedconvbn.fusion.nodes import nbytes_of, value
from fusedconvbn.fusion.plan import H100, H200, Device, Plan, flops_per_value, parse_memory
from fusedconvbn.fusion.pooling import position_mean

DEVICES = {"H100": H100, "H200": H200}
MODELS = ["resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121"]
AVERAGES = (F.adaptive_avg_pool2d, F.avg_pool2d, position_mean)
FREE = (torch.flatten, torch.empty, torch._C._log_api_usage_once, operator.getitem, "detach")


class Kernel(NamedTuple):
    nbytes: float
    flops: float = 0.0

    def seconds(self, device: Device) -> float:
        return max(self.nbytes / device.bandwidth, self.flops / device.flops[2]) + device.launch


SMALL = Kernel(0)  # arithmetic on vectors
Kernels = Iterator[Kernel]


# ------------------------------------------------------------------ a call outside of chains


def convolution(op: Conv, x: Tensor, y: Tensor) -> Kernel:
    weight = value(op.weight)
    return product(flops_per_value(op, weight.shape) * y.numel(), x, weight, y)


def product(flops: float, x: Tensor, weight: Tensor, y: Tensor) -> Kernel:
    """A convolution, a matrix product, or a gradient of either: each reads and writes as much."""
    return Kernel((x.numel() + weight.numel() + y.numel()) * y.element_size(), flops)


def gradients(forward: Kernel, x: Tensor) -> list[Kernel]:
    return [forward] * (2 if x.requires_grad else 1)


def cast(t: Tensor, to: Tensor) -> list[Kernel]:
    sizes = t.element_size() + to.element_size()
    return [Kernel(t.numel() * sizes)] if t.dtype != to.dtype else []


def product_step(forward: Kernel, x: Tensor, weight: Any, bias: Any, y: Tensor) -> Kernels:
    yield from (*cast(x, y), forward, *gradients(forward, x))
    yield from 2 * cast(value(weight), y)  # and its gradient
    if bias is not None:
        yield from 2 * cast(value(bias), y)
        yield from (Kernel(2 * nbytes_of(y)), Kernel(nbytes_of(y)))  # added; its gradient


def call_step(node: fx.Node) -> Kernels:
    """The kernels of a step for a call that is in no chain."""
    x, y = (value(n) for n in (node.args[0] if node.args else None, node))
    if node.op not in ("call_function", "call_method") or node.target in FREE:
        return
    if node.target is torch.ops.fusedconvbn._channel_stats:
        yield from (Kernel(nbytes_of(value(node.args[0].args[0]))), SMALL)
    elif not isinstance(y, Tensor) or not y.requires_grad:  # counters, masks of samples, statistics
        yield SMALL
    elif conv := conv_of(node):
        op = conv[1]
        yield from product_step(convolution(op, x, y), x, op.weight, op.bias, y)
    elif node.target is F.linear:
        weight, bias = node.args[1:]
        forward = product(2 * x.numel() * y.shape[-1], x, value(weight), y)
        yield from product_step(forward, x, weight, bias, y)
    elif is_norm(node):
        s = nbytes_of(y)
        yield from (Kernel(s), SMALL, Kernel(2 * s))
        yield from (Kernel(2 * s), Kernel(3 * s))
    elif parts_of(node):  # the gradients of parts are views
        yield Kernel(2 * nbytes_of(y))
    elif node.target is F.max_pool2d:  # with indices of eight bytes; the gradient is zeroed first
        pooled = nbytes_of(y) + 8 * y.numel()
        yield from (Kernel(nbytes_of(x) + pooled), Kernel(nbytes_of(x)))
        yield Kernel(nbytes_of(x) + pooled)
    elif node.target is torch.ops.fusedconvbn.max_pool2d:
        yield from [Kernel(nbytes_of(x) + nbytes_of(y) + y.numel())] * 2
    elif node.target in AVERAGES:
        yield from [Kernel(nbytes_of(x) + nbytes_of(y))] * 2
    elif activation_of(node) or node.target is F.dropout:
        yield from (Kernel(2 * nbytes_of(y)), Kernel(3 * nbytes_of(y)))
    elif node.target in ADD:
        yield Kernel(3 * nbytes_of(y))
    elif node.target in MUL:
        yield from multiplication_step([value(n) for n in node.args], y)
    else:
        raise NotImplementedError(  # a guess is no prediction
            f"the kernels of {node.format_node()} are not known"
        )


def multiplication_step(factors: Sequence[Tensor], y: Tensor) -> Kernels:
    yield Kernel(sum(map(nbytes_of, (*factors, y))))
    for factor, other in (factors, factors[::-1]):
        if factor.requires_grad:
            yield Kernel(nbytes_of(other) + 2 * nbytes_of(y))
            if factor.shape != y.shape:  # the product is a map, added up
                yield Kernel(nbytes_of(y))


def additions(graph: fx.Graph) -> Kernels:
    """The additions of gradients of maps that several calls read."""
    for node in graph.nodes:
        if node.op != "placeholder" and isinstance(value(node), Tensor):
            readers = [n for n in node.users if getattr(value(n), "requires_grad", False)]
            yield from [Kernel(3 * nbytes_of(value(node)))] * (len(readers) - 1)


# ------------------------------------------------------------------ a chain


def chain_step(match: Match, saved: set[str]) -> Kernels:
    """The kernels of a step for a chain (csrc/chain)."""
    whole = len(match.input) == 1
    nbytes = sum(nbytes_of(value(part)) for part in match.input)
    forward = [] if match.gate is None else [Kernel(2 * nbytes)]  # the map of each link
    if forward:
        yield from (Kernel(2 * nbytes), SMALL, Kernel(2 * nbytes))  # its gradients
    for i, link in enumerate(match.links):
        forward.append(forward_of(link))
        x, y = value(link.input), value(link.result)
        if isinstance(link.op, Conv):
            # Backward casts the weight again, which is not saved; a bias cancels.
            yield from (*cast(x, y), *(3 * cast(value(link.op.weight), y)))
            yield from gradients(forward[-1], x)
        else:
            yield from norm_step(link.op, nbytes_of(y), known=i == 0 and not whole)
    if any(isinstance(link.op, Norm) for link in match.links):
        yield SMALL  # running statistics
    if not whole:
        yield Kernel(2 * nbytes)
    yield from forward
    first = 1 + (match.gate is not None)
    available = {first + i for i, link in enumerate(match.inner()) if link.name in saved}
    convs = [False] * (first - 1) + [isinstance(link.op, Conv) for link in match.links]
    for index in recomputed(convs, available, whole):
        yield Kernel(2 * nbytes) if index is None else forward[index]


def norm_step(op: Norm, s: int, known: bool) -> Kernels:
    """The kernels of a batch norm's step, except the one that computes its result.

    `known`: its statistics are computed elsewhere.
    """
    if not known:
        yield from (Kernel(s), SMALL)
    joined = op.residual is not None and op.activation != "none"
    yield from (Kernel((4 if joined else 2) * s), SMALL, Kernel(3 * s))
    if op.residual is not None and not joined:
        yield Kernel(2 * s)  # a copy of the gradient, for the residual


def forward_of(link: Link) -> Kernel:
    x, y = value(link.input), value(link.result)
    if isinstance(link.op, Conv):
        return convolution(link.op, x, y)
    return Kernel((2 + (getattr(link.op, "residual", None) is not None)) * nbytes_of(y))


def recomputed(convs: Sequence[bool], available: set[int], whole: bool) -> Iterator[int | None]:
    """The links that backward recomputes, None for a concatenation: csrc/chain without tensors."""
    available = available | {0} if whole else set(available)
    for i in reversed(range(len(convs))):
        if i in available:
            continue
        first = max((m for m in available if m < i), default=0)
        if 0 not in available:
            yield None
        yield from range(first, i)
        available |= {m for m in range(first + 1, i) if m == i - 1 or convs[m - 1]} | {0, i}
        if first == 0 and not whole:
            available.discard(0)


# ------------------------------------------------------------------ models


def step_of(graph: fx.Graph, chains: dict[fx.Node, Match], saved: set[str]) -> list[Kernel]:
    found = list(additions(graph))
    for node in graph.nodes:
        found += chain_step(chains[node], saved) if node in chains else call_step(node)
    return found


def described(kernels: list[Kernel], device: Device, saved: int) -> Row:
    return {
        "milliseconds": round(1e3 * sum(k.seconds(device) for k in kernels), 3),
        "kernels": len(kernels),
        "GB": round(sum(k.nbytes for k in kernels) / 1e9, 3),
        "GFLOP": round(sum(k.flops for k in kernels) / 1e9, 3),
        "saved": saved,
    }


def predict(name: str, batch: int, memories: Sequence[float | int | str], device: Device) -> Row:
    model = definition(name)
    images = torch.empty(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        whole = capture_whole(model, original_forward(model), (images,), {})
        if isinstance(whole, dict):
            raise SystemExit(f"{name}: its graph breaks: {whole}")
        eager = step_of(whole[0].graph, {}, set())
        graph = Graph.of(*whole, paths_of(model))
    rows = {"eager": described(eager, device, graph.eager.saved)}
    maps = [inner_map(link, device) for link in graph.links]
    for memory in memories:
        plan = Plan(memory)
        plan.decide(maps, graph.eager.saved, graph.least.saved, graph.step_flops, device)
        kernels = step_of(graph.module.graph, dict(graph.calls), plan.saved)
        added = sum(m.flops for m in maps if m.name not in plan.saved)
        rows[f"fuse {memory}"] = {
            **described(kernels, device, plan.spent),
            "maps": [len(plan.saved), len(maps)],
            "added_flops": round(added / graph.step_flops, 4),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--memory", nargs="+", default=["1.0", "auto", "min"])
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--output", type=Path, default=RESULTS / "predicted-cuda.json")
    arguments = parser.parse_args()
    memories = [parse_memory(m if m[-1].isalpha() else float(m)) for m in arguments.memory]
    print(
        f"| {arguments.device}, batch {arguments.batch} | saved | maps saved | added FLOPs | ms |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    results = {}
    for name in arguments.models:
        results[name] = predict(name, arguments.batch, memories, DEVICES[arguments.device])
        first = results[name]["eager"]
        print(
            f"| {name}, eager | {first['saved'] / 1e9:.2f} GB | | | {first['milliseconds']:.1f} |"
        )
        for variant, row in results[name].items():
            if variant != "eager":
                time, saved = (row[key] / first[key] for key in ("milliseconds", "saved"))
                of, all = row["maps"]
                added = f"{100 * row['added_flops']:.1f} %"
                milliseconds = f"{row['milliseconds']:.1f} ({time:.2f})"
                print(f"| {variant} | {saved:.2f} | {of} of {all} | {added} | {milliseconds} |")
    facts = {"device": arguments.device, "batch": arguments.batch, "commit": commit()}
    facts["figures"] = asdict(DEVICES[arguments.device])
    save({**facts, "models": results}, arguments.output)


if __name__ == "__main__":
    main()
