"""The Python examples of the pages in docs/."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def script(text: str, mark: str = "") -> str:
    """The Python of a page, each line at its place in the page, so that an error names the page's
    own line. The mark of a block is the comment `<!-- … -->` in the line above it."""
    lines = [""] * text.count("\n")
    for block in FENCE.finditer(text):
        above = text[: block.start()].rstrip("\n").rpartition("\n")[2].strip()
        found = re.fullmatch(r"<!-- (.*) -->", above)
        if block[1] == "python" and (found[1] if found else "") == mark:
            first = text[: block.start(2)].count("\n")
            lines[first : first + block[2].count("\n")] = block[2].splitlines()
    return "\n".join(lines) + "\n"


def sections(text: str) -> dict[str, str]:
    """The parts of a page that begin with `## title`, each at its place in the page."""
    starts = [*re.finditer(r"^## (.*)$", text, re.MULTILINE)]
    ends = [*(s.start() for s in starts[1:]), len(text)]
    return {
        s[1]: "\n" * text[: s.start()].count("\n") + text[s.start() : end]
        for s, end in zip(starts, ends, strict=True)
    }
