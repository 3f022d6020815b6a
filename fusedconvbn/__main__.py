"""`python -m fusedconvbn`: the facts of the build."""

import torch

from . import __version__, build_info


def main() -> None:
    print(f"fusedconvbn {__version__}, torch {torch.__version__}")
    for name, value in build_info().items():
        print(f"  {name}: {', '.join(value) if isinstance(value, tuple) else value}")


if __name__ == "__main__":
    main()
