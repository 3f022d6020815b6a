"""The memory of optimizers, as multiples of the bytes of the parameters."""

from typing import NamedTuple


class Optimizer(NamedTuple):
    """What it keeps between steps, and what is live only during its step, beside the gradients."""

    states: int
    temporary: int


OPTIMIZERS = {
    "none": Optimizer(0, 0),
    "sgd": Optimizer(1, 0),  # with momentum
    "adam": Optimizer(2, 1),
    "adamw": Optimizer(2, 1),
}
