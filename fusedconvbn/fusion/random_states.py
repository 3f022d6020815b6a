"""The states of the generators of random numbers that a model, or a training step, may use."""

import random
import sys
from collections.abc import Callable, Iterable

import torch


def random_states(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Reads the states of Python's, NumPy's and torch's generators, those of the GPUs among the
    devices too. The result brings them back."""
    numpy = sys.modules.get("numpy")
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = numpy and numpy.random.get_state()
    of_gpus = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def restore() -> None:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy:
            numpy.random.set_state(of_numpy)
        for device, state in of_gpus.items():
            torch.cuda.set_rng_state(state, device)

    return restore
