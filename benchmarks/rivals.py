"""What `fuse` is measured against: checkpoints, torch.compile, In-Place ABN, the tutorial."""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedconvbn import reference

# Compiled variants, and the memory budget that each of them gives the compiler.
COMPILED = {"compile": 1.0, "compile, budget 0.5": 0.5, "compile, budget 0.3": 0.3}
NORMS = nn.modules.batchnorm._BatchNorm
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = list(x) if isinstance(x, list) else x  # densenet's list grows until backward
        return checkpoint(self.block, x, use_reentrant=False)


class PythonConvBN(nn.Module):
    """The tutorial's layer in Python, with what it lacks: padding and an affine norm."""

    def __init__(
        self,
        weight: Tensor,
        eps: float,
        padding: tuple[int, int] = (0, 0),
        bn: nn.BatchNorm2d | None = None,
    ) -> None:
        super().__init__()
        self.conv_weight, self.eps, self.padding, self.bn = weight, eps, padding, bn

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        out = reference.FusedConvBN2DFunction.apply(x, self.conv_weight, self.eps)
        if self.bn is None:
            return out
        return torch.addcmul(self.bn.bias[:, None, None], out, self.bn.weight[:, None, None])


def checkpointed(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy with a checkpoint around each block, and the paths of the blocks.

    A block has a batch norm inside and is a child of one of the model's Sequentials (layerN[i] of
    ResNet, features[i] of others) or of one of DenseNet's dense blocks.
    """
    model = copy.deepcopy(model)
    stages = {p: m for p, m in model.named_children() if isinstance(m, nn.Sequential)}
    stages |= {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleDict)}
    blocks = []
    for path, stage in stages.items():
        for name, block in stage.named_children():
            has_norm = any(isinstance(m, NORMS) for m in block.modules())
            if has_norm and not isinstance(block, (NORMS, nn.ModuleDict)):
                stage.register_module(name, Checkpointed(block))
                blocks.append(f"{path}.{name}")
    return model, blocks


def compiled(model: nn.Module, budget: float) -> nn.Module:
    """Compiled by a backend of its own: Dynamo must not reuse the code of another budget."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        with config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    return torch.compile(model, backend=backend)


def floor(model: nn.Module) -> nn.Module:
    """A copy without batch norm and activations: the least time with PyTorch's convolutions."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NORMS, *ACTIVATIONS)):
                setattr(module, name, nn.Identity())
    return model


def python_reference(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy with the tutorial's layer for each pair that it supports, and the number of pairs."""
    model = copy.deepcopy(model)
    replaced = 0
    for module in list(model.modules()):
        for (name, conv), (next_name, bn) in itertools.pairwise(list(module.named_children())):
            if (
                isinstance(conv, nn.Conv2d)
                and isinstance(bn, nn.BatchNorm2d)
                and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
                and conv.bias is None
                and conv.out_channels == bn.num_features
            ):
                layer = PythonConvBN(conv.weight, bn.eps, conv.padding, bn)
                setattr(module, name, layer)
                setattr(module, next_name, nn.Identity())
                replaced += 1
    return model, replaced


def inplace_abn(model: nn.Module) -> nn.Module | None:
    """A copy with In-Place ABN for each batch norm followed by an activation.

    In-Place ABN uses a leaky ReLU. None where the package is missing.
    """
    try:
        from inplace_abn import InPlaceABN
    except ImportError:
        return None
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, norm), (next_name, act) in itertools.pairwise(children):
            if isinstance(norm, NORMS) and isinstance(act, ACTIVATIONS):
                setattr(module, name, InPlaceABN(norm.num_features))
                setattr(module, next_name, nn.Identity())
    return model
