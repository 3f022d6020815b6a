"""Writes as JSON what machine this is, and its bandwidth and FLOP/s at best.

python benchmarks/machine.py [--device cuda] --output machine.json
"""

from common import argument_parser, machine, rates, save


def main() -> None:
    arguments = argument_parser(__doc__, rounds=5).parse_args()
    save({**machine(arguments.device), **rates(arguments.device)}, arguments.output)


if __name__ == "__main__":
    main()
