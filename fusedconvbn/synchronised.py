"""Batch statistics over all processes of a group, as in nn.SyncBatchNorm."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Synchronised(NamedTuple):
    """Whether a layer is synchronised, and in which group; None is the group of all processes, as
    in nn.SyncBatchNorm."""

    on: bool
    group: Any  # dist.ProcessGroup | None; not every build of torch has torch.distributed

    def group_name(self) -> str:
        """The group's current name, or "" where the statistics are those of one process: the layer
        is not synchronised, the group has one process, or this process is not in it."""
        if not self.on or not (dist.is_available() and dist.is_initialized()):
            return ""
        group: Any = self.group if self.group is not None else dist.group.WORLD
        return str(group.group_name) if dist.get_world_size(group) > 1 else ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Synchronised":
        return self  # a process group cannot be copied


NOT_SYNCHRONISED = Synchronised(False, None)


def group_name_of(bn: nn.Module) -> str:
    """The name of the group over which a batch norm module takes its statistics in its current
    mode."""
    if isinstance(bn, nn.SyncBatchNorm) and bn.training:
        return Synchronised(True, bn.process_group).group_name()
    return ""


def plain_batch_norm(bn: _BatchNorm, kind: type[nn.Module]) -> nn.Module:
    """A batch norm of class `kind` with the options, parameters, buffers and mode of `bn`."""
    plain = kind(
        bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta"
    )
    plain._parameters = dict(bn._parameters)
    plain._buffers = dict(bn._buffers)
    return plain.train(bn.training)
