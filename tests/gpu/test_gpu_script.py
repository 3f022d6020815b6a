"""tests/gpu/run.sh: its runner with stages that fail and hang, its quick part on the CPU, and the
tables made of results."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import run
import tables
from stages import ON_GPU, REHEARSAL, Stage, stages_of


def stage(name, seconds, code):
    return Stage(name, seconds, [sys.executable, "-c", code])


INTERRUPTED = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what is known so far")
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid):
    """Whether a process has ended; one that nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "GRACE", 3)  # on a busy machine
    monkeypatch.setattr(run, "LEAST", 0.5)
    start = time.monotonic()
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    (out / "gpu-models-128.json").write_text("of another day, which would be gone on with")
    (work / "machine.json").write_text('{"device": "a GPU"}')
    runner = run.Run(out, work, seconds=24)
    runner.together([stage("good", 10, "print('3 passed'); print()")])
    runner.together([stage("bad", 10, "print('a line'); raise SystemExit('no such kernel')")])
    together = {"hangs": INTERRUPTED, "stubborn": STUBBORN, "beside": "print('all the same')"}
    runner.together([stage(name, 5, code) for name, code in together.items()])
    runner.together([stage("good again", 10, "print(1)")])
    runner.together([stage("empty", 10, "print('== 2 skipped in 1 s ==')")])
    runner.together([stage("too long", 60, "import time; time.sleep(60)")])
    runner.together([stage("late", 10, "print(1)")])
    runner.print_table()
    assert (
        time.monotonic() - start < 24 + 5
    )  # seconds that the runner was given, and those of a busy machine
    summary = json.loads((out / "gpu-summary.json").read_text())
    ended = {s["stage"]: (s["status"], s["said"]) for s in summary["stages"]}
    child = ended.pop("stubborn")[1]
    assert ended == {
        "good": ("passed", "3 passed"),
        "bad": ("failed", "no such kernel"),
        "hangs": ("out of time", "what is known so far"),
        "beside": ("passed", "all the same"),
        "good again": ("passed", "1"),
        "empty": ("skipped", "2 skipped in 1 s"),
        "too long": ("out of time", "KeyboardInterrupt"),
        "late": ("not reached", ""),
    }
    assert gone(child)
    assert {path.name for path in out.iterdir()} == {"gpu-summary.json", "log.txt"}
    assert summary["machine"] == {"device": "a GPU"}
    log = (out / "log.txt").read_text()
    assert "a line\nno such kernel" in log and "===== late: not reached" in log
    table = capsys.readouterr().out.split("results in")[1].splitlines()[1:]
    assert [line.split("  ")[1] for line in table] == [s["stage"] for s in summary["stages"]]


def test_the_first_stages_fit_their_time_and_all_leave_few_files(tmp_path):
    stages = stages_of(tmp_path / "out", tmp_path / "work", rehearsal=False)
    names = [together[0].name for together in stages]
    first = stages[1 : names.index("models") + 1]
    seconds = sum(max(s.seconds for s in together) for together in first)
    assert seconds + 60 < run.SECONDS - run.GRACE  # beside the setup of a bundle
    arguments = [a for together in stages for s in together for a in s.command]
    own = {"log.txt", "gpu-summary.json"}
    written = own | {a.name for a in arguments if isinstance(a, Path) and a.parent.name == "out"}
    assert len(written) <= 8


def test_without_setup_nothing_is_reached(tmp_path):
    """As where torch is missing."""
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch')")
    command = ["bash", ROOT / "tests/gpu/run.sh", "--dry-run", tmp_path / "out"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    table = result.stdout.split("results in")[1].splitlines()[1:]
    assert len(table) == len(
        [s for together in stages_of(tmp_path, tmp_path, True) for s in together]
    )
    assert "failed" in table[0] and "there is no torch" in table[0]
    assert all("not reached" in line for line in table[1:])


def test_the_rehearsal_is_of_the_same_stages(tmp_path):
    names = [
        [s.name for together in stages_of(tmp_path, tmp_path, r) for s in together]
        for r in (False, True)
    ]
    assert names[0] == names[1]
    assert ON_GPU.device == "cuda" and REHEARSAL.device == "cpu"


@pytest.mark.slow
def test_the_quick_part_on_the_cpu(tmp_path, monkeypatch):
    """And the tables of what it leaves."""
    command = ["bash", ROOT / "tests/gpu/run.sh", "--dry-run", tmp_path]
    command += ["--only", "kernels", "profile", "others"]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout + (tmp_path / "log.txt").read_text()
    table = result.stdout.split("results in")[1].splitlines()[1:]
    assert [line.split()[:2] for line in table] == [
        [name, "passed"] for name in ("setup", "kernels", "profile", "others")
    ]
    machine = json.loads((tmp_path / "gpu-summary.json").read_text())["machine"]
    assert machine["copy GB/s"] > 0 and machine["bf16 TFLOP/s"] > 0
    assert "fuse auto" in (tmp_path / "profile.txt").read_text()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "mobilenet_v2, bfloat16, channels last, 2 threads, batch 2, `fuse`" in (
        tables.gpu_models_table()
    )
    assert "channel_grad_apply_" in tables.TABLES["gpu-kernels"]()
    assert "| mobilenet_v2, fuse auto, batch 2 | ≤ 1.00 | 0.80 |" in tables.gpu_table()


def row(ratio, saved):
    return {"ratio": ratio, "of_eager": {"saved": saved, "peak": saved + 0.1}}


def test_the_table_of_a_gpu_says_what_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpu_table() == tables.gpu_models_table() == "Not measured.\n"
    assert tables.TABLES["gpu-kernels"]() == "Not measured.\n"
    (tmp_path / "gpu-summary.json").write_text('{"machine": {}, "stages": []}')
    assert tables.gpu_table() == "Not measured.\n"  # setup failed
    rows = {"fuse 1.0": row(0.9, 0.95), "fuse min": row(1.0, 0.25), "compile": row(0.8, 0.94)}
    rows |= {"compile, budget 0.3": row(1.2, 0.2)}
    models = {"resnet50": {"bfloat16, channels last": rows}}
    kernels = {"copy": {"of_copy": 1.0, "bytes": 2**32}, "batch norm": {"of_copy": 0.1}}
    kernels |= {"channel_stats": {"of_copy": 0.7}, "channel_apply_": {"of_copy": 0.95}}
    machine = {"device": "H100", "torch": "2.11", "commit": "abc", "copy GB/s": 2900}
    files = {
        "gpu-summary": {
            "machine": {**machine, "bf16 TFLOP/s": 700},
            "stages": [{"stage": "memcheck", "status": "failed", "said": "9 errors"}],
        },
        "gpu-kernels": {"maps": {"large": kernels}},
        "gpu-models-128": {"batch": 128, "models": models},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    table = tables.gpu_table()
    for line in (
        "H100, torch 2.11, commits abc; copy 2900 GB/s, bf16 product 700 TFLOP/s.",
        "| memcheck: 9 errors | passed |  | failed |  |",
        "| ≥ 0.75 | 0.90 | channel_stats, 0.70 MISSED |  |",
        "| resnet50, fuse 1.0, batch 128 | ≤ 0.85 | 0.70 | 0.900 at 0.95 (peak 1.05) MISSED | "
        "0.800 at 0.94 (peak 1.04) |",
        "| resnet50, fuse min, batch 128 | ≤ 1.10 | 0.95 | 1.000 at 0.25 (peak 0.35) | "
        "1.200 at 0.20 (peak 0.30) |",
        "![gpu-models-128-resnet50](../benchmarks/results/gpu-models-128-resnet50.png)",
    ):
        assert line in table
