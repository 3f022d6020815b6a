"""The recipes in docs/recipes.md run as they stand. The blocks of a section are one script, in a
process of its own; then the block marked `elsewhere` is another, in which fusedconvbn cannot be
imported. `make recipes` installs what they need; where a package is missing, its recipe is
skipped."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, script, sections

RUN = Path(__file__).parent / "run_recipe.py"
SECTIONS = sections((DOCS / "recipes.md").read_text("utf-8"))
PACKAGES = {
    "timm": "timm",
    "Lightning": "lightning",
    "ultralytics": "ultralytics",
    "accelerate": "accelerate",
    "DDP with torchrun": "torch",
    "nnU-Net": "nnunetv2",
}
LAUNCHERS = {
    "DDP with torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
}


def run(folder: Path, code: str, *arguments: str | Path) -> None:
    path = folder / "recipe.py"
    path.write_text(code, "utf-8")
    environment = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "YOLO_OFFLINE": "true",
        **os.environ,
        "HOME": str(folder),  # for what they write there
        "YOLO_CONFIG_DIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, *arguments, path],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (
        f"docs/recipes.md (lines as in the page):\n{(done.stdout + done.stderr)[-6000:]}"
    )


def test_every_recipe_is_run():
    assert list(SECTIONS) == list(PACKAGES)
    for text in SECTIONS.values():
        assert script(text).strip() and script(text, "elsewhere").strip()
        assert not script(text, "not run").strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_recipe(name, tmp_path):
    # Found and not imported, as some cannot be imported where torchvision's operators do not load.
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    run(tmp_path, script(SECTIONS[name]), *LAUNCHERS.get(name, []), RUN)
    run(tmp_path, script(SECTIONS[name], "elsewhere"), RUN, "--without-fusedconvbn")
