"""`python -m fusedconvbn` prints the facts of the build; `… explain SOURCE` says what fusing a
model would do."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

import torch
from torch import nn

from . import __version__, _torchvision, build_info, explain


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("fusedconvbn", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    of_model = commands.add_parser("explain", help="what fusing a model does to its memory")
    of_model.add_argument(
        "source", help="torchvision:NAME, or module.path:factory, called without arguments"
    )
    of_model.add_argument("--batch", type=int, default=8)
    of_model.add_argument("--size", type=int, default=224, help="of the image (default: 224)")
    of_model.add_argument("--channels", type=int, default=3, help="of the image (default: 3)")
    of_model.add_argument(
        "--budget", default="auto", help='"auto", "min", a fraction of eager\'s bytes, or "6GiB"'
    )
    of_model.add_argument("--plot", metavar="PATH", help="draw a picture")
    of_model.add_argument("--json", metavar="PATH", help="write the report's numbers")
    options = parser.parse_args(arguments)
    if options.command is None:
        return _print_facts()

    try:
        memory: float | str = float(options.budget)
    except ValueError:
        memory = options.budget
    try:
        model = _model(options.source)
        image = torch.empty(options.batch, options.channels, options.size, options.size)
        report = explain(model, image, memory=memory)
    except (ValueError, ImportError, AttributeError) as error:
        sys.exit(f"fusedconvbn: {error}")
    print(report)
    if options.plot:
        report.plot(options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report.to_dict(), file, indent=1)


def _print_facts() -> None:
    print(f"fusedconvbn {__version__}, torch {torch.__version__}")
    for name, value in build_info().items():
        print(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")


def _model(source: str) -> nn.Module:
    where, _, name = source.partition(":")
    if not name:
        raise ValueError(
            f"expected a source like torchvision:resnet50 or module.path:factory, got {source!r}"
        )
    if where == "torchvision":
        return _torchvision.models().get_model(name, weights=None)
    sys.path.insert(0, "")
    return getattr(importlib.import_module(where), name)()


if __name__ == "__main__":
    main()
