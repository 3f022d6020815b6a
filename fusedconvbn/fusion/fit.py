"""The largest batch of a training step that fits into a memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from ..memory import MIB
from ..sources import factory_of, takes_a_batch, without_memory
from . import cuda_libraries
from .api import checked, uncompiled
from .copies import copied
from .optimizers import OPTIMIZERS, Optimizer, optimizer_bytes
from .plan import CPU, H100, H200, Device, OutOfReach, Plan, device_figures, parse_memory
from .progress import progress

if TYPE_CHECKING:
    from .find import Findings
    from .graph import Graph

DEVICES = {"cpu": CPU, "h100": H100, "h200": H200}
DTYPES = (torch.float32, torch.bfloat16)
_PLANS = ("eager", "auto", 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, "min")
_START = 8  # the first batch that is tried
_GIB = 1024 * MIB


@dataclass
class PlanFit:
    """The largest batch with a plan.

    Attributes:
        plan: ``"eager"``, or ``memory`` as for :func:`fusedconvbn.fuse`.
        batch: 0 if a batch of 1 does not fit.
        nbytes: bytes that a step of this batch needs, of 1 where it is 0.
        saved: bytes saved for backward, as a fraction of eager's.
        seconds: of a sample in a step of this batch, as estimated.
    """

    plan: float | str
    batch: int
    nbytes: int
    saved: float
    seconds: float


@dataclass
class Fit:
    """The result of :func:`fusedconvbn.fit`; ``print`` shows it as a table.

    Attributes:
        model: the source of the model, or its class.
        memory: bytes that a step may need.
        sample: as for :func:`fusedconvbn.fit`.
        optimizer: likewise.
        dtype: likewise, as a name.
        device: likewise.
        plans: eager, ``"auto"``, and smaller budgets.
        unfused: why nothing is fused; empty if something is.
    """

    model: str
    memory: int
    sample: tuple[int, ...]
    optimizer: str
    dtype: str
    device: str
    plans: list[PlanFit]
    unfused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The result as numbers, strings, lists and dicts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        unit, name = (_GIB, "GiB") if self.memory >= _GIB else (MIB, "MiB")
        time = f"ms a sample, {self.device}"
        lines = [
            f"{self.model}, {'×'.join(map(str, self.sample))}, {self.dtype}, optimizer "
            f"{self.optimizer}, in {self.memory / unit:.2f} {name}",
            f"{'plan':5}  {'batch':>6} {name:>7} {'saved':>6}  {time:>17}",
        ]
        for p in self.plans:
            of_eager = p.seconds / self.plans[0].seconds
            lines.append(
                f"{p.plan!s:5}  {p.batch:6} {p.nbytes / unit:7.2f} {p.saved:6.2f}  "
                f"{1e3 * p.seconds:10.3g} ({of_eager:.2f})"
            )
        return "\n".join(lines)


def fit(
    model: nn.Module | Callable[[], nn.Module] | str,
    memory: int | str,
    *,
    sample: Sequence[int] = (3, 224, 224),
    optimizer: Optimizer = "adam",
    dtype: torch.dtype = torch.float32,
    device: Literal["cpu", "h100", "h200"] | None = None,
    channels_last: bool = True,
) -> Fit:
    r"""The largest batch whose whole training step fits into a memory: unfused, as
    :func:`fusedconvbn.fuse` plans it with ``"auto"``, and with each smaller budget.

    A step needs the parameters, the buffers, the images, the state of the optimizer, and the peak
    of forward and backward, with the gradients. All of it is counted from shapes: nothing is
    computed, and neither the images nor the parameters are allocated, if ``model`` is a function or
    the name of a source. Each batch in the result was counted itself. That the next larger one does
    not fit is concluded from two batches that were counted, as memory grows by at least the same
    bytes from sample to sample.

    The time of a sample is an estimate: each kernel takes the longer of its FLOPs and its bytes, at
    the round figures of a device. Compare it with the time of eager in the same table only.

    Args:
        model: a model; a function that makes one; or a source: ``"torchvision:resnet50"``,
            ``"timm:NAME"``, ``"package.module:FACTORY"``, ``"path/to/file.py:FACTORY"``. It is not
            changed. Its forward takes a batch of samples, and must be one graph.
        memory: bytes, at least 1000, or a string like ``"12GiB"``.
        sample: the shape of one sample.
        optimizer: ``"sgd"`` (with momentum), ``"adam"``, ``"adamw"``, or ``"none"``, for a state of
            0 bytes.
        dtype: ``torch.float32``, or ``torch.bfloat16``, which stands for autocast.
        device: whose speed decides, ``"cpu"``, ``"h100"`` or ``"h200"``; by default CUDA's if there
            is any. Times and plans depend on it. Of a GPU the workspaces of cuBLAS are counted, and
            what its allocator cannot use; those of cuDNN, which only the GPU itself can tell, are
            not: leave a margin, or let ``fuse`` plan for a peak there.
        channels_last: the memory format of images and weights; contiguous otherwise, and where a
            sample does not have three dimensions.

    Returns:
        Fit: can be printed, and converted with ``to_dict()``. The first of its ``plans`` is
        ``"eager"``. Budgets that cannot be reached, or save as much as ``"auto"``, are left out.

    Raises:
        ValueError: ``memory`` is less than a batch of 1 needs with any plan, or an argument breaks
            a rule above.
        TypeError: ``model`` is scripted or no module, or cannot be copied.

    Example:
        >>> print(fusedconvbn.fit("torchvision:resnet50", "12GiB"))
    """
    nbytes = bytes_of(memory)
    for name, found, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("device", device or "cpu", DEVICES),
        ("dtype", dtype, DTYPES),
    ):
        if found not in known:
            names = ", ".join(map(str, known))
            raise ValueError(f"fit: expected {name} to be one of {names}, got {found!r}")
    here = device_figures(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    speed: str = device or next(name for name, known in DEVICES.items() if known is here)
    name = model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)
    plans: list[PlanFit] = []
    with progress(f"fit {name}", 1 + len(_PLANS)) as stage:
        stage("build")
        steps = _Steps(model, tuple(sample), optimizer, dtype, DEVICES[speed], channels_last)
        for plan in _PLANS:
            stage(f"memory {plan}")
            try:
                saved = steps.saved(plan)
            except OutOfReach:
                continue
            if isinstance(plan, float) and saved >= plans[-1].saved:
                continue
            batch, needed = _largest(nbytes, lambda n: steps.nbytes(n, plan), steps.fixed)  # noqa: B023
            seconds = steps.seconds(max(batch, 1), plan) / max(batch, 1)
            plans.append(PlanFit(plan, batch, needed, saved, seconds))
    plans.sort(key=lambda p: -p.saved)
    if not any(p.batch for p in plans):
        least = min(p.nbytes for p in plans)
        raise ValueError(
            f"fit: expected memory of at least {least} bytes, which a batch of 1 of {steps.name} "
            f"needs, got {memory!r}"
        )
    short = str(dtype).removeprefix("torch.")
    unfused = steps.unfused()
    return Fit(steps.name, nbytes, tuple(sample), optimizer, short, speed, plans, unfused)


def bytes_of(memory: int | str) -> int:
    """The bytes that a `memory` of :func:`fit` stands for.

    Raises:
        ValueError: it is no number of bytes.
    """
    rule = 'fit: expected memory in bytes or a size like "12GiB"'
    try:
        found = parse_memory(memory)
    except (TypeError, ValueError):
        found = ""
    if not isinstance(found, int) or isinstance(memory, float):
        raise ValueError(f"{rule}, got {memory!r}")
    return found


def _largest(memory: int, needs: Callable[[int], int], fixed: int) -> tuple[int, int]:
    """The largest batch that needs at most `memory` bytes, and what it needs; (0, what a batch of 1
    needs) if there is none.

    What a step needs is convex in the batch: the line through two batches lies below it beyond
    them, and above it between them. So few batches have to be counted.

    Args:
        fixed: about what no batch at all would need.
    """
    known = {0: fixed}
    fits, fails, batch = 0, 0, _START  # no batch is known to fail yet
    while True:
        known[batch] = needs(batch)
        if known[batch] <= memory:
            fits = max(fits, batch)
        else:
            fails = min(fails or batch, batch)
        if fails == fits + 1:
            return fits, known[fits or 1]
        below = max((n for n in known if n < fits), default=0)
        most = _reach(known, below, fits, memory) if fits else fails - 1
        if below and most <= fits:
            return fits, known[fits]
        batch = max(most, fits + 1)
        if fails:
            batch = min(batch, max(_reach(known, fits, fails, memory), fits + 1))


def _reach(known: dict[int, int], a: int, b: int, memory: int) -> int:
    """The batch where the line through two known batches is `memory`; twice the second one if the
    line does not rise."""
    rise = known[b] - known[a]
    return a + (memory - known[a]) * (b - a) // rise if rise > 0 else 2 * b


class _Steps:
    """Training steps of a model without memory.

    Attributes:
        name: the source of the model, or its class.
        fixed: bytes that do not depend on the batch, gradients included.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module] | str,
        sample: tuple[int, ...],
        optimizer: str,
        dtype: torch.dtype,
        device: Device,
        channels_last: bool,
    ) -> None:
        source = model if isinstance(model, str) else ""
        if isinstance(model, str):
            if not takes_a_batch(model):
                raise ValueError(
                    "fit: expected a model whose forward takes one batch of samples, got "
                    f"{model}, which takes more; explain takes such models"
                )
            model = factory_of(model)
        if not isinstance(model, nn.Module):
            model = without_memory(model)
        self._format = (
            torch.channels_last if channels_last and len(sample) == 3 else torch.contiguous_format
        )
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        checked(model, (), "auto", False)
        advice = "fit works on a copy whose tensors have no memory"
        self._model, _ = copied(uncompiled(model), (), self._stand_in, advice)
        self._model.train()
        self.name = source or type(self._model).__name__
        self._sample, self._dtype, self._device = sample, dtype, device
        self._graphs: dict[int, tuple[Graph, list[Any]]] = {}

        parameters = list(self._model.parameters())
        on_cuda = device is not CPU
        states, self._in_optimizer = optimizer_bytes(optimizer, parameters, on_cuda)
        self._static = states + sum(t.nbytes for t in (*parameters, *self._model.buffers()))
        self._unsplit = cuda_libraries.UNSPLIT if on_cuda else 0.0
        if on_cuda:
            self._static += cuda_libraries.always_held()
        self.fixed = self._static + sum(p.nbytes for p in parameters if p.requires_grad)

    def saved(self, plan: str | float) -> float:
        """Bytes saved for backward, as a fraction of eager's.

        Raises:
            OutOfReach: as for :func:`fusedconvbn.fuse`.
        """
        if plan == "eager":
            return 1.0
        found = self._planned(_START, plan)[0]
        return found.saved / max(found.eager, 1)

    def unfused(self) -> str:
        """Why nothing is fused; empty if something is."""
        return self._planned(_START, "auto")[0].unfused

    def nbytes(self, batch: int, plan: str | float) -> int:
        """Bytes that a step needs."""
        from .step import step_memory

        module, inputs = self._module(batch, plan)
        with self._autocast():
            peak = step_memory(module, inputs).peak
        peak = self._static + self._images(batch).nbytes + max(peak, self._in_optimizer)
        return int(peak * (1 + self._unsplit))

    def seconds(self, batch: int, plan: str | float) -> float:
        """Seconds that a step takes, as estimated."""
        from .clock import step_seconds

        module, inputs = self._module(batch, plan)
        with self._autocast():
            return step_seconds(module, inputs, self._device)

    def _module(self, batch: int, plan: str | float) -> tuple[fx.GraphModule, list[Any]]:
        """What runs, unfused or with a plan, and its inputs."""
        if plan == "eager":
            return self._captured(batch)
        found, inputs = self._planned(batch, plan)
        (graph,) = found.graphs
        graph.save(found.plan.saved)
        if found.plan.segments:
            del self._graphs[batch]  # as a graph with segments is not planned again
            graph.cut(found.plan.segments)
        return graph.module, inputs

    def _planned(self, batch: int, plan: str | float) -> "tuple[Findings, list[Any]]":
        from .capture import groups_of, paths_of
        from .find import Findings, decide
        from .graph import Graph, inner_map

        if batch not in self._graphs:
            captured = self._captured(batch)
            with self._autocast():
                graph = Graph.of(*captured, paths_of(self._model), groups_of(self._model))
            graph.runs, graph.device = 1, self._device
            graph.maps = [inner_map(link, self._device) for link in graph.links]
            self._graphs[batch] = graph, captured[1]
        graph, inputs = self._graphs[batch]
        found = Findings(Plan(plan), [graph], {}, graph.eager.saved, graph.least.saved)
        decide(found)
        return found, inputs

    def _captured(self, batch: int) -> tuple[fx.GraphModule, list[Any]]:
        from .capture import capture_whole
        from .model import original_forward

        forward = original_forward(self._model)
        with self._autocast():
            whole = capture_whole(self._model, forward, (self._images(batch),), {})
        if isinstance(whole, dict):
            (where, why), *_ = whole.items()
            raise ValueError(
                f"fit: expected model to be one graph, got {self.name}, which breaks {where}: {why}"
            )
        return whole

    def _images(self, batch: int) -> Tensor:
        return self._stand_in(torch.empty(batch, *self._sample, device="meta"))

    def _stand_in(self, t: Tensor) -> Tensor:
        format = self._format if t.dim() == 4 else torch.contiguous_format
        with self._mode:
            made = torch.empty(t.shape, dtype=t.dtype, device="cpu", memory_format=format)
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16)
