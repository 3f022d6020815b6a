"""The hooks in front of a child whose `forward` is not run: those that make a parameter are, others cannot be."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Hooks that make a parameter of their module, of which they read nothing else.
PARAMETER_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


def make_parameters(modules: Iterable[nn.Module]) -> None:
    """Runs what `torch.nn.utils.prune` and the older `weight_norm` and `spectral_norm` do before a call."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PARAMETER_HOOKS):
                hook(module, ())


def refuse_other_hooks(where: str, name: str, module: nn.Module) -> None:
    """Refuses hooks that read what a child would have been called with, which is not made."""
    for hook in module._forward_pre_hooks.values():
        if not isinstance(hook, PARAMETER_HOOKS):
            raise TypeError(
                f"{where}: expected {name} without forward_pre_hooks, as its input is not made; got {hook}. Register it on "
                f"the {where}, or use the modules unfused"
            )


def refuse_hooks_in_script(where: str, modules: Iterable[nn.Module]) -> None:
    if any(module._forward_pre_hooks for module in modules):
        raise TypeError(
            f"{where}: expected modules without forward_pre_hooks to be scripted; make what they compute permanent first, "
            "as torch.nn.utils.prune.remove does"
        )
