"""The rule of ``nn.BatchNorm*`` for mode, momentum and buffers, in one place: eager code, captured
graphs and TorchScript all call these functions."""

from typing import Any, Optional

from torch import Tensor, nn

ATTRIBUTES = (
    "training",
    "track_running_stats",
    "momentum",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)


def batch_norm_attributes(bn: nn.Module) -> list[Any]:
    """The attributes of a module that the functions below take."""
    return [getattr(bn, name) for name in ATTRIBUTES]


def batch_norm_call(
    training: bool,
    track_running_stats: bool,
    momentum: Optional[float],  # noqa: UP045 (TorchScript reads these annotations)
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
) -> tuple[
    bool,
    Optional[float],  # noqa: UP045
    Optional[Tensor],  # noqa: UP045
    Optional[Tensor],  # noqa: UP045
    Optional[Tensor],  # noqa: UP045
]:
    """The arguments of one call, from a module's attributes: whether the batch statistics are used,
    the momentum, and each of the three buffers, or None where the call neither reads nor updates
    it."""
    if training and not track_running_stats:
        running_mean, running_var = None, None
    if not (training and track_running_stats):
        num_batches_tracked = None
    if num_batches_tracked is None and momentum is None:
        momentum = 0.0
    batch_statistics = training or (running_mean is None and running_var is None)
    return batch_statistics, momentum, running_mean, running_var, num_batches_tracked


def pack_batch_norm(
    batch_statistics: bool,
    momentum: Optional[float],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
) -> tuple[list[Tensor], int, float, int]:
    """The same arguments in the form of ``conv_bn_chain``: the buffers that are not None, their
    number, the momentum (nan for None), and the mode."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected a batch norm with running_mean and running_var, both or neither")
    buffers: list[Tensor] = []
    for buffer in (running_mean, running_var, num_batches_tracked):
        if buffer is not None:
            buffers.append(buffer)
    nan = float("nan")
    return buffers, len(buffers), nan if momentum is None else momentum, int(batch_statistics)


def batch_norm_link(
    training: bool,
    track_running_stats: bool,
    momentum: Optional[float],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
) -> tuple[list[Tensor], int, float, int]:
    """:func:`pack_batch_norm` of a module's attributes."""
    batch_statistics, momentum, running_mean, running_var, num_batches_tracked = batch_norm_call(
        training, track_running_stats, momentum, running_mean, running_var, num_batches_tracked
    )
    return pack_batch_norm(
        batch_statistics, momentum, running_mean, running_var, num_batches_tracked
    )
