"""The CUDA kernels without PyTorch's CUDA, against float64 and against the CPU kernels: on the CPU through tests/cuda_shim, and
on a GPU where there is one, also under compute-sanitizer."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from build_cuda import build_kernels, find_toolkit
from conftest import requires_gpu

from fusedconvbn.activations import activation_module
from fusedconvbn.chain import ACTIVATIONS, PARAMETERS, Norm, pack

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# channels_last, outer, channels, inner. Vectors hold 2, 4 or 8 values, a block has 256 threads, and a part is cut
# off when each of them has four vectors.
MAPS = {
    "one value": (False, 1, 1, 2),
    "tails": (False, 3, 5, 49),
    "whole vectors": (False, 2, 3, 64),
    "shorter than a vector": (False, 5, 7, 3),
    "C=1, several parts": (False, 3, 1, 9001),
    "a ragged last part": (False, 1, 3, 8229),
    "C=1000": (False, 2, 70, 5),
    "rows, whole vectors": (True, 37, 16, 1),
    "rows, half a vector": (True, 37, 6, 1),
    "rows, C=1": (True, 300, 1, 1),
    "rows, C=1000": (True, 9, 1000, 1),
    "more rows than a part": (True, 4099, 8, 1),
    "fewer rows than threads": (True, 2, 24, 1),
}


class Library:
    """The kernels of a library on tensors of the CPU, which each call copies into memory of the device's own and back."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.scratch_bytes.restype = ctypes.c_int64

    def scratch(self, map):
        return torch.empty(self.library.scratch_bytes(map), dtype=torch.uint8)

    def call(self, name, *arguments):
        """Of the arguments the tensors, and lists of tensors or None, are the device's; C sees the others as they are."""
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
    """The four kernels on tensors of the map's memory order: (outer, C, inner), or (outer, C) channels last."""

    def __init__(self, library, shape, dtype):
        self.library = library
        self.map = (ctypes.c_int64 * 5)(DTYPES.index(dtype), *shape)
        self.channels = shape[2]
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32

    def _call(self, name, *arguments):
        for vectors in (a for a in arguments if isinstance(a, list)):
            assert all(v.dtype == self.acc and v.is_contiguous() for v in vectors)
        self.library.call(name, self.map, *arguments)

    def _reduce(self, name, *arguments):
        result = torch.full((2, self.channels), 7, dtype=self.acc)
        self._call(name, *arguments, self.library.scratch(self.map), result)
        return result

    def stats(self, y):
        return self._reduce("channel_stats", y)

    def grad_stats(self, dout, y, vectors, activation, residual=None, from_result=None, du=None):
        end = (*_activation(activation), residual, from_result, du)
        return self._reduce("channel_grad_stats", dout, y, vectors, *end)

    def apply_(self, out, y, vectors, activation, residual=None):
        self._call("channel_apply_", out, y, vectors, *_activation(activation), residual)

    def grad_apply_(self, out, dout, y, vectors, activation):
        self._call("channel_grad_apply_", out, dout, y, vectors, *_activation(activation))


def _activation(name):
    parameter = PARAMETERS.get(name, 0.0)
    return ctypes.c_int64(ACTIVATIONS.index(name)), ctypes.c_double(parameter)


def _map(shape, dtype, offset=0, mean=0.3):
    """A random map that starts `offset` values behind an aligned address."""
    channels_last, *sizes = shape
    count = sizes[0] * sizes[1] * sizes[2]
    values = torch.randn(count + offset, dtype=torch.float64).add(mean).to(dtype)[offset:]
    return values.view(sizes if not channels_last else sizes[:2])


def _channels(v, y):
    return v.double()[:, None] if y.dim() == 3 else v.double()


def _dims(y):
    return (0, 2) if y.dim() == 3 else (0,)


def _check_all(kernels, y, dout, dtype, activation):
    """All four kernels against their formulas in float64; the maps are written in place too, as the chain does."""
    act = activation_module(activation)
    wide, dims = y.double(), _dims(y)
    count = y.numel() // kernels.channels
    acc = torch.finfo(kernels.acc).eps
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[
        dtype
    ]
    sums_exact = 64 * acc * count**0.5

    var, mean = torch.var_mean(wide, dims, correction=0)
    stats = kernels.stats(y)
    torch.testing.assert_close(stats[0].double(), mean, rtol=8 * acc, atol=8 * acc)
    torch.testing.assert_close(stats[1].double(), var, rtol=32 * acc, atol=32 * acc)

    scale, shift, slope, offset = (
        torch.randn(kernels.channels, dtype=kernels.acc) for _ in range(4)
    )
    vectors = [stats[0].contiguous(), scale, shift, slope, offset]
    mean, scale, shift, slope, offset = (_channels(v, y) for v in vectors)
    u = ((y.to(kernels.acc) - _channels(vectors[0], y).to(kernels.acc)).double()) * scale + shift

    def gradient(u):
        leaf = u.clone().requires_grad_()
        return torch.autograd.grad(act(leaf), leaf, dout.double())[0]

    def check_sums(sums, du):
        expected = torch.stack((du.sum(dims), (du * (wide - mean)).sum(dims)))
        torch.testing.assert_close(sums.double(), expected, rtol=sums_exact, atol=sums_exact)

    du = gradient(u)
    check_sums(kernels.grad_stats(dout, y, vectors[:3], activation), du)
    expected = scale * du + slope * (wide - mean) + offset
    for target in ("fresh", "y", "dout"):
        maps = {"y": y.clone(), "dout": dout.clone(), "fresh": torch.full_like(y, 7)}
        # The aligned and the misaligned address go with the tensor, so clones are put where the original was.
        maps = {name: _same_alignment(t, y) for name, t in maps.items()}
        kernels.grad_apply_(maps[target], maps["dout"], maps["y"], vectors, activation)
        torch.testing.assert_close(maps[target].double(), expected, rtol=exact, atol=exact)

    residual = _same_alignment(torch.randn(y.shape, dtype=torch.float64).to(dtype), y)
    for added in (None, residual):
        joined = u if added is None else u + added.double()
        for target in ("fresh", "y"):
            maps = {"y": _same_alignment(y, y), "fresh": _same_alignment(torch.full_like(y, 7), y)}
            kernels.apply_(maps[target], maps["y"], vectors[:3], activation, added)
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
            sums = kernels.grad_stats(
                given, y, vectors[:3], activation, **{name: other}, du=written
            )
            check_sums(sums, gradient(at))
            torch.testing.assert_close(written.double(), gradient(at), rtol=exact, atol=3 * exact)


def _same_alignment(t, like):
    offset = like.data_ptr() % 16 // like.element_size()
    values = torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].view(t.shape)
    assert values.data_ptr() % 16 == like.data_ptr() % 16
    return values.copy_(t)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_its_formula(library, name, dtype):
    torch.manual_seed(0)
    shape = MAPS[name]
    turn = DTYPES.index(dtype) + list(MAPS).index(name)
    activation = ("relu", ACTIVATIONS[turn % len(ACTIVATIONS)])[turn % 2]
    kernels = Kernels(library, shape, dtype)
    _check_all(kernels, _map(shape, dtype), _map(shape, dtype), dtype, activation)


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_that_start_between_vectors(library, channels_last, dtype):
    torch.manual_seed(0)
    shape = (True, 5, 16, 1) if channels_last else (False, 2, 3, 21)
    kernels = Kernels(library, shape, dtype)
    _check_all(kernels, _map(shape, dtype, offset=1), _map(shape, dtype, offset=1), dtype, "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(library, activation):
    shape, dtype = (True, 40, 8, 1), torch.float32
    _check_all(
        Kernels(library, shape, dtype), _map(shape, dtype), _map(shape, dtype), dtype, activation
    )


@pytest.mark.parametrize("shape", [(False, 2, 3, 1500), (True, 1500, 3, 1)])
def test_statistics_far_from_zero(library, shape):
    torch.manual_seed(0)
    y = _map(shape, torch.float32, mean=1e4)
    y.view(-1)[0] = -3e4  # where a sum that is taken from the first value would lose the variance
    kernels = Kernels(library, shape, torch.float32)
    var, mean = torch.var_mean(y.double(), _dims(y), correction=0)
    stats = kernels.stats(y).double()
    torch.testing.assert_close(stats[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1], var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(False, 4, 2, 1023), (True, 4092, 2, 1)])
@pytest.mark.parametrize("mean", (1e4, 3e19))
def test_a_large_mean_costs_the_variance_nothing(library, shape, mean):
    y = _map(shape, torch.float64) * mean / 1e4 + mean
    y = y.float()
    var, mean = torch.var_mean(y.double(), _dims(y), correction=0)
    stats = Kernels(library, shape, torch.float32).stats(y).double()
    torch.testing.assert_close(stats[0], mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1], var, rtol=1e-5, atol=0)


def test_not_finite_values_stay_in_their_channel(library):
    torch.manual_seed(0)
    shape = (False, 2, 3, 70)
    y = _map(shape, torch.float32)
    y[0, 0, 5], y[1, 1, 0] = float("nan"), float("inf")
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
    chain = pack(y, [Norm(weight, bias, activation="relu")])
    ops = torch.ops.fusedconvbn
    out, _, (stats,) = ops._chain_forward(chain.tensors, *chain.options, [])
    dy, dweight, dbias = ops._chain_backward(
        dout, chain.tensors, [], [stats], *chain.options, [], [0, 1, 2]
    )

    shape = (True, n * h * w, c, 1) if channels_last else (False, n, c, h * w)
    kernels = Kernels(library, shape, dtype)
    own_stats = kernels.stats(y)
    tolerance = dict(rtol=16 * torch.finfo(acc).eps, atol=16 * torch.finfo(acc).eps)
    torch.testing.assert_close(own_stats, stats, **tolerance)
    r = (stats[1] + 1e-5).rsqrt()
    vectors = [stats[0].contiguous(), r * weight, bias]
    s1, s2 = kernels.grad_stats(dout, y, vectors, "relu")
    torch.testing.assert_close(s1, dbias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r * s2, dweight, rtol=1e-5, atol=1e-5)
    count = n * h * w
    vectors += [-vectors[1] * r * r * s2 / count, -vectors[1] * s1 / count]
    result = torch.empty_like(y)
    kernels.grad_apply_(result, dout, y, vectors, "relu")
    torch.testing.assert_close(result, dy)
    kernels.apply_(result, y, vectors[:3], "relu")
    torch.testing.assert_close(result, out)


@pytest.mark.parametrize("counted", (False, True))
@pytest.mark.parametrize("arithmetic", ("batchnorm", "tutorial"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("channels", (1, 256, 300))
def test_vectors(library, channels, dtype, arithmetic, counted):
    """The C-sized arithmetic against the table of docs/design.md; channel 0 is constant."""
    if counted and arithmetic == "tutorial":
        return  # is not synchronised
    eps, count, tutorial = 1e-3, 7.0, arithmetic == "tutorial"
    sums, total, others = torch.randn(3, 2, channels, dtype=dtype)
    var, gamma = others[0].square(), others[1]
    beta, counts = torch.randn(2, channels, dtype=dtype)
    counts = counts.abs().mul(5).round()  # some of them 0
    var[0] = sums[1, 0] = total[1, 0] = 0

    def run(name, *tensors):
        result = torch.empty(3, channels, dtype=dtype)
        library.call(
            name,
            *map(ctypes.c_int64, (DTYPES.index(dtype), channels)),
            list(tensors),
            ctypes.c_double(eps),
            ctypes.c_bool(tutorial),
            ctypes.c_double(count),
            result,
        )
        return result.double()

    close = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    )
    std = (var.double() * count / (count - 1)).sqrt()
    r = 1 / (std + eps) if tutorial else (var.double() + eps).rsqrt()
    for weight, bias in ((gamma, beta), (None, None)):
        vectors = run("affine_vectors", var, weight, bias)
        a = r if weight is None else r * weight.double()
        b = torch.zeros(channels) if bias is None else bias
        torch.testing.assert_close(vectors, torch.stack([a, b.double(), r]), **close)

    vectors = torch.stack([a, beta.double(), r]).to(dtype)
    R = counts.double().clamp_min(1) if counted else count
    rho = (count / ((count - 1) * std)).nan_to_num(posinf=0) if tutorial else r
    S1, S2 = total.double()
    expected = torch.stack([-a / R * r * rho * S2, -a / R * S1, r * sums[1].double()])
    found = run("grad_vectors", sums, total, var, vectors, counts if counted else None)
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer(tool):
    """The tests above on a GPU, without PyTorch's CUDA, which would take minutes to load under the tool."""
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
