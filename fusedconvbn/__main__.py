"""Prints the facts of the build, says what fusing a model would do to its memory, or finds the
largest batch that fits into a memory."""

import argparse
import json
import logging
import os
import platform
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import __version__, build_info, sources
from .fusion.fit import DEVICES, DTYPES, Fit, bytes_of, fit
from .fusion.optimizers import OPTIMIZERS
from .fusion.plan import parse_memory
from .fusion.progress import progress
from .fusion.report import Report, explain

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line. Ends with exit status 2 if the arguments break a rule, which is found
    before any work is done, and with 1 if the work fails or nothing is fused."""
    of_all = parser()
    options = of_all.parse_args(arguments)
    if options.command in (None, "info"):
        print(_facts())
        if options.command is None:
            print(f"\n{of_all.format_usage().strip()}; --help says more")
        return
    if options.sample and (options.size or options.channels):
        options.error("argument --sample: not allowed with --size or --channels")
    _quieten()
    try:
        report = options.run(options)
        print(report, flush=True)
        if options.json:
            options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        if options.plot:
            with progress("draw", 1) as stage:
                stage(options.plot.name)
                report.plot(options.plot)
    except BrokenPipeError:  # what reads the report, as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        sys.exit(f"fusedconvbn: {_sentence(error)}")
    if report.unfused:
        sys.exit(f"fusedconvbn: nothing of {report.model} is fused, {report.unfused}")


def parser() -> argparse.ArgumentParser:
    """Of all arguments of :func:`main`."""
    of_all = argparse.ArgumentParser("fusedconvbn", description=__doc__)
    version = f"fusedconvbn {__version__} (torch {torch.__version__})"
    of_all.add_argument("--version", action="version", version=version)
    commands = of_all.add_subparsers(dest="command", metavar="{info,explain,fit}")
    commands.add_parser("info", help="the facts of the build, for a report of an error")

    of_model = argparse.ArgumentParser(add_help=False)
    add = of_model.add_argument
    add("source", type=_rule(_source), help=f"{sources.SOURCES}, which is called without arguments")
    add(
        "--size",
        type=_positive,
        metavar="N",
        help="of the image (default: 224, or what the model was made for)",
    )
    add("--channels", type=_positive, metavar="N", help="of the image (default: 3)")
    add(
        "--sample",
        type=_shape,
        metavar="SHAPE",
        help="a whole sample instead, as 1x64x64x64 for a volume",
    )
    add("--optimizer", choices=[*OPTIMIZERS], default="adam", help="(default: %(default)s)")
    add("--dtype", choices=[*_DTYPES], default="float32", help="bfloat16 stands for autocast")
    add("--contiguous", action="store_true", help="images and weights are not channels last")
    add("--json", type=_writable, metavar="PATH", help="write the numbers")
    add("--traceback", action="store_true", help="show where an error comes from")

    explaining = commands.add_parser(
        "explain", parents=[of_model], help="what fusing a model does to its memory"
    )
    add = explaining.add_argument
    add(
        "--batch", type=_positive, metavar="N", help="(default: 8; 2 for a detector of torchvision)"
    )
    add(
        "--budget",
        type=_rule(_budget),
        default="auto",
        help='auto (default), min, 40%% or 0.4 of eager\'s bytes, 6GiB, "peak 12GiB"',
    )
    add(
        "--device",
        type=_rule(_device),
        default=torch.device("cpu"),
        help="where the model is (default: cpu)",
    )
    add("--plot", type=_drawable, metavar="PATH", help="draw a picture")
    explaining.set_defaults(run=_explain)

    fitting = commands.add_parser(
        "fit", parents=[of_model], help="the largest batch that fits into a memory"
    )
    add = fitting.add_argument
    add("--memory", type=_rule(_bytes), required=True, help="12GiB, or bytes")
    add("--device", choices=[*DEVICES], help="whose speed (default: that of what is there)")
    fitting.set_defaults(run=_fit, plot=None)
    for command in (explaining, fitting):
        command.set_defaults(error=command.error)
    return of_all


# ------------------------------------------------------------------------------------ arguments


def _rule(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """As a type of argparse, with the message of the error that the function raises."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except (TypeError, ValueError, RuntimeError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _source(text: str) -> str:
    sources.split(text)
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*([x,×][1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected a shape like 3x224x224, got {text!r}")
    return tuple(map(int, re.split("[x,×]", text)))


def _number(text: str) -> float | int | str:
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _budget(text: str) -> float | int | str:
    parse_memory(_number(text))
    return _number(text)


def _bytes(text: str) -> int:
    number = _number(text)
    return bytes_of(text if isinstance(number, float) else number)


def _device(text: str) -> torch.device:
    device = torch.device(text)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected cpu or cuda, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"expected a device that torch finds, got {text!r}")
    return device


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder that exists, got {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a path that can be written, got {text!r}")
    return path


def _drawable(text: str) -> Path:
    path = _writable(text)
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        names = ", ".join(sorted(f".{name}" for name in known))
        raise argparse.ArgumentTypeError(f"expected a name that ends in {names}, got {text!r}")
    return path


# ----------------------------------------------------------------------------------------- work


def _explain(options: argparse.Namespace) -> Report:
    device, source, sample = options.device, options.source, options.sample
    with progress(f"explain {source}", 1) as stage:
        stage("build")
        model = sources.factory_of(source)().to(device)
        sample = sample or _sample_of(options)
        batch = options.batch or (8 if sources.takes_a_batch(source) else 2)
        inputs = sources.inputs_of(source, batch, sample)
    images = torch.preserve_format
    if len(sample) == 3 and not options.contiguous:
        images = torch.channels_last
        model = model.to(memory_format=images)  # type: ignore[call-overload]  # not in torch's types

    def placed(t: Tensor) -> Tensor:
        return t.to(device, memory_format=images if t.dim() == 4 else torch.preserve_format)

    inputs = pytree.tree_map_only(Tensor, placed, inputs)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        return explain(model, inputs, memory=options.budget, optimizer=options.optimizer)


def _fit(options: argparse.Namespace) -> Fit:
    return fit(
        options.source,
        options.memory,
        sample=options.sample or _sample_of(options),
        optimizer=options.optimizer,
        dtype=_DTYPES[options.dtype],
        device=options.device,
        channels_last=not options.contiguous,
    )


def _sample_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The shape of a sample of the source, with the size and the channels that were given."""
    channels, *extents = sources.sample_of(options.source)
    if options.size:
        extents[-2:] = options.size, options.size
    return options.channels or channels, *extents


def _facts() -> str:
    facts = {
        **build_info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "folder": Path(__file__).parent,
    }
    lines = [f"fusedconvbn {__version__}, torch {torch.__version__}"]
    for name, value in facts.items():
        lines.append(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")
    return "\n".join(lines)


def _quieten() -> None:
    """Leaves out what libraries say to programmers. The report has where a graph breaks."""
    if "TORCH_LOGS" not in os.environ:
        torch._logging.set_logs(all=logging.CRITICAL)
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


def _sentence(error: BaseException) -> str:
    """An error on one line, with its type unless this package raised it."""
    while type(error).__module__ == "torch._dynamo.exc":  # around what the model raised
        cause = error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_globals.get("__package__", "").partition(".")[0] == __package__:
        return str(error)
    return sources.failure("the model", error)


if __name__ == "__main__":
    main()
