"""The memory of optimizers, without weight decay."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import nn

Optimizer = Literal["none", "sgd", "adam", "adamw"]


class _Optimizer(NamedTuple):
    """Tensors of a parameter's size: those that it keeps between steps, and those that are live
    only during its step, of all parameters at once on CUDA, of one after another on a CPU."""

    states: int
    at_once: int
    one_by_one: int


OPTIMIZERS = {
    "none": _Optimizer(0, 0, 0),
    "sgd": _Optimizer(1, 0, 0),  # with momentum
    "adam": _Optimizer(2, 1, 2),
    "adamw": _Optimizer(2, 1, 2),
}


def optimizer_bytes(
    optimizer: str, parameters: Iterable[nn.Parameter], on_cuda: bool
) -> tuple[int, int]:
    """The bytes of its states, and of what is live during its step: the gradients included."""
    sizes = [p.nbytes for p in parameters if p.requires_grad]
    trained, largest, found = sum(sizes), max(sizes, default=0), OPTIMIZERS[optimizer]
    temporary = found.at_once * trained if on_cuda else found.one_by_one * largest
    return found.states * trained, trained + temporary
