"""Layers whose `bn` is an nn.SyncBatchNorm: batch statistics over all processes of a group."""

import torch.distributed as dist
from torch import nn


def process_group_name(bn: nn.Module) -> str:
    """The name of the group that `bn` is synchronised in, "" when it is not: it is no nn.SyncBatchNorm, or there is one
    process."""
    if not isinstance(bn, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return ""
    group = bn.process_group if bn.process_group is not None else dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


def plain_batch_norm(bn: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A batch norm of class `kind` with the options, parameters, buffers and mode of `bn`."""
    plain = kind(
        bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta"
    )
    plain._parameters = dict(bn._parameters)
    plain._buffers = dict(bn._buffers)
    return plain.train(bn.training)
