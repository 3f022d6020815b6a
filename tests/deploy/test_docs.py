"""The Python examples in README.md and docs/ run as they stand: the blocks of a page from top to
bottom, as one script in a process of its own. A block below a line `<!-- not run -->` is left
out. The blocks of docs/recipes.md need packages of others; tests/recipes runs them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from pages import DOCS, FENCE, script

import fusedconvbn
from fusedconvbn.__main__ import main

PATHS = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES = {path.stem: script(path.read_text("utf-8")) for path in PATHS if path.stem != "recipes"}


@pytest.mark.independent
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
    assert run.returncode == 0, f"{page}.md (lines as in the page):\n{run.stderr[-4000:]}"


# Pages of results and of the project, and those with tests of their own.
WITHOUT_EXAMPLE = {"performance", "measurements", "coverage", "cuda", "experiments"}
WITHOUT_EXAMPLE |= {"design", "changelog", "contributing", "installation"}


def test_every_page_about_a_feature_has_an_example():
    assert {name for name, code in PAGES.items() if not code.strip()} <= WITHOUT_EXAMPLE


def test_the_reference_has_everything_public():
    reference = "".join(path.read_text("utf-8") for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto\w+:: (\w+)", reference, re.MULTILINE)
    assert {*fusedconvbn.__all__} <= {*documented}


def test_the_reference_has_the_operators_as_they_are():
    page = (DOCS / "api" / "operators.md").read_text("utf-8")
    known = (s for s in torch._C._jit_get_all_schemas() if re.match("fusedconvbn::[^_]", s.name))
    texts = [block[2] for block in FENCE.finditer(page) if block[1] == "text"]
    documented = {str(torch._C.parse_schema(f"fusedconvbn::{text.strip()}")) for text in texts}
    assert documented == {*map(str, known)}


@pytest.mark.parametrize("command", ["explain", "fit"])
def test_the_reference_has_every_option_of_the_command_line(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = {*re.findall(r"--[a-z]\w+", capsys.readouterr().out)} - {"--help"}
    page = (DOCS / "api" / "cli.md").read_text("utf-8")
    assert {"--json", "--size"} <= options
    assert {option for option in options if f"| `{option}" not in page} == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_beside_the_site_lead_somewhere(page):
    """Sphinx checks those of docs/."""
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", (DOCS.parent / page).read_text("utf-8"))
    assert links
    assert [link for link in links if not (DOCS.parent / link).exists()] == []


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
