"""A chain that is built by hand."""

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..activations import activation_name, parse_activation
from ..batch_norm import ATTRIBUTES, batch_norm_attributes, batch_norm_link
from ..chain import Conv, Link, Norm, Prelu, pack
from ..hooks import compute_parameters, refuse_hooks_in_script, refuse_other_hooks
from ..options import ConvOptions, refuse_lazy
from ..synchronised import group_name_of
from .plan import device_figures, seconds_per_value

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FusedConvBNSequential(nn.Sequential):
    r"""``nn.Sequential`` of convolutions, batch norms and activations that runs as one chain.

    The backward of each link, :math:`T_{i+1} = \mathrm{conv}(T_i)` or
    :math:`T_{i+1} = \mathrm{act}(\mathrm{bn}(T_i))`, needs its input :math:`T_i`. Only some of the
    inner :math:`T_i` are saved. Backward recomputes the others from the nearest saved one before
    them, with the statistics of forward. Numbers, ``state_dict`` keys and running statistics are
    those of ``nn.Sequential`` with the same modules.

    Args:
        modules: ``nn.Conv*``, ``nn.ConvTranspose*``, ``nn.BatchNorm*``, ``nn.SyncBatchNorm``, and
            activations (``nn.PReLU`` included), each behind a batch norm; or one ``OrderedDict`` of
            them. A convolution with a ``padding_mode`` other than zeros comes first.
        memory: ``"auto"`` saves the maps that take long to recompute, ``"min"`` saves none.

    Shape:
        ``forward(input, residual=None)``: the input is that of the first module, or a list of
        tensors whose channels are concatenated; then only the parts are saved. The residual has the
        shape of the result. It is added before the last activation, and needs a chain that ends in
        a batch norm.

    Raises:
        ValueError: the modules are not such a chain (the message names the module), or ``memory``
            is not one of the two.

    Example:
        >>> block = FusedConvBNSequential(
        ...     nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        ...     nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        ... )
        >>> out = block(x, residual=x)
    """

    def __init__(
        self,
        *modules: "nn.Module | OrderedDict[str, nn.Module]",
        memory: Literal["auto", "min"] = "auto",
    ) -> None:
        super().__init__(*modules)  # type: ignore[arg-type]  # what it takes has two signatures
        if memory not in ("auto", "min"):
            raise ValueError(
                f'FusedConvBNSequential: expected memory "auto" or "min", got {memory!r}'
            )
        self.memory = memory
        list(self._links())

    def _links(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The name of each convolution, batch norm and PReLU, the module, and the activation behind
        it."""
        links: list[list[Any]] = []
        for name, module in self._modules.items():
            where = f"FusedConvBNSequential: expected module {name!r}"
            refuse_lazy("FusedConvBNSequential", f"module {name!r}", module)
            if isinstance(module, _CONVOLUTIONS) and links and ConvOptions.of(module).pad:
                raise ValueError(
                    f"{where} to come first, as the operator does not pad in this way, got {module}"
                )
            if isinstance(module, (*_CONVOLUTIONS, *_BATCH_NORMS)):
                links.append([name, module, "none"])
                continue
            learned = isinstance(module, nn.PReLU)
            try:
                activation = "prelu" if learned else activation_name(module)
            except ValueError as error:
                raise ValueError(
                    f"{where} to be a convolution, batch norm or activation, got {module}"
                ) from error
            if activation == "none":
                continue
            if not links or not isinstance(links[-1][1], _BATCH_NORMS) or links[-1][2] != "none":
                raise ValueError(f"{where} to stand behind a batch norm, got {module}")
            if learned:
                links.append([name, module, "none"])
            else:
                links[-1][2] = activation
        if not links:
            raise ValueError("FusedConvBNSequential: expected at least one module, got none")
        return (tuple(link) for link in links)

    def _saved(self, ops: Sequence[Link], modules: Sequence[nn.Module]) -> list[int]:
        """The indices of the inner maps that take longer to recompute than their bytes are worth.
        There is no budget. The sizes are not known either, so the time of launches is not
        counted."""
        weights: list[Any] = [module.weight for module in modules]
        device = next((w.device for w in weights if w is not None), torch.device("cpu"))
        figures = device_figures(device)
        saved = []
        for i, (op, weight) in enumerate(zip(ops[:-1], weights, strict=False), 1):
            itemsize = 4 if weight is None else weight.element_size()
            shape = () if weight is None else weight.shape
            seconds = seconds_per_value(op, shape, itemsize, figures)
            if seconds > itemsize * figures.price_per_byte:
                saved.append(i)
        return saved if self.memory == "auto" else []

    def forward(self, input: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        links = list(self._links())
        for name, module in self._modules.items():
            refuse_other_hooks("FusedConvBNSequential", f"module {name!r}", module)
        compute_parameters(self)
        if residual is not None and isinstance(links[-1][1], _CONVOLUTIONS):
            raise ValueError(
                "FusedConvBNSequential: expected no residual, as the last module is a convolution"
            )
        parts: Any = input
        pad, mode = _padding(links[0][1])
        if pad:
            whole = input if isinstance(input, Tensor) else torch.cat(list(input), 1)
            parts = F.pad(whole, pad, mode)
        runs: list[list[tuple[Link, nn.Module]]] = [[]]  # calls; each has one process group
        group = None
        for _, module, activation in links:
            op = _op(module, activation)
            if isinstance(op, Norm) and op.training:
                if group is not None and op.group != group:
                    runs.append([])
                group = op.group
            runs[-1].append((op, module))
        if residual is not None:
            last = [op for op, _ in runs[-1] if isinstance(op, Norm)][-1]
            last.residual = residual
        for run in runs:
            ops, modules = [op for op, _ in run], [module for _, module in run]
            packed = pack(parts, ops)
            parts = torch.ops.fusedconvbn.conv_bn_chain(*packed.call(self._saved(ops, modules)))
        result: Tensor = parts
        return result

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript takes one tensor and no residual."""
        refuse_hooks_in_script("FusedConvBNSequential", self)
        graph = fx.Graph()
        input: Any = graph.placeholder("input", type_expr=Tensor)
        links = list(self._links())
        pad, mode = _padding(links[0][1])
        if pad:
            input = graph.call_function(F.pad, (input, pad, mode))
        ops, norms = [], []
        for name, module, activation in links:
            op = _op(module, activation)
            for n in ("weight", "bias"):
                if getattr(op, n, None) is not None:
                    setattr(op, n, graph.get_attr(f"{name}.{n}"))
            if isinstance(op, Norm):
                attributes = tuple(graph.get_attr(f"{name}.{n}") for n in ATTRIBUTES)
                # Computed in the graph, as the module's mode may change later.
                norms.append(graph.call_function(batch_norm_link, attributes))
            ops.append(op)
        packed: Any = pack(input, ops)
        buffers, packed.buffer_counts, packed.momenta, packed.training = (
            [graph.call_function(operator.getitem, (norm, i)) for norm in norms] for i in range(4)
        )
        packed.buffers = buffers[0] if norms else []
        for more in buffers[1:]:
            packed.buffers = graph.call_function(operator.add, (packed.buffers, more))
        call = packed.call(self._saved(ops, [module for _, module, _ in links]))
        graph.output(graph.call_function(torch.ops.fusedconvbn.conv_bn_chain, call))
        return fx.GraphModule(self, graph, type(self).__name__)


def _padding(module: nn.Module) -> tuple[list[int], str]:
    """The padding, and its mode, that F.pad adds in front of the first module."""
    options = ConvOptions.of(module) if isinstance(module, _CONVOLUTIONS) else None
    return ([], "") if options is None else (options.pad, options.pad_mode)


def _op(module: Any, activation: str) -> Link:
    if isinstance(module, nn.PReLU):
        return Prelu(module.weight)
    if isinstance(module, _CONVOLUTIONS):
        options = ConvOptions.of(module)
        return Conv(
            module.weight,
            module.bias,
            options.stride,
            options.padding,
            options.dilation,
            bool(module.transposed),
            options.output_padding,
            module.groups,
        )
    buffers, _, momentum, training = batch_norm_link(*batch_norm_attributes(module))
    base, parameter = parse_activation(activation)
    return Norm(
        module.weight,
        module.bias,
        eps=module.eps,
        activation=base,
        parameter=parameter,
        buffers=buffers,
        momentum=momentum,
        training=bool(training),
        group=group_name_of(module),
    )
