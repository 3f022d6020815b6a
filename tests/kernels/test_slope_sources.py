"""The table of the channel kernels: every activation, with every tensor from which its slope can be
computed, in every type and both layouts, against the formulas in float64.

The kernels are instantiated for those pairs alone that can occur; here all of them are run.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from cases import DTYPES
from torch import Tensor

from fusedconvbn.activations import ACTIVATIONS, activation_module, parse_activation
from fusedconvbn.chain import Gate, Norm, pack

# Where the slope jumps. Rounding could move a value across.
JUMPS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "elu": (0,), "hardswish": (-3, 3)}
# Below and above the 256 values a channel from which on blocks are added up in the map's type; a
# number of channels that leaves a rest in every vector loop.
SHAPES = {"few": (3, 19, 5, 7), "many": (2, 35, 13, 11)}
FORMATS = (torch.contiguous_format, torch.channels_last)
EPS = 1e-5


@dataclass(frozen=True)
class Source:
    """What act' is computed from: u alone, u + residual or, where it shows the slope, the
    result."""

    arithmetic: str
    residual: bool = False
    result_saved: bool = False

    def __str__(self) -> str:
        more = {"residual": self.residual, "result saved": self.result_saved}
        return ", ".join([self.arithmetic, *(name for name, there in more.items() if there)])


SOURCES = [
    Source(*values)
    for values in itertools.product(("batchnorm", "running", "none"), (False, True), (False, True))
]


def draw(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The map, the residual, the vectors and the statistics that `source` has."""
    channels = shape[1]
    vectors = torch.promote_types(dtype, torch.float32)
    drawn = {"map": (1.5 * torch.randn(shape) + 0.5).to(dtype)}
    if source.residual:
        drawn["residual"] = (2 * torch.randn(shape)).to(dtype)
    if source.arithmetic != "none":
        drawn |= {name: torch.randn(channels).to(vectors) for name in ("weight", "bias")}
    if source.arithmetic == "running":
        drawn["statistics"] = torch.stack([torch.randn(channels), 0.5 + torch.rand(channels)])
        drawn["statistics"] = drawn["statistics"].to(vectors)
    return drawn


@dataclass
class Expected:
    """Results in float64, and for each the error that the roundings of a type explain."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]


def per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def expect(
    source: Source, activation: str, drawn: dict[str, Tensor], dout: Tensor
) -> tuple[Expected, Tensor]:
    """The formulas of csrc/kernels/channel_kernels.h. Returns `dout` too, as 0 next to a jump."""
    dtype = drawn["map"].dtype
    eps, work = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
    given = {name: t.double() for name, t in drawn.items()}
    y, count, sums = given["map"], given["map"].numel() // given["map"].size(1), (0, 2, 3)
    if source.arithmetic == "none":
        r = gamma = torch.ones(y.size(1), dtype=torch.float64)
        u, normal, parts = y, y, 1 + y.abs()
    else:
        found = given.get("statistics")
        mean, var = (y.mean(sums), y.var(sums, unbiased=False)) if found is None else found
        r, gamma = (var + EPS).rsqrt(), given["weight"]
        normal = (y - per_channel(mean)) * per_channel(r)
        u = normal * per_channel(gamma) + per_channel(given["bias"])
        centred = y.abs() + per_channel(mean.abs())
        parts = 1 + centred * per_channel(r * gamma.abs()) + per_channel(given["bias"].abs())
    if source.residual:
        u, parts = u + given["residual"], parts + given["residual"].abs()
    u.requires_grad_()
    base, _ = parse_activation(activation)
    for jump in JUMPS.get(base, ()):
        dout = dout.masked_fill((u - jump).abs() < 8 * eps * parts, 0)
    out = activation_module(activation)(u)
    du = torch.autograd.grad(out, u, dout.double())[0]
    out, u = out.detach(), u.detach()

    # u is off by a few roundings of the parts it is summed from, act' by as many, as |act''| ≤ 1.5;
    # so is du.
    size = parts * dout.double().abs()
    scale = per_channel((gamma * r).abs())
    values, bounds = {"out": out, "map": du * per_channel(gamma * r)}, {"map": scale * size}
    bounds["out"] = parts
    if source.arithmetic == "batchnorm":
        S1, S2 = du.sum(sums), (du * normal).sum(sums)
        linear = per_channel(S1) + normal * per_channel(S2)
        values["map"] = values["map"] - per_channel(gamma * r) * linear / count
        far = per_channel((size * normal.abs()).sum(sums))
        bounds["map"] = bounds["map"] + scale / count * (
            per_channel(size.sum(sums)) + normal.abs() * far
        )
    roundings = 8 if dtype == torch.float64 else 4  # the expected values are rounded too
    if source.residual:
        values["residual"], bounds["residual"] = du, size
    bounds = {name: roundings * eps * bound for name, bound in bounds.items()}
    if source.arithmetic != "none":
        values |= {"weight": (du * normal).sum(sums), "bias": du.sum(sums)}
        # 64 values are added up one after another in the type of the arithmetic.
        bounds["weight"] = 32 * work * (size * (1 + normal.abs())).sum(sums)
        bounds["bias"] = 32 * work * size.sum(sums)
    return Expected(values, bounds), dout


def run(
    source: Source,
    activation: str,
    drawn: dict[str, Tensor],
    dout: Tensor,
    owned: bool,
    recomputed: bool,
) -> dict[str, Tensor]:
    """Forward and backward of a norm link.

    Args:
        source, activation: of the link.
        drawn: its tensors.
        dout: the gradient of its result.
        owned: whether the gradient is the operator's to write over.
        recomputed: whether the map is, which then may be written over too.
    """
    leaves = {n: t.detach().requires_grad_(n != "statistics") for n, t in drawn.items()}
    base, parameter = parse_activation(activation)
    tensors = {name: t for name, t in leaves.items() if name != "map"}
    link = Norm(
        **tensors, eps=EPS, arithmetic=source.arithmetic, activation=base, parameter=parameter
    )
    # A gate of ones changes nothing, and its result is not saved.
    batch, channels = dout.shape[:2]
    chain = [Gate(torch.ones(batch, channels, 1, 1, dtype=dout.dtype)), link][not recomputed :]
    packed = pack(leaves["map"], chain)
    saved = [len(chain)] if source.result_saved else []
    out = torch.ops.fusedconvbn._chain_forward(packed.tensors, *packed.options, saved)[0]
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    if owned:
        grads = torch.autograd.grad((out * dout).sum(), list(wanted.values()))
    else:
        before = dout.clone()
        grads = torch.autograd.grad(out, list(wanted.values()), dout)
        assert torch.equal(dout, before)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("activation", [a.spelled(0.7) for a in ACTIVATIONS.values()])
def test_every_source_of_a_slope(activation, source, dtype):
    for shape in SHAPES.values():
        drawn, dout = draw(source, shape, dtype), torch.randn(shape).to(dtype)
        expected, dout = expect(source, activation, drawn, dout)
        for format, owned, recomputed in itertools.product(FORMATS, (False, True), (False, True)):
            case = f"{shape}, {format}, {owned=}, {recomputed=}"
            given = {n: t.to(memory_format=format) if t.dim() == 4 else t for n, t in drawn.items()}
            laid = dout.to(memory_format=format)
            results = run(source, activation, given, laid, owned, recomputed)
            assert results.keys() == expected.values.keys()
            for name, value in expected.values.items():
                error = (results[name].double() - value).abs()
                assert torch.all(error <= expected.bounds[name]), (name, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_with_another_instruction_set(capability):
    """The suite runs with the machine's best; these are the others, each in a process of its
    own."""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        pytest.skip("this process has a chosen one")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([*command, "-k", "every_source"], env=environment, check=True)
