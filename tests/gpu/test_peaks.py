"""`memory="peak ..."` keeps its promise: the benchmark of it, for one model, in a process where
nothing else holds memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/peaks.py"


@pytest.mark.slow
def test_a_step_stays_below_its_promise(device, tmp_path):
    batch, size = ("64", "224") if device == "cuda" else ("8", "128")
    command = [sys.executable, SCRIPT, "--device", device, "--batch", batch, "--size", size]
    output = tmp_path / "peaks.json"
    subprocess.run([*command, "--models", "resnet18", "--output", output], check=True)
    rows = json.loads(output.read_text())["rows"]
    assert rows
    for row in rows:
        assert 0.95 * row["planned"] <= row["measured"] <= row["promised"], row
