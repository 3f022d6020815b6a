"""The states of the generators of random numbers that a model, or a training step, may use."""

import random
import sys
from collections.abc import Callable

import torch


def random_states(device: torch.device) -> Callable[[], None]:
    """Reads the states of Python's, NumPy's and torch's generators, a GPU's too if that is the
    device. The result brings them back."""
    numpy = sys.modules.get("numpy")
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = numpy and numpy.random.get_state()
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy:
            numpy.random.set_state(of_numpy)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, device)

    return restore
