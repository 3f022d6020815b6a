"""The CUDA kernels without PyTorch's CUDA, against float64 and against the CPU kernels: on the CPU
through tests/kernels/cuda_shim, and on a GPU where there is one, also under compute-sanitizer."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from build_cuda import build_kernels, find_toolkit
from conftest import requires_gpu

from fusedconvbn.activations import ACTIVATIONS, activation_module
from fusedconvbn.chain import Norm as Link
from fusedconvbn.chain import pack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# channels_last, samples, outer, channels, inner. Vectors hold 2, 4 or 8 values, a block has 256
# threads, and a part is cut off when each of them has four vectors. Contiguous, samples with
# vectors of their own are channels.
MAPS = {
    "one value": (False, 1, 1, 1, 2),
    "tails": (False, 1, 3, 5, 49),
    "whole vectors": (False, 1, 2, 3, 64),
    "shorter than a vector": (False, 1, 5, 7, 3),
    "C=1, several parts": (False, 1, 3, 1, 9001),
    "a ragged last part": (False, 1, 1, 3, 8229),
    "C=1000": (False, 1, 2, 70, 5),
    "rows, whole vectors": (True, 1, 37, 16, 1),
    "rows, several vectors in flight": (True, 1, 1200, 16, 1),
    "rows, half a vector": (True, 1, 37, 12, 1),
    "rows, half a vector, two as one": (True, 1, 38, 12, 1),
    "rows, four as one": (True, 1, 36, 6, 1),
    "rows, no vector": (True, 1, 37, 6, 1),
    "rows, C=1": (True, 1, 300, 1, 1),
    "rows, C=1, eight as one": (True, 1, 304, 1, 1),
    "rows, C=1000": (True, 1, 9, 1000, 1),
    "rows as wide as no block": (True, 1, 130, 144, 1),
    "rows, an odd share of a block": (True, 1, 11, 264, 1),
    "one row": (True, 1, 1, 40, 1),
    "more rows than a part": (True, 1, 4099, 8, 1),
    "fewer rows than threads": (True, 1, 2, 24, 1),
    "samples": (True, 5, 37, 16, 1),
    "samples, several parts": (True, 2, 2100, 16, 1),
    "samples, half a vector": (True, 3, 49, 12, 1),
    "samples, two rows as one": (True, 3, 26, 12, 1),
    "samples, no vector": (True, 3, 49, 3, 1),
    "samples, several columns": (True, 3, 5, 300, 1),
    "thousands of samples": (True, 3001, 2, 8, 1),
    "thousands of samples of one value": (True, 3000, 1, 3, 1),
}


class Library:
    """The kernels of a library on tensors of the CPU, which each call copies into memory of the
    device's own and back."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.scratch_bytes.restype = ctypes.c_int64

    def scratch(self, map):
        return torch.empty(self.library.scratch_bytes(map), dtype=torch.uint8)

    def call(self, name, *arguments):
        """Of the arguments the tensors, and lists of tensors or None, are the device's; C sees the
        others as they are."""
        copies = {}  # tensor, its block, where it is in there

        def there(t):
            if t is None:
                return None
            if t.data_ptr() not in copies:
                offset, block = t.data_ptr() % 16, ctypes.c_void_p()
                self._do("device_allocate", ctypes.byref(block), ctypes.c_int64(offset + t.nbytes))
                copies[t.data_ptr()] = t, block, block.value + offset
                self._copy(block.value + offset, t.data_ptr(), t.nbytes)
            return copies[t.data_ptr()][2]

        def converted(argument):
            if isinstance(argument, list):
                return (ctypes.c_void_p * len(argument))(*map(there, argument))
            is_tensor = argument is None or isinstance(argument, torch.Tensor)
            return ctypes.c_void_p(there(argument)) if is_tensor else argument

        getattr(self.library, name)(*map(converted, arguments))
        self._do("device_wait")
        for t, block, at in copies.values():
            self._copy(t.data_ptr(), at, t.nbytes)
            self._do("device_free", block)

    def _copy(self, to, from_, nbytes):
        self._do("device_copy", *map(ctypes.c_void_p, (to, from_)), ctypes.c_int64(nbytes))

    def _do(self, name, *arguments):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        assert error is None, f"{name}: {error.decode()}"


@pytest.fixture(scope="module", params=["shim", pytest.param("gpu", marks=requires_gpu)])
def library(request, tmp_path_factory):
    """FUSEDCONVBN_KERNELS names a library that has been built for the GPU."""
    path = os.environ.get("FUSEDCONVBN_KERNELS")
    if request.param == "shim" or not path:
        path = tmp_path_factory.mktemp(request.param) / "libkernels.so"
        capability = (
            ".".join(map(str, torch.cuda.get_device_capability()))
            if request.param == "gpu"
            else None
        )
        build_kernels(path, capability)
    return Library(path)


class Kernels:
    """The four kernels on tensors of a map's memory order, (samples, outer, C, inner)."""

    def __init__(self, library, shape, dtype):
        self.library = library
        self.map = (ctypes.c_int64 * 6)(DTYPES.index(dtype), *shape)
        _, samples, outer, channels, inner = shape
        self.groups = samples * channels
        self.count = outer * inner
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32

    def _reduce(self, name, *arguments):
        result = torch.full((2, self.groups), 7, dtype=self.acc)
        scratch = self.library.scratch(self.map)
        self.library.call(name, self.map, *arguments, scratch, result, *self._gradients)
        return result

    _gradients = ()

    def stats(self, y):
        return self._reduce("channel_stats", y)

    def grad_stats(
        self,
        dout,
        y,
        norm,
        activation,
        residual=None,
        from_result=None,
        du=None,
        gradients=(None, None),
    ):
        """`gradients` are written: those of the norm's weight and bias."""
        end = (*_activation(activation), residual, from_result, du)
        self._gradients = gradients
        try:
            return self._reduce("channel_grad_stats", dout, y, *norm.arguments, *end)
        finally:
            self._gradients = ()

    def apply_(self, out, y, norm, activation, residual=None):
        self.library.call(
            "channel_apply_", self.map, out, y, *norm.arguments, *_activation(activation), residual
        )

    def grad_apply_(self, out, dout, y, norm, sums, activation):
        self.library.call(
            "channel_grad_apply_",
            self.map,
            out,
            dout,
            y,
            *norm.arguments,
            sums,
            *_activation(activation),
        )


@dataclass
class Norm:
    """A norm as the kernels are given it; what is None is mean 0 and r 1, γ 1, β 0."""

    statistics: torch.Tensor | None = None  # (2 or 3, G)
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-5
    tutorial: bool = False
    count: float = 1

    @property
    def counted(self):
        return self.statistics is not None and len(self.statistics) == 3

    @property
    def arguments(self):
        how = (ctypes.c_double * 4)(self.eps, self.tutorial, self.count, self.counted)
        return [self.statistics, self.weight, self.bias], how

    def r(self):
        if self.statistics is None:
            return torch.ones((), dtype=torch.float64)
        var = self.statistics[1].double()
        if self.tutorial:
            return 1 / ((var * self.count / (self.count - 1)).sqrt() + self.eps)
        return (var + self.eps).rsqrt()

    def affine(self):
        """Mean, scale and shift in float64."""
        mean = torch.zeros(()) if self.statistics is None else self.statistics[0]
        scale = self.r() if self.weight is None else self.r() * self.weight.double()
        shift = torch.zeros(()) if self.bias is None else self.bias
        return mean.double(), scale, shift.double()

    def linear(self, sums):
        """The table of docs/design.md: −κ·S2 and −(a/R)·S1."""
        S1, S2 = sums.double()
        _, a, _ = self.affine()
        R = self.statistics[2].double().clamp_min(1) if self.counted else self.count
        rho = self.r()
        if self.tutorial:
            s = (self.statistics[1].double() * self.count / (self.count - 1)).sqrt()
            rho = (self.count / ((self.count - 1) * s)).nan_to_num(posinf=0)
        return -a / R * self.r() * rho * S2, -a / R * S1


def _activation(name):
    parameter = ACTIVATIONS[name].default
    return ctypes.c_int64([*ACTIVATIONS].index(name)), ctypes.c_double(parameter)


def _map(shape, dtype, offset=0, mean=0.3):
    """A random map that starts `offset` values behind an aligned address."""
    _, *sizes = shape
    values = torch.randn(prod(sizes) + offset, dtype=torch.float64).add(mean).to(dtype)[offset:]
    return values.view(sizes)


def _spread(v, y):
    """A vector of groups beside the values of a map."""
    return v.double().expand(y.size(0) * y.size(2)).view(y.size(0), 1, y.size(2), 1)


def _sums(values):
    return values.sum((1, 3)).flatten()


def _check_all(kernels, y, dout, dtype, activation):
    """All four kernels against their formulas in float64; the maps are written in place too, as the
    chain does."""
    act = activation_module(activation)
    wide = y.double()
    acc = torch.finfo(kernels.acc).eps
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[
        dtype
    ]
    sums_exact = 64 * acc * kernels.count**0.5

    var, mean = (v.flatten() for v in torch.var_mean(wide, (1, 3), correction=0))
    stats = kernels.stats(y)
    torch.testing.assert_close(stats[0].double(), mean, rtol=8 * acc, atol=8 * acc)
    torch.testing.assert_close(stats[1].double(), var, rtol=32 * acc, atol=32 * acc)

    stats[1] += 0.1  # of a single value it is 0
    weight, bias = torch.randn(2, kernels.groups, dtype=kernels.acc)
    norm = Norm(stats, weight, bias, count=kernels.count)
    sums = torch.randn(2, kernels.groups, dtype=kernels.acc)
    mean, scale, shift = (_spread(v, y) for v in norm.affine())
    slope, offset = (_spread(v, y) for v in norm.linear(sums))
    u = (wide - mean) * scale + shift

    def gradient(u):
        leaf = u.clone().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, dout.double())[0]

    def check_sums(sums, du, gradients=None):
        expected = torch.stack((_sums(du), _sums(du * (wide - mean))))
        torch.testing.assert_close(sums.double(), expected, rtol=sums_exact, atol=sums_exact)
        if gradients is not None:
            torch.testing.assert_close(gradients[1], sums[0], rtol=0, atol=0)
            expected = norm.r() * sums[1].double()
            torch.testing.assert_close(gradients[0].double(), expected, rtol=8 * acc, atol=8 * acc)

    du = gradient(u)
    gradients = torch.full((2, kernels.groups), 7, dtype=kernels.acc).unbind()
    check_sums(kernels.grad_stats(dout, y, norm, activation, gradients=gradients), du, gradients)
    for given in (sums, None):
        expected = scale * du
        if given is not None:
            expected = expected + slope * (wide - mean) + offset
        for target in ("fresh", "y", "dout"):
            maps = {"y": y.clone(), "dout": dout.clone(), "fresh": torch.full_like(y, 7)}
            # The aligned and the misaligned address go with the tensor, so clones are put where the
            # original was.
            maps = {name: _same_alignment(t, y) for name, t in maps.items()}
            kernels.grad_apply_(maps[target], maps["dout"], maps["y"], norm, given, activation)
            torch.testing.assert_close(maps[target].double(), expected, rtol=exact, atol=3 * exact)

    residual = _same_alignment(torch.randn(y.shape, dtype=torch.float64).to(dtype), y)
    for added in (None, residual):
        joined = u if added is None else u + added.double()
        for target in ("fresh", "y"):
            maps = {"y": _same_alignment(y, y), "fresh": _same_alignment(torch.full_like(y, 7), y)}
            kernels.apply_(maps[target], maps["y"], norm, activation, added)
            torch.testing.assert_close(
                maps[target].double(), act(joined), rtol=exact, atol=3 * exact
            )

    if activation == "none":
        return
    ways = {"residual": residual}
    if activation == "relu":
        ways["from_result"] = maps[target]
    for name, other in ways.items():
        at = joined if name == "residual" else other.double()
        for in_place in (False, True):
            given = _same_alignment(dout, y)
            written = given if in_place else _same_alignment(torch.full_like(y, 7), y)
            sums = kernels.grad_stats(given, y, norm, activation, **{name: other}, du=written)
            check_sums(sums, gradient(at))
            torch.testing.assert_close(written.double(), gradient(at), rtol=exact, atol=3 * exact)


def _same_alignment(t, like):
    offset = like.data_ptr() % 16 // like.element_size()
    values = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape)
    assert values.data_ptr() % 16 == like.data_ptr() % 16
    return values.copy_(t)


# The shim takes seconds for a thousand blocks: one type of each size.
EVERY = [
    (name, dtype)
    for name, dtype in itertools.product(MAPS, DTYPES)
    if "thousands" not in name or dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.thin(1)
@pytest.mark.parametrize(("name", "dtype"), EVERY, ids=lambda v: str(v))
def test_every_kernel_is_its_formula(library, name, dtype):
    torch.manual_seed(0)
    shape = MAPS[name]
    turn = DTYPES.index(dtype) + list(MAPS).index(name)
    activation = ("relu", [*ACTIVATIONS][turn % len(ACTIVATIONS)])[turn % 2]
    kernels = Kernels(library, shape, dtype)
    _check_all(kernels, _map(shape, dtype), _map(shape, dtype), dtype, activation)


@pytest.mark.parametrize("offset", (1, 4))  # which leaves vectors of four values
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_that_start_between_vectors(library, channels_last, dtype, offset):
    torch.manual_seed(0)
    shape = (True, 1, 5, 16, 1) if channels_last else (False, 1, 2, 3, 21)
    kernels = Kernels(library, shape, dtype)
    _check_all(kernels, _map(shape, dtype, offset), _map(shape, dtype, offset), dtype, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(library, activation):
    shape, dtype = (True, 1, 40, 8, 1), torch.float32
    _check_all(
        Kernels(library, shape, dtype), _map(shape, dtype), _map(shape, dtype), dtype, activation
    )


@pytest.mark.parametrize("shape", [(False, 1, 2, 3, 1500), (True, 1, 1500, 3, 1)])
def test_statistics_far_from_zero(library, shape):
    torch.manual_seed(0)
    y = _map(shape, torch.float32, mean=1e4)
    y.view(-1)[0] = -3e4  # where a sum that is taken from the first value would lose the variance
    kernels = Kernels(library, shape, torch.float32)
    var, mean = (v.flatten() for v in torch.var_mean(y.double(), (1, 3), correction=0))
    stats = kernels.stats(y).double()
    torch.testing.assert_close(stats[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1], var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(False, 1, 4, 2, 1023), (True, 1, 4092, 2, 1)])
@pytest.mark.parametrize("mean", (1e4, 3e19))
def test_a_large_mean_costs_the_variance_nothing(library, shape, mean):
    y = _map(shape, torch.float64) * mean / 1e4 + mean
    y = y.float()
    var, mean = (v.flatten() for v in torch.var_mean(y.double(), (1, 3), correction=0))
    stats = Kernels(library, shape, torch.float32).stats(y).double()
    torch.testing.assert_close(stats[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1], var, rtol=1e-5, atol=0)


def test_not_finite_values_stay_in_their_channel(library):
    torch.manual_seed(0)
    shape = (False, 1, 2, 3, 70)
    y = _map(shape, torch.float32)
    y[0, 0, 0, 5], y[0, 1, 1, 0] = float("nan"), float("inf")
    stats = Kernels(library, shape, torch.float32).stats(y)
    assert stats[:, 0].isnan().all()
    assert not stats[:, 1].isfinite().any()
    assert stats[:, 2].isfinite().all()


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_as_the_cpu_kernels(library, channels_last, dtype):
    """A chain of one norm link is the four CPU kernels, one after another."""
    torch.manual_seed(0)
    n, c, h, w = 3, 16, 7, 5
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.randn(n, c, h, w, dtype=torch.float64).add(0.5).to(dtype)
    dout = torch.randn(n, c, h, w, dtype=torch.float64).to(dtype)
    if channels_last:
        y, dout = (t.to(memory_format=torch.channels_last) for t in (y, dout))
    weight, bias = torch.rand(c, dtype=acc) + 0.5, torch.randn(c, dtype=acc)
    chain = pack(y, [Link(weight, bias, activation="relu")])
    ops = torch.ops.fusedconvbn
    out, _, (stats,) = ops._chain_forward(chain.tensors, *chain.options, [])
    dy, dweight, dbias = ops._chain_backward(
        dout, chain.tensors, [], [stats], *chain.options, [], [0, 1, 2]
    )

    shape = (True, 1, n * h * w, c, 1) if channels_last else (False, 1, n, c, h * w)
    kernels = Kernels(library, shape, dtype)
    own_stats = kernels.stats(y)
    tolerance = dict(rtol=16 * torch.finfo(acc).eps, atol=16 * torch.finfo(acc).eps)
    torch.testing.assert_close(own_stats, stats, **tolerance)
    norm = Norm(stats, weight, bias, count=n * h * w)
    gradients = torch.empty(2, c, dtype=acc).unbind()
    sums = kernels.grad_stats(dout, y, norm, "relu", gradients=gradients)
    torch.testing.assert_close(gradients[0], dweight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], dbias, rtol=1e-5, atol=1e-5)
    result = torch.empty_like(y)
    kernels.grad_apply_(result, dout, y, norm, sums, "relu")
    torch.testing.assert_close(result, dy)
    kernels.apply_(result, y, norm, "relu")
    torch.testing.assert_close(result, out)


@pytest.mark.parametrize("arithmetic", ("batchnorm", "tutorial", "counted"))
@pytest.mark.parametrize(
    "absent", ((), ("weight",), ("bias",), ("weight", "bias", "statistics")), ids=str
)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_vectors(library, dtype, absent, arithmetic):
    """What becomes of a norm's vectors, those that are absent, constant channels and empty
    processes."""
    torch.manual_seed(0)
    shape = (True, 1, 7, 24, 1)
    kernels = Kernels(library, shape, dtype)
    y, dout = _map(shape, dtype), _map(shape, dtype)
    statistics = torch.randn(3 if arithmetic == "counted" else 2, 24, dtype=kernels.acc)
    statistics[1].square_()
    weight, bias = torch.randn(2, 24, dtype=kernels.acc)
    sums = torch.randn(2, 24, dtype=kernels.acc)
    statistics[1, 0] = sums[1, 0] = 0
    if arithmetic == "counted":
        statistics[2].mul_(5).abs_().round_()
    present = {"statistics": statistics, "weight": weight, "bias": bias}
    present = {name: t for name, t in present.items() if name not in absent}
    norm = Norm(**present, eps=1e-3, tutorial=arithmetic == "tutorial", count=7)
    mean, scale, shift = (_spread(v, y) for v in norm.affine())
    close = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    out = torch.empty_like(y)
    kernels.apply_(out, y, norm, "none")
    torch.testing.assert_close(out.double(), (y - mean) * scale + shift, rtol=close, atol=close)
    expected = scale * dout
    if norm.statistics is not None:
        slope, offset = (_spread(v, y) for v in norm.linear(sums))
        expected = expected + slope * (y - mean) + offset
    kernels.grad_apply_(out, dout, y, norm, None if norm.statistics is None else sums, "none")
    torch.testing.assert_close(out.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_running_statistics(library, dtype):
    """Of norms of other sizes and ways in one launch, as PyTorch moves them."""
    torch.manual_seed(0)
    tensors, numbers, expected = [], [], []
    for channels, momentum, counted, biased, counter in (
        (5, 0.1, False, True, 7),
        (300, 0.25, False, False, None),
        (3, float("nan"), False, False, 4),
        (6, 0.5, True, False, 0),
    ):
        running, statistics = (
            torch.rand(2, channels, dtype=dtype),
            torch.rand(3, channels, dtype=dtype),
        )
        statistics[2] = torch.arange(channels)  # the first has no sample at all, the second one
        bias = torch.rand(channels, dtype=dtype) if biased else None
        counter = None if counter is None else torch.tensor(counter)
        values = statistics[2].double() if counted else torch.full((channels,), 11.0).double()
        part = 1 / (counter + 1.0) if momentum != momentum else momentum
        batch = statistics[:2].double().clone()
        batch[0] += 0 if bias is None else bias
        batch[1] *= values / (values - 1).clamp_min(1)
        moved = (1 - part) * running.double() + part * batch
        expected += [torch.where(values > 0, moved, running.double())]
        expected += [] if counter is None else [counter + 1]
        tensors += [*running.unbind(), counter, statistics, bias]
        numbers += [channels, momentum, 0 if counted else 11]
    tensors += [None, None, only := torch.tensor(2), None, None]  # of a batch that is counted alone
    numbers += [0, 0.1, 0]
    numbers = (ctypes.c_double * len(numbers))(*numbers)
    before = [t if t is None else t.clone() for t in tensors]
    library.call(
        "update_running", ctypes.c_int64(DTYPES.index(dtype)), ctypes.c_int64(5), tensors, numbers
    )
    found = []
    for mean, var, counter, *_ in zip(*[iter(tensors[:20])] * 5, strict=True):
        found += [torch.stack((mean, var)).double()] + ([] if counter is None else [counter])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert only == 3
    for given, now in zip(before[3::5] + before[4::5], tensors[3::5] + tensors[4::5], strict=True):
        assert given is None or torch.equal(given, now)


@pytest.mark.slow
def test_max_pool_of_more_than_2_31_values(library):
    """Of windows so far apart that few values are read."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < 14 << 30:
        pytest.skip("needs 14 GiB of free memory")
    height, width, stride = 70_000, 31_000, (34_998, 30_998)
    x = torch.zeros(height, width, dtype=torch.bfloat16)
    x[-1, -1], x[stride[0], 1] = 5, 3
    out, offsets = (
        torch.full((3, 2), 7.0, dtype=torch.bfloat16),
        torch.full((3, 2), 7, dtype=torch.uint8),
    )
    map = (ctypes.c_int64 * 7)(DTYPES.index(x.dtype), 1, height, width, 1, 3, 2)
    window = (ctypes.c_int64 * 8)(2, 2, *stride, 0, 0, 3, 1)
    library.call("max_pool2d", map, window, x, out, offsets)
    assert out.tolist() == [[0, 0], [3, 0], [0, 5]]
    assert offsets.tolist() == [[0, 0], [1, 0], [0, 3]]


# N, C, H, W; the options of F.max_pool2d but for ceil_mode
POOLS = {
    "ResNet's": ((2, 16, 11, 13), 3, 2, 1, 1),
    "no whole vector": ((3, 6, 9, 8), 3, 2, 1, 1),
    "every option": ((1, 8, 12, 10), (3, 2), (2, 1), (1, 0), (2, 3)),
    "windows apart": ((2, 8, 11, 9), 2, 3, 0, 1),
    "wider than the map": ((2, 4, 2, 3), 5, 1, 2, 1),
    "256 offsets": ((1, 2, 20, 19), 16, 1, 8, 1),
    "one value": ((1, 1, 1, 1), 1, 1, 0, 1),
    "several blocks to a row": ((1, 40, 2, 60), 2, 1, 1, 1),
}


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("ceil_mode", (False, True))
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool(library, dtype, name, ceil_mode, channels_last):
    """PyTorch's values and offsets to the bit, with ties, NaN and windows of -inf; its gradient to
    the last rounding."""
    torch.manual_seed(0)
    shape, *options = POOLS[name]
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, dtype=torch.float64).mul(4).round().to(dtype).to(memory_format=format)
    x[0, :, :2], x[-1, -1, 0, -1], x[-1, 0, -1] = 0, float("nan"), -float("inf")
    expected, indices = F.max_pool2d(x, *options, ceil_mode=ceil_mode, return_indices=True)

    n, c, h, w = shape
    planes = 1 if channels_last else c
    map = (DTYPES.index(dtype), n * planes, h, w, c // planes, *expected.shape[2:])
    map = (ctypes.c_int64 * 7)(*map)
    window = [
        v for option in options for v in (option if isinstance(option, tuple) else (option, option))
    ]
    packed = (ctypes.c_int64 * 8)(*window)
    out, offsets = torch.full_like(expected, 7), torch.full_like(indices, 7, dtype=torch.uint8)
    library.call("max_pool2d", map, packed, x, out, offsets)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(offsets, torch.ops.fusedconvbn._max_pool2d(x, [*window, ceil_mode])[1])

    dout = torch.randn(out.shape, dtype=torch.float64).to(dtype).to(memory_format=format)
    dinput = torch.full_like(x, 7)
    library.call("max_pool2d_backward", map, packed, dout, offsets, dinput)
    half = dtype in (torch.bfloat16, torch.float16)  # PyTorch adds them up in half on CPU
    leaf = x.double() if half else x
    leaf = leaf.nan_to_num(nan=1e4, neginf=-1e4).requires_grad_()
    pooled = F.max_pool2d(leaf, *options, ceil_mode=ceil_mode)
    due = torch.autograd.grad(pooled, leaf, dout.to(leaf.dtype))[0].to(dtype)
    rounding = torch.finfo(dtype).eps if half else 0
    torch.testing.assert_close(dinput, due, rtol=rounding, atol=rounding)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer(tool):
    """The tests above on a GPU, without PyTorch's CUDA, which would take minutes to load under the
    tool."""
    beside = (find_toolkit() or Path()) / "bin" / "compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(beside)
    if not torch.cuda.is_available() or sanitizer is None:
        pytest.skip("needs a GPU and compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        command += [
            "--report-api-errors",
            "no",
        ]  # torch makes harmless ones when it looks for a GPU
    command += [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", __file__]
    command += ["-k", "gpu and not compute_sanitizer and not far_from_zero and not large_mean"]
    with tempfile.TemporaryFile("w+") as output:  # what it said by then, if it is stopped
        try:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=95)
        finally:
            output.seek(0)
            print(said := output.read()[-8000:])
    assert status.returncode == 0
    assert " passed" in said and " skipped" not in said
    assert "0 errors" in said or "0 hazards" in said
