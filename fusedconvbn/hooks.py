"""Forward pre-hooks of children whose `forward` does not run: hooks that compute a parameter are
run, others are refused."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# These hooks compute a parameter of their module, and read nothing of the call.
PARAMETER_HOOKS = (prune.BasePruningMethod, WeightNorm, SpectralNorm)


def compute_parameters(modules: Iterable[nn.Module]) -> None:
    """Runs the hooks of `torch.nn.utils.prune` and of the older `weight_norm` and
    `spectral_norm`."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PARAMETER_HOOKS):
                hook(module, ())


def refuse_other_hooks(where: str, name: str, module: nn.Module) -> None:
    """Refuses hooks that read the input of a child, which is never computed."""
    for hook in module._forward_pre_hooks.values():
        if not isinstance(hook, PARAMETER_HOOKS):
            raise TypeError(
                f"{where}: expected {name} without forward_pre_hooks, as its input is not "
                f"computed; got {hook}. Register it on the {where}, or use the modules unfused"
            )


def refuse_hooks_in_script(where: str, modules: Iterable[nn.Module]) -> None:
    if any(module._forward_pre_hooks for module in modules):
        raise TypeError(
            f"{where}: expected modules without forward_pre_hooks to be scripted; first make "
            "permanent what the hooks compute, as torch.nn.utils.prune.remove does"
        )
