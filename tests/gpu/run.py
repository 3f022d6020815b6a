"""Runs the stages of stages.py, each within a time of its own; see run.sh.

A stage that fails, or is stopped, does not stop the next. What it prints goes to OUT/log.txt, how
it ended to OUT/gpu-summary.json and into the table that is printed last.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages import Stage, stages_of

RESULTS = ("log.txt", "gpu-*.json", "*.xml", "profile.txt")  # those of an earlier run are removed
SECONDS = 510  # of everything
LEAST = 5  # seconds that a stage is begun with
GRACE = 15  # seconds that a stage has to write down what it knows, once it is told to stop
KILLED = 3  # seconds that the system has to end it


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    status: str  # passed, skipped, failed, out of time, not reached
    seconds: float = 0.0
    said: str = ""  # its last line


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].strip("= ")[:160] if lines else ""


class Run:
    """Stages one after another, or a few at the same time, until `seconds` are over."""

    def __init__(self, out: Path, work: Path, seconds: float = SECONDS) -> None:
        self.out, self.work, self.start = out, work, time.monotonic()
        self.deadline = self.start + seconds - GRACE - KILLED
        self.outcomes: list[Outcome] = []
        quiet = {"KINETO_LOG_LEVEL": "99", "TQDM_DISABLE": "1"}
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **quiet}
        out.mkdir(parents=True, exist_ok=True)
        for pattern in RESULTS:
            for old in out.glob(pattern):
                old.unlink()

    def together(self, stages: Sequence[Stage]) -> None:
        """Runs stages at the same time, each until its own seconds or all seconds are over."""
        begin = time.monotonic()
        running: dict[str, tuple[Stage, subprocess.Popen, Path]] = {}
        for stage in stages:
            if self.deadline - begin < min(LEAST, stage.seconds):
                self._ended(Outcome(stage.name, "not reached"))
                continue
            said = self.work / f"{stage.name}.txt"
            with said.open("w") as file:
                process = subprocess.Popen(
                    list(map(str, stage.command)),
                    cwd=self.work,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=heed_interrupts,
                )
            running[stage.name] = stage, process, said
        late: dict[str, float] = {}  # since when
        while running:
            time.sleep(0.05)
            for name, (stage, process, said) in list(running.items()):
                now = time.monotonic()
                status = {None: "", 0: "passed"}.get(process.poll(), "failed")
                over = now > min(begin + stage.seconds, self.deadline)
                if not status and over and name not in late:
                    # pytest and the benchmarks write down what they know
                    process.send_signal(signal.SIGINT)
                    late[name] = now
                if status or now > late.get(name, now) + GRACE:
                    status = "out of time" if name in late else status
                    del running[name]
                    end_all(process)
                    text = said.read_text("utf-8", errors="replace")
                    end = last_line(text)
                    if status == "passed" and "skipped" in end and "passed" not in end:
                        status = "skipped"  # all tests of it
                    self._ended(Outcome(name, status, now - begin, end), text)

    def use(self, found: Path) -> None:
        """From now on, what setup has left there."""
        for variable, name in {
            "PYTHONPATH": "site",
            "FUSEDCONVBN_KERNELS": "libkernels.so",
        }.items():
            if (found / name).exists():
                self.environment[variable] = str(found / name)

    def _ended(self, outcome: Outcome, text: str = "") -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.stage}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n===== {outcome.stage}: {outcome.status}\n{text}")
        facts = self.work / "machine.json"
        summary = {
            "machine": json.loads(facts.read_text("utf-8")) if facts.exists() else {},
            "seconds": round(time.monotonic() - self.start, 1),
            "stages": [vars(o) for o in self.outcomes],
        }
        path = self.out / "gpu-summary.json"
        path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def print_table(self) -> None:
        print(f"\nresults in {self.out}, after {time.monotonic() - self.start:.0f} s")
        width = max((len(o.stage) for o in self.outcomes), default=0)
        for o in self.outcomes:
            print(f"  {o.stage.ljust(width)}  {o.status:11}  {o.seconds:4.0f} s  {o.said}")


def heed_interrupts() -> None:
    """A job that a shell has started with `&` ignores SIGINT, and so does what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_all(process: subprocess.Popen) -> None:
    """Ends a stage and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # of a driver that hangs
        process.wait(KILLED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these, behind setup")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder), arguments.out.resolve()
        run = Run(out, work)
        setup, *others = stages_of(out, work, arguments.dry_run)
        run.together(setup)
        run.use(work)
        if run.outcomes[0].status != "passed":
            run.deadline = run.start  # nothing else is reached
        for stages in others:
            run.together([s for s in stages if s.name in (arguments.only or [s.name])])
        run.print_table()
    sys.exit(any(o.status != "passed" for o in run.outcomes))


if __name__ == "__main__":
    main()
