"""Whether `fuse` is right, and what it saves, on the models of seven libraries.

    make coverage COVERAGE=OPTIONS           # creates .venv-coverage and runs this with --resume
    python benchmarks/coverage.py [--only REGEX] [--resume] [--jobs N]
    python benchmarks/coverage.py --eager    # without fuse: only whether the models run
    python benchmarks/coverage.py --table    # only writes the page, from the results

Each model has a process and a time limit of its own, random weights and small inputs. It is fused
at memory="auto" and "min" and trained for three steps of SGD in float64 beside eager, from the same
state and with the same random numbers. Losses, gradients, parameters, buffers and the output in
evaluation mode are compared, and the bytes saved for backward. The row of a model is added to
build/coverage.jsonl as soon as its process ends; at the end all rows are written to
benchmarks/results/coverage.json and docs/coverage.md.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, Row, machine, save
from coverage_models import BATCH, SIZE, Entry, entries
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import _torchvision

OUTPUT = RESULTS / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
TOLERANCE = 1e-6  # of a tensor's largest value
MUCH = 0.6  # of eager's bytes at "auto": above, the page says why
STEPS = 3


class PairCounter(TorchFunctionMode):
    """Counts batch norms that read the result of a convolution, independently of `fuse`."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0
        self.maps: dict[int, Tensor] = {}  # kept alive, so that ids stay unique

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("conv") and isinstance(result, Tensor):
            self.maps[id(result)] = result
        elif name == "batch_norm":
            self.pairs += id(args[0] if args else kwargs["input"]) in self.maps
        return result


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors in the output."""
    if isinstance(inputs, dict):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


Trace = dict[str, dict[str, Tensor]]  # kind → name → value


def trained(model: nn.Module, inputs: Any) -> Trace:
    """The trace of three steps of SGD, with clipped gradients, so that no model diverges."""
    found: Trace = {"loss": {}, "gradient": {}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = torch.stack([t.sin().sum() for t in call(model, inputs) if t.requires_grad]).sum()
        loss.backward()
        found["loss"][f"step {step}"] = loss.detach()
        for name, p in model.named_parameters():
            if p.grad is not None:
                found["gradient"][f"step {step}, {name}"] = p.grad.clone()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found["parameter"] = {name: p.detach() for name, p in model.named_parameters()}
    found["buffer"] = dict(model.named_buffers())
    model.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        found["evaluation"] = {f"output {i}": t for i, t in enumerate(call(model, inputs))}
    model.train()
    return found


def difference(ours: Trace, eager: Trace) -> tuple[float, str]:
    """The largest difference, and where it is.

    Relative to the tensor's largest value, or to 1e-4 of the largest value among tensors of the
    same name where that is more: the gradient of a bias before a batch norm is only rounding.
    """
    worst = (0.0, "")
    for kind, tensors in eager.items():
        if ours[kind].keys() != tensors.keys():
            names = sorted(ours[kind].keys() ^ tensors.keys())
            return math.inf, f"{kind}: in one of the two only: {names[0]}"
        largest: dict[str, float] = {}
        for name, t in tensors.items():
            like = name.rpartition(".")[2]
            own = t.double().abs().max().item() if t.numel() else 0.0
            largest[like] = max(largest.get(like, 0.0), own)
        for name, t in tensors.items():
            other = ours[kind][name]
            if other.shape != t.shape or other.dtype != t.dtype:
                return math.inf, f"{kind}: {name}: another shape or dtype"
            if torch.equal(other, t):
                continue
            a, b = other.double(), t.double()
            scale = max(b.abs().max().item(), 1e-4 * largest[name.rpartition(".")[2]])
            found = ((a - b).abs().max().item() / scale) if scale else math.inf
            if not t.is_floating_point() or math.isnan(found):
                found = math.inf
            worst = max(worst, (found, f"{kind}: {name}"))
    return worst


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose weights differ in the last bit: its distance from eager is that of rounding."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2**-51 * torch.randn_like(p).sign())
    return model


def saved_bytes(model: nn.Module, inputs: Any) -> int:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with fusedconvbn.track_memory() as memory:
        torch.stack([t.sum() for t in call(model, inputs) if t.requires_grad]).sum().backward()
    return memory.saved


def without_paths(text: str) -> str:
    """The text without the folders of this machine."""
    return re.sub(r"/[^\s'\"]*/site-packages/", "", text).replace(f"{ROOT}/", "")


@contextlib.contextmanager
def our_warnings(row: Row) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            package = str(Path(fusedconvbn.__file__).parent)
            ours = [w for w in caught if w.filename.startswith(package) or "fuse" in str(w.message)]
            texts = {without_paths(str(w.message)) for w in ours}
            row["warnings"] = sorted(texts.union(row.get("warnings", [])))


def stages(entry: Entry, row: Row, eager_only: bool) -> Iterator[str]:
    """Fills the row. Yields the name of each stage before it begins, to say where a model broke."""
    yield "creating the model"
    _torchvision.models()  # before a library imports torchvision itself
    torch.manual_seed(0)
    eager, inputs = entry.make(entry.name, entry.size)
    eager.train()
    row["parameters"] = sum(p.numel() for p in eager.parameters())
    yield "eager forward"
    with PairCounter() as counter:
        call(copy.deepcopy(eager), inputs)
    row["pairs"] = counter.pairs
    counter.maps.clear()
    eager.double()
    double = tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    fused: dict[str, nn.Module] = {}
    if not eager_only:
        yield "explain"
        with our_warnings(row):
            report = fusedconvbn.explain(eager, double, memory="auto")
        row |= {"reported_pairs": report.pairs, "fused": report.fused_pairs}
        row |= {"predicted_eager": report.eager, "predicted_least": report.least}
        row["refused"] = dict(Counter(report.refused.values()).most_common(8))
        breaks = Counter(map(without_paths, report.untraceable.values()))
        row["untraceable"] = dict(breaks.most_common(4))
        row |= {"auto": {"predicted": report.saved}, "min": {"predicted": report.least}}
    for memory in () if eager_only else ("auto", "min"):
        yield f"fuse {memory}"
        original = copy.deepcopy(eager)
        with our_warnings(row):
            start = time.process_time()  # others may use the machine
            fused[memory] = fusedconvbn.fuse(original, double, memory=memory, inplace=True)
            row[memory]["fuse_seconds"] = time.process_time() - start
    yield "eager training"
    models = {"eager": eager, **fused}
    before = copy.deepcopy(eager)
    truth = trained(eager, double)
    if not all(t.isfinite().all() for t in truth["loss"].values()):
        raise ArithmeticError("eager's loss is not finite")
    for memory, model in fused.items():
        yield f"training {memory}"
        with our_warnings(row):
            found, where = difference(trained(model, double), truth)
        row[memory] |= {"error": found, "where": where}
        if found > TOLERANCE:
            yield "eager training with other roundings"
            row["rounding"] = difference(trained(nudged(before), double), truth)[0]
    for name, model in models.items():
        yield f"memory of {name}"
        row.setdefault(name, {})["saved"] = saved_bytes(model, double)
    yield ""


def work(key: str, path: Path, eager_only: bool) -> None:
    """Runs in a process of its own. Writes the row after each stage, as a crash may follow."""
    entry = next(e for e in entries() if e.key == key)
    row: Row = json.loads(path.read_text("utf-8"))
    stage, start = "", time.perf_counter()
    try:
        for stage in stages(entry, row, eager_only):
            row |= {"broke": f"{stage}: the process ended", "seconds": time.perf_counter() - start}
            path.write_text(json.dumps(row), "utf-8")
        del row["broke"]
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        code = frame.tb_frame.f_code
        row["where"] = f"{Path(code.co_filename).name}:{frame.tb_lineno} {code.co_qualname}"
        text = without_paths(str(error).strip())
        row["broke"] = f"{stage}: {type(error).__name__}: {text.partition(chr(10))[0]}"
    path.write_text(json.dumps({**row, "seconds": time.perf_counter() - start}), "utf-8")


def tried(entry: Entry, arguments: argparse.Namespace) -> Row:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        environment["YOLO_CONFIG_DIR"] = folder  # or ultralytics writes to the home folder
        path = Path(folder) / "row.json"
        path.write_text(json.dumps({"library": entry.library, "model": entry.name}), "utf-8")
        command = [sys.executable, __file__, "--worker", entry.key, "--output", str(path)]
        command += ["--eager"] if arguments.eager else []
        ended = ""
        try:
            run = subprocess.run(
                command, timeout=arguments.limit, env=environment, capture_output=True, text=True
            )
            if run.returncode:
                last = run.stderr.strip().splitlines()[-1:]
                ended = f"the process ended with {run.returncode}: {''.join(last)}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {arguments.limit} s"
        row = json.loads(path.read_text("utf-8"))
    if ended:
        stage = row.get("broke", "start").partition(":")[0]
        row["broke"] = f"{stage}: {ended}"
    return row


def error(row: Row) -> float:
    return max(row[m]["error"] for m in ("auto", "min"))


def right(row: Row) -> bool:
    return "broke" not in row and error(row) <= TOLERANCE


def is_rounding(row: Row) -> bool:
    """Whether it differs from eager by no more than ten times what `nudged` does."""
    return "broke" not in row and not right(row) and error(row) <= 10 * row["rounding"]


def is_late(row: Row) -> bool:
    return "not done after" in row.get("broke", "")


def share(row: Row, memory: str) -> float | None:
    saved = row.get(memory, {}).get("saved")
    return None if saved is None else saved / max(row["eager"]["saved"], 1)


def misprediction(row: Row) -> float:
    """The largest relative error of the predicted bytes, of both plans."""
    plans = [row[m] for m in ("auto", "min") if "saved" in row.get(m, {})]
    return max((abs(p["saved"] / max(p["predicted"], 1) - 1) for p in plans), default=0.0)


def slowest(row: Row) -> float:
    return max((row.get(m, {}).get("fuse_seconds", 0.0) for m in ("auto", "min")), default=0.0)


def note(row: Row) -> str:
    if is_late(row):
        return row["broke"]
    if "broke" in row:
        return f"**broke**, {row['broke']}" + (f" ({row['where']})" if "where" in row else "")
    parts = []
    for memory in ("auto", "min"):
        if row[memory]["error"] > TOLERANCE:
            differs = "differs" if is_rounding(row) else "**differs**"
            parts.append(
                f"{differs} at {memory} by {row[memory]['error']:.0e}, {row[memory]['where']}; "
                f"eager with other roundings by {row['rounding']:.0e}"
            )
    if (share(row, "auto") or 0) > MUCH:
        reasons = [f"{n} × {text}" for text, n in itertools.islice(row["refused"].items(), 2)]
        reasons += [
            f"not traced: {t}" for t in itertools.islice(filter(None, row["untraceable"]), 1)
        ]
        parts.append("; ".join(reasons) or "what is saved is elsewhere")
    if row["reported_pairs"] != row["pairs"]:
        parts.append(f"`fuse` counts {row['reported_pairs']} pairs")
    if misprediction(row) > 0.05:
        parts.append(f"bytes are {misprediction(row):.0%} off what was predicted")
    parts += [f"warns: {text}" for text in row["warnings"]]
    return ". ".join(parts)


INTRODUCTION = (
    "`fuse` on models that people train, with random weights, beside eager for "
    f"{STEPS} steps in float64. `make coverage` writes this page; "
    "[coverage.json](../benchmarks/results/coverage.json) has more. A model is right if its "
    "losses, gradients, parameters, buffers and evaluation output are all within "
    f"{TOLERANCE:.0e} of eager's. If one is not, eager is trained again from weights that differ "
    "in their last bit: the difference between the two eager runs is that of rounding. A pair is "
    "a call of a batch norm on the result of a convolution. "
    f"Batch {BATCH}, mostly images of {SIZE}². Bytes saved for backward are shares of eager's."
)
VERDICTS = ("right", "off by rounding", "not done in time", "wrong or broken")


def title(row: Row) -> str:
    return f"{row['library']} {row['model']}"


def page(results: Row) -> str:
    rows = sorted(results["models"], key=lambda r: (r["library"], r["model"].lower()))
    measured = [r for r in rows if share(r, "min") is not None]
    pairs, fused = (sum(r.get(key, 0) for r in rows) for key in ("pairs", "fused"))
    verdicts = [sum(map(verdict, rows)) for verdict in (right, is_rounding, is_late)]
    verdicts.append(len(rows) - sum(verdicts))
    largest = max((error(r) for r in rows if right(r)), default=0.0)
    summary = {
        "models tried": f"{len(rows)}, of {len({r['library'] for r in rows})} libraries",
        "with pairs": str(sum(r.get("pairs", 0) > 0 for r in rows)),
        " / ".join(VERDICTS): " / ".join(map(str, verdicts)),
        "largest difference of a right one": f"{largest:.0e}",
        "pairs that ran": str(pairs),
        "pairs fused": f"{fused} ({fused / max(pairs, 1):.1%})",
    }
    if measured:
        for memory in ("auto", "min"):
            median = statistics.median(share(r, memory) for r in measured)
            summary[f"saved at `{memory}`, median, of eager's bytes"] = f"{median:.2f}"
        worst, slow = max(measured, key=misprediction), max(measured, key=slowest)
        summary["worst error of predicted bytes"] = f"{misprediction(worst):.1%} ({title(worst)})"
        summary["slowest `fuse`"] = f"{slowest(slow):.1f} s ({title(slow)})"
    commits = ", ".join(sorted({r["commit"] for r in rows}))
    lines = [
        "# Coverage",
        "",
        textwrap.fill(INTRODUCTION, 100),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in summary.items()),
        "",
        textwrap.fill(
            f"Torch {results['machine']['torch']}, commit {commits}. The note of a model says what "
            f"is wrong, and, where `auto` is above {MUCH}, why.",
            100,
        ),
        "",
        "| library | model | pairs | fused | saved, auto | saved, min | seconds to fuse | note |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        shares = ["" if (s := share(row, m)) is None else f"{s:.2f}" for m in ("auto", "min")]
        seconds = f"{slowest(row):.1f}" if "fused" in row else ""
        cells = [row["library"], row["model"], row.get("pairs", ""), row.get("fused", ""), *shares]
        cells += [seconds, note(row).replace("|", "\\|").replace("\n", " ")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", type=re.compile, default="", metavar="REGEX", help='of "LIBRARY NAME"')
    add("--resume", action="store_true", help="keep the rows that build/coverage.jsonl has")
    add("--retry", action="store_true", help="with --resume: try again what broke or differs")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--limit", type=int, default=900, help="seconds for a model")
    add("--eager", action="store_true", help="only see whether the models run")
    add("--table", action="store_true", help="only write the page, from the results")
    add("--worker", help=argparse.SUPPRESS)
    add("--output", type=Path, default=OUTPUT, help="another file gets the page beside it")
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, arguments.output, arguments.eager)
    chosen = [e for e in entries() if re.search(arguments.only, e.key)]
    if arguments.table:
        results = json.loads(arguments.output.read_text("utf-8"))
        return write(results, arguments.output)
    lines = ROOT / "build" / ("coverage-eager.jsonl" if arguments.eager else "coverage.jsonl")
    rows = earlier_rows(lines, chosen, arguments)
    results = {"machine": machine(torch.device("cpu")), "models": []}
    commit = results["machine"].pop("commit")
    waiting = [e for e in chosen if e.key not in rows]
    with lines.open("w", encoding="utf-8") as file, ThreadPoolExecutor(arguments.jobs) as pool:
        file.writelines(json.dumps(row) + "\n" for row in rows.values())
        tries = pool.map(functools.partial(tried, arguments=arguments), waiting)
        for entry, row in zip(waiting, tqdm(tries, total=len(waiting)), strict=True):
            rows[entry.key] = {**row, "commit": commit}
            file.write(json.dumps(rows[entry.key]) + "\n")
            file.flush()
            if "broke" in row or arguments.eager:
                found = row.get("broke") or f"{row['pairs']} pairs, {row['parameters']} parameters"
                tqdm.write(f"{entry.key}: {row.get('seconds', 0):.0f} s: {found}")
    if not arguments.eager:
        results["models"] = [rows[e.key] for e in entries() if e.key in rows]
        write(results, arguments.output)


def earlier_rows(lines: Path, chosen: list[Entry], arguments: argparse.Namespace) -> dict[str, Row]:
    """The rows of models that are not chosen; with --resume of all models tried before."""
    lines.parent.mkdir(exist_ok=True)
    text = lines.read_text("utf-8") if lines.exists() else ""
    rows = {f"{r['library']} {r['model']}": r for r in map(json.loads, text.splitlines())}
    again = set() if arguments.resume else {e.key for e in chosen}
    if arguments.retry:
        fine = (lambda row: "broke" not in row) if arguments.eager else right
        again |= {e.key for e in chosen if e.key in rows and not fine(rows[e.key])}
    return {e.key: rows[e.key] for e in entries() if e.key in rows and e.key not in again}


def write(results: Row, output: Path) -> None:
    save(results, output)
    path = PAGE if output == OUTPUT else output.with_suffix(".md")
    path.write_text(page(results), "utf-8")
    print("\n".join(page(results).splitlines()[4:18]))


if __name__ == "__main__":
    main()
