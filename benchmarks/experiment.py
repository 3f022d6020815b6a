"""The experiment of examples/mnist.py, as `make demo` runs it.

    python benchmarks/experiment.py

Writes benchmarks/results/experiment-cpu.json, which has the table of examples/README.md, and its
picture, docs/experiment.png.
"""

import sys

from common import ROOT, argument_parser, begin, output_path, save

sys.path.insert(0, str(ROOT / "examples"))
import mnist


def main() -> None:
    arguments = argument_parser(__doc__, rounds=1).parse_args()
    results = begin(arguments)
    title, *both = mnist.run(mnist.parse_arguments(["--device", str(arguments.device)]))
    results |= {"title": title, "figures": mnist.figures(*both)}
    results["difference of the losses"] = mnist.largest_difference(*both)
    save(results, output_path(arguments))
    mnist.plot(*both, title, ROOT / "docs/experiment.png")
    print(f"\n{title}\n\n{mnist.table(*both)}")


if __name__ == "__main__":
    main()
