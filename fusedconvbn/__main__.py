"""`python -m fusedconvbn` prints the facts of the build; `… explain SOURCE` says what fusing a
model would do; `… fit SOURCE` finds the largest batch that fits into a memory."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, build_info, explain, fit
from .sources import SOURCES, factory_of


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("fusedconvbn", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    of_model = argparse.ArgumentParser(add_help=False)
    of_model.add_argument("source", help=f"{SOURCES}, which is called without arguments")
    of_model.add_argument("--size", type=int, default=224, help="of the image (default: 224)")
    of_model.add_argument("--channels", type=int, default=3, help="of the image (default: 3)")
    of_model.add_argument("--json", metavar="PATH", help="write the numbers")

    explaining = commands.add_parser(
        "explain", parents=[of_model], help="what fusing a model does to its memory"
    )
    explaining.add_argument("--batch", type=int, default=8)
    explaining.add_argument(
        "--budget", default="auto", help='"auto", "min", a fraction of eager\'s bytes, or "6GiB"'
    )
    explaining.add_argument("--plot", metavar="PATH", help="draw a picture")
    explaining.set_defaults(run=_explain)

    fitting = commands.add_parser(
        "fit", parents=[of_model], help="the largest batch that fits into a memory"
    )
    fitting.add_argument("--memory", required=True, help='bytes, or "12GiB"')
    fitting.add_argument("--optimizer", default="adam", help="adam (default), adamw, sgd, none")
    fitting.add_argument("--dtype", default="float32", help="float32 (default), bfloat16: autocast")
    fitting.add_argument("--device", help="whose speed: cpu, h100, h200 (default: what is there)")
    fitting.add_argument("--contiguous", action="store_true", help="not channels last")
    fitting.set_defaults(run=_fit)

    options = parser.parse_args(arguments)
    if options.command is None:
        return _print_facts()
    try:
        report = options.run(options)
    except (ValueError, TypeError, ImportError) as error:
        sys.exit(f"fusedconvbn: {error}")
    print(report)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report.to_dict(), file, indent=1)


def _explain(options: argparse.Namespace) -> Any:
    try:
        memory: float | str = float(options.budget)
    except ValueError:
        memory = options.budget
    image = torch.empty(options.batch, options.channels, options.size, options.size)
    report = explain(factory_of(options.source)(), image, memory=memory)
    if options.plot:
        report.plot(options.plot)
    return report


def _fit(options: argparse.Namespace) -> Any:
    return fit(
        options.source,
        int(options.memory) if options.memory.isdigit() else options.memory,
        sample=(options.channels, options.size, options.size),
        optimizer=options.optimizer,
        dtype=getattr(torch, options.dtype, options.dtype),
        device=options.device,
        channels_last=not options.contiguous,
    )


def _print_facts() -> None:
    print(f"fusedconvbn {__version__}, torch {torch.__version__}")
    for name, value in build_info().items():
        print(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")


if __name__ == "__main__":
    main()
