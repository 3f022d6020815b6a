"""A chain that is built by hand."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .activations import activation_name
from .hooks import make_parameters, refuse_hooks_in_script, refuse_other_hooks
from .links import BATCH_NORMS, CONVOLUTIONS, Chain, ConvLink, NormLink, refuse_lazy
from .planning import price_per_byte, seconds_per_value
from .scripting import scriptable


class FusedConvBNSequential(nn.Sequential):
    r"""``nn.Sequential`` of convolutions, batch norms and activations that runs as one chain.

    Each link's backward needs its input: :math:`T_{i+1} = \mathrm{conv}(T_i)` or
    :math:`T_{i+1} = \mathrm{act}(\mathrm{bn}(T_i))`. Only some of the inner :math:`T_i` are kept; the others are remade in
    backward from the nearest kept one, with the statistics that forward found. Numbers, ``state_dict`` keys and running
    statistics are those of ``nn.Sequential`` with the same modules.

    Args:
        modules: ``nn.Conv*``, ``nn.ConvTranspose*``, ``nn.BatchNorm*`` or ``nn.SyncBatchNorm``, each activation behind a
            batch norm; or one ``OrderedDict`` of them. A convolution with a ``padding_mode`` other than zeros comes first.
        memory: ``"auto"`` keeps what would take long to remake, ``"min"`` nothing.

    Shape:
        ``forward(input, residual=None)``: input as for the first module, or a list of tensors whose channels are
        concatenated and of which only the parts are kept; a residual as the result, which ends in a batch norm: it is added
        before the last activation.

    Raises:
        ValueError: the modules are no such chain, or ``memory`` is another; the message names the module.

    Example:
        >>> block = FusedConvBNSequential(
        ...     nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        ...     nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        ... )
        >>> out = block(x, residual=x)
    """

    def __init__(
        self, *modules: "nn.Module | OrderedDict[str, nn.Module]", memory: str = "auto"
    ) -> None:
        super().__init__(*modules)
        if memory not in ("auto", "min"):
            raise ValueError(
                f'FusedConvBNSequential: expected memory "auto" or "min", got {memory!r}'
            )
        self.memory = memory
        self._chain()

    def _chain(self) -> Chain:
        links: list[ConvLink | NormLink] = []
        for name, module in self._modules.items():
            where = f"FusedConvBNSequential: expected module {name!r}"
            last = links[-1] if links else None
            refuse_lazy("FusedConvBNSequential", f"module {name!r}", module)
            if isinstance(module, CONVOLUTIONS):
                links.append(ConvLink.of((name,), module))
                if last is not None and links[-1].options.pad:
                    raise ValueError(
                        f"{where} to come first, as its padding is not one that the operator does, got {module}"
                    )
            elif isinstance(module, BATCH_NORMS):
                links.append(NormLink((name,)))
            else:
                try:
                    activation = activation_name(module)
                except ValueError as error:
                    raise ValueError(
                        f"{where} to be a convolution, batch norm or activation, got {module}"
                    ) from error
                if activation == "none":
                    continue
                if not isinstance(last, NormLink) or last.activation != "none":
                    raise ValueError(f"{where} to stand behind a batch norm, got {module}")
                links[-1] = NormLink(last.path, activation)
        if not links:
            raise ValueError("FusedConvBNSequential: expected at least one module, got none")
        chain = Chain(tuple(links))
        if self.memory == "auto":
            chain.plan(self._worth_keeping(chain))
        return chain

    def _worth_keeping(self, chain: Chain) -> set[str]:
        kept = set()
        for (name,) in chain.maps():
            module = self._modules[name]
            weight = getattr(module, "weight", None)
            itemsize = 4 if weight is None else weight.element_size()
            device = "cpu" if weight is None else weight.device.type
            if seconds_per_value(module, itemsize, device) > itemsize * price_per_byte(device):
                kept.add(name)
        return kept

    def forward(self, input: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        chain = self._chain()
        for name, module in self._modules.items():
            refuse_other_hooks("FusedConvBNSequential", f"module {name!r}", module)
        make_parameters(self)
        if residual is not None and not isinstance(chain.links[-1], NormLink):
            raise ValueError(
                "FusedConvBNSequential: expected no residual, as the last module is a convolution"
            )
        return chain(self, input, residual)

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript takes one tensor and no residual."""
        refuse_hooks_in_script("FusedConvBNSequential", self)
        graph = fx.Graph()
        x = graph.placeholder("input", type_expr=torch.Tensor)
        graph.output(graph.create_node("call_module", "chain", (x,)))
        return scriptable(self, graph, {"chain": self._chain()})
