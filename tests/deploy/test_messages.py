"""docs/troubleshooting.md has every message of the package, and none that the package has no more.

The messages are read from the sources, so a new one fails the test until the page says what it
means. Left out are internal asserts, and `fusedconvbn.reference`, which speaks as PyTorch does.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
GAP = "…"  # a value that is put in when the message is made
SAYING = ("warn", "warn_once", "exit", "error")
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def _text(node: ast.AST | None, local: dict[str, ast.AST]) -> str:
    """The string that an expression makes, with gaps."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, local) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in local:
            return _text(local[name], {})
    return GAP


def _local_strings(function: ast.AST) -> dict[str, ast.AST]:
    """The names that are given a value once, a string."""
    assigned: dict[str, list[ast.AST]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
    return {
        name: values[0]
        for name, values in assigned.items()
        if len(values) == 1 and isinstance(values[0], ast.Constant | ast.JoinedStr)
    }


def _message(node: ast.AST) -> ast.AST | None:
    """What an exception is made with, or is given to `warn` and its kind."""
    match node:
        case (
            ast.Raise(exc=ast.Call(args=[said, *_]))
            | ast.Assign(targets=[ast.Attribute(attr="args")], value=ast.Tuple(elts=[said]))
        ):
            return said
        case ast.Return(value=ast.Call(func=ast.Name(id=name), args=[said, *_])):
            return said if name.endswith("Error") else None
        case ast.Call(func=ast.Attribute(attr=name), args=[said, *_]):
            return said if name in SAYING else None
    return None


def _reasons(node: ast.AST) -> list[ast.AST]:
    """What is returned, or noted down, and may be put into a message."""
    match node:
        case (
            ast.Return(value=said)
            | ast.Assign(targets=[ast.Subscript() | ast.Name(id="reason")], value=said)
            | ast.Call(func=ast.Attribute(attr="setdefault"), args=[_, said])
        ):
            return [said.body, said.orelse] if isinstance(said, ast.IfExp) else [said]
    return []


def python_messages(source: str) -> Iterator[str]:
    """What a module raises or warns of, and the reasons in it: strings of four words and more."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name == "__str__":
            continue
        local = _local_strings(tree) | _local_strings(function)
        for node in ast.walk(function):
            if message := _message(node):
                yield _text(message, local)
            for reason in _reasons(node):
                if len(re.findall(r"\w{2,}", text := _text(reason, local))) >= 4:
                    yield text


CHECK = re.compile(r"\bTORCH_(?:CHECK\w*|WARN\w*)\(")


def _arguments(source: str, start: int) -> list[str]:
    """The arguments of a call in C++ whose parenthesis opens before `start`."""
    found, depth, argument, at = [], 0, start, start
    while depth >= 0:
        if source[at] == '"':
            at = STRING.match(source, at).end()
            continue
        depth += (source[at] in "([{") - (source[at] in ")]}")
        if depth < 0 or (depth == 0 and source[at] == ","):
            found.append(source[argument:at].strip())
            argument = at + 1
        at += 1
    return found


def _literal(argument: str) -> str:
    return "".join(STRING.findall(argument)) if STRING.sub("", argument).strip() == "" else GAP


def cpp_messages(source: str) -> Iterator[str]:
    """What TORCH_CHECK and its kind say. Internal asserts are left out: they tell of a fault of
    ours."""
    constants = dict(re.findall(r'constexpr auto (\w+) =\s*((?:"[^"]*"\s*)+);', source))
    for check in CHECK.finditer(source):
        arguments = _arguments(source, check.end())
        said = arguments if "WARN" in check[0] else arguments[1:]
        yield "".join(_literal(constants.get(a, a)) for a in said)


def messages() -> dict[str, Path]:
    """Each message, with the file that has it."""
    found = {}
    for folder, suffixes, read in (
        ("fusedconvbn", (".py",), python_messages),
        ("csrc", (".cpp", ".h"), cpp_messages),
    ):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path.name != "reference.py":
                for message in read(path.read_text("utf-8")):
                    text = re.sub(f"{GAP}+", GAP, " ".join(message.split())).replace('\\"', '"')
                    if re.search(r"\w", text):
                        found.setdefault(text, path.relative_to(ROOT))
    return found


def documented() -> list[str]:
    """The fragments of messages in the first columns of the page's tables: literal text, with gaps
    for anything."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    ours, _, _ = page.partition("\n## Messages of others\n")
    cells = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    return [span.strip() for cell in cells for _, span in re.findall(r"(`+)(.+?)\1(?!`)", cell)]


def has(message: str, fragment: str) -> bool:
    return re.search(".*".join(map(re.escape, fragment.split(GAP))), message) is not None


MESSAGES, DOCUMENTED = messages(), documented()


def test_every_message_is_explained():
    missing = [
        f"{m}  ({path})" for m, path in MESSAGES.items() if not any(has(m, d) for d in DOCUMENTED)
    ]
    assert not missing, "docs/troubleshooting.md does not have:\n" + "\n".join(missing)


def test_no_message_is_explained_that_does_not_exist():
    assert [d for d in DOCUMENTED if not any(has(m, d) for m in MESSAGES)] == []


def test_fragments_are_not_so_short_that_they_fit_anything():
    assert [d for d in DOCUMENTED if sum(has(m, d) for m in MESSAGES) > 5] == []


def test_messages_are_found():
    python = """
def f(x):
    rule = f"expected {x} above 0"
    if x:
        raise ValueError(f"{rule}, got {x!r}")
    warnings.warn("f: nothing " f"is {x}", stacklevel=2)
    return "it has no running statistics"
"""
    found = {"expected … above 0, got …", "f: nothing is …", "it has no running statistics"}
    assert {*python_messages(python)} == found
    cpp = """
constexpr auto both = "one, " "two";
TORCH_CHECK_VALUE(f(a, ")"), op, ": expected ", name, (b ? "x" : "y"), " (\\"quoted\\")");
TORCH_CHECK(ok, both); TORCH_WARN("careful with ", n);
"""
    found = ['…: expected …… (\\"quoted\\")', "one, two", "careful with …"]
    assert list(cpp_messages(cpp)) == found
