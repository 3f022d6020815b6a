"""The Python examples in docs/ run as they stand: the blocks of a page from top to bottom, as one
script in a process of its own. A block below a line `<!-- not run -->` is left out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def script(text: str) -> str:
    """The Python of a page, each line at its place in the page, so that an error names the page's
    own line."""
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        before = text[: block.start()].rstrip("\n").rpartition("\n")[2].strip()
        if block[1] == "python" and before != "<!-- not run -->":
            first = text[: block.start(2)].count("\n")
            lines[first : first + block[2].count("\n")] = block[2].splitlines()
    return "\n".join(lines) + "\n"


PAGES = {path.stem: script(path.read_text("utf-8")) for path in sorted(DOCS.glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, code in PAGES.items() if code.strip()])
def test_examples_run(page, tmp_path):
    path = tmp_path / f"{page}.py"
    path.write_text(PAGES[page], "utf-8")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    run = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, f"docs/{page}.md (lines as in the page):\n{run.stderr[-4000:]}"


def test_every_page_about_a_feature_has_an_example():
    without = {name for name, code in PAGES.items() if not code.strip()}
    assert without <= {"coverage", "cuda", "design", "experiments", "measurements", "performance"}


def test_blocks_are_found():
    page = "a\n```python\nx = 1\n```\n```sh\nls\n```\n"
    page += "<!-- not run -->\n```python\ny\n```\n\n```python title\nz = x\n```\n"
    found = {n: line for n, line in enumerate(script(page).splitlines(), 1) if line}
    assert found == {3: "x = 1", 14: "z = x"}


def test_tables_are_those_of_the_results():
    """Those of README.md and docs; `python benchmarks/tables.py` writes them."""
    command = [sys.executable, DOCS.parent / "benchmarks" / "tables.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
