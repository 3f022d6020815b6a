"""What nvcc makes of the CUDA kernels, read from its report and from the machine code: registers,
spills, and loads in flight."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

THREADS_OF_A_MULTIPROCESSOR = 1024  # 4 blocks of 256, which the launch bounds ask for
REPORT = re.compile(
    r"Function properties for (?P<name>\S+)\n\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers"
)
LOAD = re.compile(r"\bLDG\.E(?:\.\w+)*? (?P<register>R\d+),")
WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")
REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass
class Kernel:
    """
    Attributes:
        name: without namespaces, as `reduce_channels_last<Stats<BFloat16>, 8>`.
        stack, spilled: bytes.
        in_flight, width: the most loads that a thread has under way before it needs one of them,
            and the bytes of each.
    """

    name: str
    registers: int
    stack: int
    spilled: int
    in_flight: int = 0
    width: int = 0

    @property
    def must_not_spill(self) -> bool:
        """All but those that choose the activation at run time."""
        return "Activation" not in self.name

    def __str__(self) -> str:
        said = f"{self.name}: {self.registers} registers, {self.stack} bytes of stack, "
        said += f"{self.spilled} spilled"
        return said + (f", {self.in_flight} loads of {self.width} bytes" if self.width else "")

    @property
    def kibibytes_in_flight(self) -> float:
        """Of a multiprocessor."""
        return self.in_flight * self.width * THREADS_OF_A_MULTIPROCESSOR / 1024


@dataclass
class Resources:
    architecture: str
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def spills(self) -> list[Kernel]:
        return [k for k in self.kernels if k.must_not_spill and k.spilled + k.stack > 0]

    def summary(self) -> str:
        lines = [f"sm_{self.architecture.replace('.', '')}: {len(self.kernels)} kernels"]
        spilling = [k for k in self.kernels if k.spilled + k.stack > 0]
        if spilling:
            most = max(k.spilled for k in spilling)
            lines.append(f"{len(spilling)} of them spill, at most {most} bytes")
        if self.spills:
            lines.append("among them " + "; ".join(map(str, self.spills)))
        return ", ".join(lines)

    def as_json(self) -> str:
        """A line for each kernel."""
        return ",\n".join(json.dumps(asdict(kernel)) for kernel in self.kernels)


def resources(reports: str, architecture: str, machine_code: str = "") -> Resources:
    """Of one architecture, from what `nvcc --resource-usage` said, and from the output of
    `cuobjdump -sass`."""
    found = list(REPORT.finditer(reports))
    names = _readable([m["name"] for m in found])
    loads = dict(loads_in_flight(machine_code))
    kernels = []
    for m, name in zip(found, names, strict=True):
        spilled = int(m["stores"]) + int(m["loads"])
        kernel = Kernel(name, int(m["registers"]), int(m["stack"]), spilled)
        kernel.in_flight, kernel.width = loads.get(m["name"], (0, 0))
        kernels.append(kernel)
    return Resources(architecture, sorted(kernels, key=lambda k: k.name))


def _readable(names: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), text=True, check=True, capture_output=True
    ).stdout
    text = re.sub(r"fusedconvbn::(cuda::)?|\(anonymous namespace\)::|c10::|\bvoid ", "", text)
    for value, where in enumerate(("u", "sum", "result")):
        text = text.replace(f"(At){value}", f"at {where}")
    return [line.split("(")[0] for line in text.splitlines()]


def loads_in_flight(machine_code: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Of each function the most loads of global memory, by their bytes, that are issued before a
    register of one is read."""
    for part in machine_code.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        most: tuple[int, int] = (0, 0)
        pending: dict[
            int, tuple[int, int]
        ] = {}  # register: bytes of its load, and which of its registers
        for line in body.splitlines():
            instruction = line.split(";")[0]
            load = LOAD.search(instruction)
            operands = instruction[load.end() :] if load else instruction
            if any(int(r) in pending for r in REGISTER.findall(operands)) or "EXIT" in operands:
                most = max(most, _widest(pending), key=lambda found: found[0] * found[1])
                pending = {}
            if load:
                bits = WIDTH.search(load[0])
                width = int(bits[1]) // 8 if bits else 4
                first = int(load["register"][1:])
                pending |= {first + i: (width, i) for i in range(-(-width // 4))}
        yield name.strip(), most


def _widest(pending: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Loads and their bytes, of the width of which most bytes are under way."""
    widths = [width for width, part in pending.values() if part == 0]
    counts = [(widths.count(width), width) for width in {*widths}]
    return max(counts, key=lambda found: found[0] * found[1], default=(0, 0))


def find_disassembler(toolkit: Path) -> str | None:
    """cuobjdump of the toolkit, on PATH, or that which Triton carries."""
    triton = find_spec("triton")
    folders = [toolkit / "bin"]
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    places = [str(folder / "cuobjdump") for folder in folders]
    return next((path for p in ["cuobjdump", *places] if (path := shutil.which(p))), None)
