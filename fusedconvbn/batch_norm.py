"""What a batch norm's mode, momentum and buffers come to in one call: the rule of ``nn.BatchNorm*``, in one place. Eager code
and TorchScript read the same lines."""

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
    """What the functions below read of a module."""
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
    """From a module's attributes the arguments of a call: whether it takes the statistics of the batch, the momentum, and the
    three buffers as far as it reads or updates them."""
    if training and not track_running_stats:
        running_mean, running_var = None, None
    if not (training and track_running_stats):
        num_batches_tracked = None
    if num_batches_tracked is None and momentum is None:
        momentum = 0.0
    batch_statistics = training or (running_mean is None and running_var is None)
    return batch_statistics, momentum, running_mean, running_var, num_batches_tracked


def batch_norm_link(
    training: bool,
    track_running_stats: bool,
    momentum: Optional[float],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    num_batches_tracked: Optional[Tensor],  # noqa: UP045
) -> tuple[list[Tensor], int, float, int]:
    """The same as ``conv_bn_chain`` takes it of each norm link: its buffers, their number, momentum and mode."""
    batch_statistics, momentum, running_mean, running_var, num_batches_tracked = batch_norm_call(
        training, track_running_stats, momentum, running_mean, running_var, num_batches_tracked
    )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected a batch norm with running_mean and running_var, both or neither")
    buffers: list[Tensor] = []
    for buffer in (running_mean, running_var, num_batches_tracked):
        if buffer is not None:
            buffers.append(buffer)
    none = float("nan")
    return buffers, len(buffers), none if momentum is None else momentum, int(batch_statistics)
