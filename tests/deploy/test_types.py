"""The types of the public surface, as mypy sees them from a user's code, and as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typed_snippet

import fusedconvbn

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fusedconvbn.__file__).parent


def test_a_users_code_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    environment = {**os.environ}
    if "site-packages" not in PACKAGE.parts:  # mypy does not follow the hook of an editable install
        environment["MYPYPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    result = subprocess.run(
        [*command, "--follow-imports=silent", typed_snippet.__file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("part", ("models", "layers", "reports"))
@pytest.mark.filterwarnings("ignore:fuse")
def test_the_same_code_runs(part):
    getattr(typed_snippet, part)()
