"""examples/ddp_resnet18.py: a fused network trained by two processes, and its checkpoint in the
plain one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_resnet18.py"

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=120
    )


def numbers(output, row):
    """Those behind the name of a row."""
    (rest,) = re.findall(rf"^{re.escape(row)}:?(.*)$", output, re.MULTILINE)
    return [float(number) for number in rest.replace(",", " ").split()]


@pytest.mark.slow
@pytest.mark.parametrize("sync", [False, True], ids=["own statistics", "synchronised"])
def test_plain_model_takes_the_checkpoint(sync, tmp_path):
    checkpoint = tmp_path / "new" / "resnet18.pt"
    done = run("--epochs", "2", "--checkpoint", checkpoint, *["--sync"] * sync)
    assert done.returncode == 0, done.stdout + done.stderr

    fused, plain = numbers(done.stdout, "test accuracy (%)")
    assert fused == plain > 50  # after two epochs; guessing gives 10
    fused, plain = numbers(done.stdout, "saved for backward (MiB)")
    assert 0 < fused < 0.56 * plain
    first, last = numbers(done.stdout, "loss of the first and the last step")
    assert last < first / 2
    (difference,) = numbers(done.stdout, "largest difference of the logits")
    assert difference < 1e-3
    (difference,) = numbers(done.stdout, "largest difference of the processes' running statistics")
    assert difference == 0 if sync else difference > 1e-3
    assert ("(normal: each process has" in done.stdout) != sync

    keys = torch.load(checkpoint).keys()
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.bn2.weight", "fc.bias"} <= keys
    assert len(keys) == 122


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be from 2 to 768, got 1"),
    ],
)
def test_says_what_is_wrong(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
