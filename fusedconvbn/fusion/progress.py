"""A progress bar in the terminal."""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE = 2.0  # seconds without a bar
_INTERVAL = 0.2  # seconds between two drawings
_WIDTH = 24


@contextmanager
def progress(title: str, stages: int) -> Iterator[Callable[[str], None]]:
    """Shows a bar after two seconds, if stderr is a terminal. Yields a function to call with the
    name of each stage when it begins."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    start, done = time.monotonic(), threading.Event()
    stage, begun = "", 0

    def begin(name: str) -> None:
        nonlocal stage, begun
        stage, begun = name, begun + 1

    def draw() -> None:
        done.wait(_PATIENCE)
        while not done.wait(_INTERVAL):
            full = _WIDTH * (begun - 1) // stages
            bar = "█" * full + "░" * (_WIDTH - full)
            line = f"{title} {bar} {stage} {time.monotonic() - start:.0f} s"
            # One that is wrapped could not be written over.
            line = line[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r{line}\033[K")
            sys.stderr.flush()
        if time.monotonic() - start > _PATIENCE:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield begin
    finally:
        done.set()
        thread.join()
