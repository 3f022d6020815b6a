"""The architecture: which folder of csrc includes which, and what stands in one place alone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
# Each room may include what stands behind it, and itself.
ROOMS = ("csrc", "autograd", "autocast", "meta", "chain", "cpu", "cuda", "kernels")


def room(path: Path) -> str:
    return path.parent.name


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes_point_down(source):
    for name in re.findall(r'#include "(.*)"', source.read_text()):
        included = (source.parent / name).resolve()
        assert included in SOURCES
        assert ROOMS.index(room(source)) <= ROOMS.index(room(included)), name


def test_the_operator_does_not_import_the_whole_model_part():
    """Except for the two front doors of the package."""
    for path in (ROOT / "fusedconvbn").glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert not re.search(r"import.*fusion|from \.fusion", path.read_text()), path


def test_the_instruction_set_is_chosen_in_one_place():
    text = "".join(p.read_text() for p in SOURCES)
    assert text.count("get_cpu_capability") == 1
