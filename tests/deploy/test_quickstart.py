"""examples/quickstart.ipynb: its cells run from top to bottom, and what the file shows below them
is what they print. Figures may differ; for the rest a cell has to be run again:

    jupyter nbconvert --to notebook --execute --inplace examples/quickstart.ipynb
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
ALL_CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CELLS = [c for c in ALL_CELLS if c["cell_type"] == "code"]


def words(text):
    """The words of a text: figures, and what a plan keeps, depend on the machine."""
    return re.findall(r"[^\W\d]+", re.sub(r"\b(saved|recomputed)\b.*", "", text))


def test_cells_run_and_print_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    names = {}
    for number, cell in enumerate(CELLS, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        shown = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")
        assert words(printed.getvalue()) == words(shown), f"cell {number}"


@pytest.mark.parametrize("number", range(1, len(CELLS) + 1))
def test_outputs_are_of_one_run(number):
    cell = CELLS[number - 1]
    assert cell["execution_count"] == number
    assert not any(
        o["output_type"] == "error" or o.get("name") == "stderr" for o in cell["outputs"]
    )


def test_pictures_are_files():
    """A picture inside of the notebook would be one line of a quarter of a megabyte, new in every
    run. The cell that draws it writes the file that the text below it shows."""
    assert all(o["output_type"] == "stream" for cell in CELLS for o in cell["outputs"])
    texts = "".join("".join(c["source"]) for c in ALL_CELLS if c["cell_type"] == "markdown")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", texts)
    assert pictures and all((NOTEBOOK.parent / path).is_file() for path in pictures)
    code = "".join(line for c in CELLS for line in c["source"])
    assert all(f'"{path}"' in code for path in pictures)
