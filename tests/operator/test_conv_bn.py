"""Values and gradients of the operator against the unfused layers, in float64 and below."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, DTYPES, Case, unfused

import fusedconvbn
from fusedconvbn import conv_bn

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
GRADIENTS = 4  # with which an error is measured
BOTH_LAYOUTS = pytest.mark.parametrize("channels_last", (False, True), ids=("nchw", "nhwc"))


def fused(tensors, case, **more):
    return conv_bn(**tensors, **{**case.options, **more})


def run(function, tensors, case, dout=None, seed=1, **more):
    """The result and the gradients of the tensors, by name, and the gradient that came in."""
    out = function(tensors, case, **more)
    if dout is None:
        generator = torch.Generator().manual_seed(seed)
        dout = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    dout = dout.to(out)
    grads = torch.autograd.grad(out, list(tensors.values()), dout)
    return {"output": out.detach(), **dict(zip(tensors, grads, strict=True))}, dout


def both(case, channels_last, device):
    """The tensors of a case on the device, and on the CPU for the expected values: hardswish on
    CUDA multiplies by a float 1/6 in float64 too."""
    return [case.tensors(channels_last=channels_last, device=d) for d in (device, "cpu")]


def assert_close(actual, expected, **options):
    torch.testing.assert_close(actual, expected, check_device=False, **options)


@BOTH_LAYOUTS
@EVERY_CASE
def test_float64_training(case, channels_last, device):
    tensors, on_cpu = both(case, channels_last, device)
    running, expected_running = case.running(device=device), case.running()
    results, dout = run(fused, tensors, case, **running, momentum=0.3)
    expected, _ = run(unfused, on_cpu, case, dout, **expected_running, momentum=0.3)
    for name, value in expected.items():
        assert_close(results[name], value, rtol=1e-9, atol=1e-9, msg=name)
    for name, value in expected_running.items():
        assert_close(running[name], value, rtol=1e-12, atol=1e-12, msg=name)


@BOTH_LAYOUTS
@EVERY_CASE
def test_float64_eval(case, channels_last, device):
    tensors, on_cpu = both(case, channels_last, device)
    running, before = case.running(device=device), case.running()
    results, dout = run(fused, tensors, case, **running, training=False)
    expected, _ = run(unfused, on_cpu, case, dout, **before, training=False)
    for name, value in expected.items():
        assert_close(results[name], value, rtol=1e-9, atol=1e-9, msg=name)
    for name, value in before.items():
        assert torch.equal(running[name].cpu(), value)


@BOTH_LAYOUTS
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@EVERY_CASE
def test_error_is_not_above_that_of_the_unfused_layers(
    case, dtype, training, channels_last, device
):
    """Both are compared with the same rounded numbers in float64, by the root mean square of the
    error over a few gradients that come in: the error of a single sum is luck. No gradient comes in
    at a kink of the activation, where a rounding decides which slope is right."""
    tensors = case.tensors(dtype, channels_last, device)
    exact = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    running = case.running(torch.float32, device)  # which the norm parameters of half types are too
    options = {} if training else {**running, "training": False}
    exact_options = {
        n: t.double() if isinstance(t, torch.Tensor) else t for n, t in options.items()
    }
    with torch.no_grad():
        u = unfused(exact, case, **{**exact_options, "activation": "none"})
    # Into u go the roundings of the terms of a sum (of the folded weight, where the convolution
    # runs in half), of the sum and of its shift, each eps/4 or so (root mean square) of numbers of
    # the size of u's own: together eps/2. This is 8 times that.
    reach = 4 * torch.finfo(dtype).eps * u.square().mean().sqrt()
    at_kink = torch.stack([(u - kink).abs() < reach for kink in (-3, 0, 3, 6)]).any(0)
    runs = []
    for seed in range(1, 1 + GRADIENTS):
        _, dout = run(unfused, exact, case, seed=seed, **exact_options)
        dout = dout.masked_fill(at_kink, 0).to(dtype)
        truth, _ = run(unfused, exact, case, dout.double(), **exact_options)
        results, _ = run(fused, tensors, case, dout, **options)
        others, _ = run(unfused, tensors, case, dout, **options)
        runs.append((truth, results, others))

    def mean_square(values):
        return torch.stack([v.double().square().mean() for v in values]).mean().sqrt()

    for name in runs[0][0]:
        truths, results, others = ([r[name] for r in part] for part in zip(*runs, strict=True))
        if name == "bias" and training:  # 0 exactly where the unfused layers have rounding errors
            assert not any(torch.count_nonzero(r) for r in results)
            continue
        assert results[0].dtype == others[0].dtype
        error, of_others = (
            mean_square([v.double() - t for v, t in zip(values, truths, strict=True)])
            / mean_square(truths).clamp_min(1e-3)
            for values in (results, others)
        )
        # Of small tensors, whose errors are a few roundings. In eval mode the gradient of γ is put
        # together from those of the folded weight and bias, which rounds a few times more.
        floor = (2 if training else 8) * torch.finfo(dtype).eps
        assert error <= 1.1 * of_others + floor, name


def significant_strides(t):
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_CASE
def test_shape_dtype_and_memory_format_are_those_of_the_convolution(case, dtype, channels_last):
    torch.set_num_threads(2)  # with one ATen takes a slow path for small 1×1 ones in 3-d
    tensors = case.tensors(dtype, channels_last, requires_grad=False)
    out, expected = fused(tensors, case), unfused(tensors, case)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    # Some of ATen's slow paths return another format: here those of the dtypes that have no fast
    # one (on every machine).
    if dtype == torch.float32 or (dtype != torch.float64 and out.dim() < 5):
        assert significant_strides(out) == significant_strides(expected)


@EVERY_CASE
def test_gradcheck(case):
    tensors = case.tensors()
    names = list(tensors)

    def function(*values):
        return fused(dict(zip(names, values, strict=True)), case)

    assert torch.autograd.gradcheck(function, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("name", ("2d plain", "2d bias", "1d", "transposed 1d", "tutorial"))
def test_gradcheck_every_entry_of_the_jacobian(name):
    case = CASES[name]
    tensors = case.tensors()
    names = list(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: fused(dict(zip(names, values, strict=True)), case), list(tensors.values())
    )


@pytest.mark.parametrize("name", ("2d plain", "2d bias", "tutorial affine"))
def test_second_derivatives(name):
    case = CASES[name]
    tensors = case.tensors()
    names = list(tensors)
    assert torch.autograd.gradgradcheck(
        lambda *values: fused(dict(zip(names, values, strict=True)), case),
        list(tensors.values()),
        fast_mode=True,
    )


def test_second_derivative_through_tensors_that_depend_on_each_other():
    case = Case((2, 2, 5, 4), (3, 2, 2, 3))
    x, w = case.tensors()["input"], case.tensors()["weight"]

    def penalty(function):
        scaled = x * w.square().mean()
        out = function(scaled, w)
        (grad,) = torch.autograd.grad(out.square().sum(), scaled, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, w))

    results = penalty(lambda x, w: conv_bn(x, w, activation="relu"))
    expected = penalty(lambda x, w: F.relu(F.batch_norm(F.conv2d(x, w), None, None, training=True)))
    torch.testing.assert_close(results, expected, rtol=1e-8, atol=1e-8)


def test_functional_transforms():
    case = CASES["2d no affine"]
    tensors = case.tensors(requires_grad=False)
    x, w = tensors["input"], tensors["weight"]

    def loss(function):
        return lambda x, w: function({"input": x, "weight": w}, case).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        expected = transform(loss(unfused), argnums=1)(x, w)
        torch.testing.assert_close(transform(loss(fused), argnums=1)(x, w), expected)
    batch = torch.stack((x, 2 * x))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss(fused)), (0, None))(batch, w),
        torch.func.vmap(torch.func.grad(loss(unfused)), (0, None))(batch, w),
    )


def test_vmap_and_batched_gradients():
    case = CASES["2d bias"]
    tensors = case.tensors()
    running = case.running()
    x = torch.stack((tensors["input"], tensors["input"] * 2)).detach()
    rest = {n: t for n, t in tensors.items() if n != "input"}
    for options in ({}, {"training": False, **running}):
        torch.testing.assert_close(
            torch.func.vmap(lambda x, o=options: fused({"input": x, **rest}, case, **o))(x),
            torch.func.vmap(lambda x, o=options: unfused({"input": x, **rest}, case, **o))(x),
        )
    douts = torch.randn(2, *fused(tensors, case).shape, dtype=torch.float64)
    batched = [
        torch.autograd.grad(f(tensors, case), list(tensors.values()), douts, is_grads_batched=True)
        for f in (fused, unfused)
    ]
    torch.testing.assert_close(*batched)


def test_forward_mode_leaves_running_statistics_without_tangents():
    case = CASES["2d bias"]
    tensors, running, expected = case.tensors(), case.running(), case.running()
    unfused(tensors, case, **expected)
    with torch.autograd.forward_ad.dual_level():
        x = tensors["input"]
        tensors["input"] = torch.autograd.forward_ad.make_dual(x, x.sin())
        out = fused(tensors, case, **running)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
        for t in running.values():
            assert torch.autograd.forward_ad.unpack_dual(t).tangent is None
    assert not any(t.requires_grad for t in running.values())
    torch.testing.assert_close(running, expected)


def test_tangent_of_the_gradient_of_the_output():
    case = CASES["2d plain"]
    tensors = case.tensors()
    x = tensors["input"]
    tangents = []
    for function in (fused, unfused):
        out = function(tensors, case)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(out.detach(), out.detach().sin())
            (grad,) = torch.autograd.grad(out, x, dual)
            tangents.append(torch.autograd.forward_ad.unpack_dual(grad).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("argument", ("input", "weight", "bias", "bn_weight", "bn_bias"))
def test_tensors_whose_sign_is_lazy(argument):
    case = CASES["2d every option"]
    tensors = case.tensors()
    tensors[argument] = torch._neg_view(tensors[argument].detach()).requires_grad_()
    results, dout = run(fused, tensors, case)
    expected, _ = run(unfused, tensors, case, dout)
    torch.testing.assert_close(results, expected)


def test_backward_inside_an_autocast_that_was_off_in_forward():
    """CUDA's autocast also lowers aten::convolution, which recomputes the map; here CPU's is made
    to."""

    def lowered(x, w, *rest):
        with torch.autocast("cpu", enabled=False):
            return torch.ops.aten.convolution(x.bfloat16(), w.bfloat16(), *rest)

    case = CASES["2d no affine"]
    tensors = case.tensors(torch.float32)
    out = fused(tensors, case)
    expected = torch.autograd.grad(out.sin().sum(), list(tensors.values()), retain_graph=True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("convolution", lowered, "AutocastCPU")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(out.sin().sum(), list(tensors.values()))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("momentum", (0.0, 0.25, 1.0))
def test_momentum(momentum):
    case = CASES["2d bias"]
    tensors, running, expected = case.tensors(), case.running(), case.running()
    for _ in range(3):
        fused(tensors, case, **running, momentum=momentum)
        unfused(tensors, case, **expected, momentum=momentum)
    torch.testing.assert_close(running, expected, rtol=1e-12, atol=1e-12)


def test_half_running_statistics_and_parameters():
    case = CASES["2d plain"]
    tensors = {n: t.detach().bfloat16() for n, t in case.tensors(torch.float32).items()}
    running, expected = case.running(torch.bfloat16), case.running(torch.bfloat16)
    torch.testing.assert_close(
        fused(tensors, case, **running), unfused(tensors, case, **expected), rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(running, expected, rtol=1e-2, atol=1e-2)
    out = fused(tensors, case, **running, training=False)
    expected = unfused(tensors, case, **running, training=False)
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_statistics_far_from_zero(dtype, channels_last, device):
    """|mean| = 10⁴·std in the output of the convolution."""
    x = torch.randn(4, 1, 33, 31, dtype=torch.float64, device=device).to(dtype) + 1e4
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w = torch.ones(5, 1, 1, 1, dtype=dtype, device=device)
    running = {"running_mean": torch.zeros(5, dtype=dtype, device=device)}
    running["running_var"] = torch.zeros(5, dtype=dtype, device=device)
    out = conv_bn(x, w, **running, momentum=1.0)
    var, mean = torch.var_mean(x.double(), correction=1)
    torch.testing.assert_close(running["running_mean"].double(), mean.expand(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(running["running_var"].double(), var.expand(5), rtol=1e-5, atol=0)
    expected = F.batch_norm(x.double(), None, None, training=True).expand(-1, 5, -1, -1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@BOTH_LAYOUTS
def test_a_value_far_from_the_others(channels_last):
    """The origin that sums are taken from may itself stand far out."""
    y = torch.randn(4, 3, 25, 25)
    y[2, :, 12, 12] = 1e4
    if channels_last:
        y = y.to(memory_format=torch.channels_last)
    running = {"running_mean": torch.zeros(3), "running_var": torch.zeros(3)}
    conv_bn(y, torch.eye(3)[:, :, None, None], **running, momentum=1.0)
    var, mean = torch.var_mean(y.double(), (0, 2, 3))
    torch.testing.assert_close(running["running_var"].double(), var, rtol=1e-6, atol=0)
    torch.testing.assert_close(running["running_mean"].double(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_values_that_are_not_finite(value):
    case = Case((2, 3, 6, 5), (3, 1, 1, 1), groups=3)
    tensors = case.tensors()
    with torch.no_grad():
        tensors["input"][0, 1, 2, 3] = value
    results, dout = run(fused, tensors, case)
    expected, _ = run(unfused, tensors, case, dout)
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], equal_nan=True, msg=name)


def test_relu_has_the_gradient_0_at_0():
    case = CASES["2d plain"]
    tensors = case.tensors()
    with torch.no_grad():
        tensors["bn_weight"].zero_()
        tensors["bn_bias"].zero_()
    results, dout = run(fused, tensors, case)
    expected, _ = run(unfused, tensors, case, dout)
    assert torch.count_nonzero(expected["bn_bias"]) == 0
    torch.testing.assert_close(results, expected)


def test_empty_batch():
    case = Case((0, 3, 6, 5), (4, 3, 3, 3))
    tensors, running, before = case.tensors(), case.running(), case.running()
    results, dout = run(fused, tensors, case, **running)
    expected, _ = run(unfused, tensors, case, dout)
    assert results["output"].shape == (0, 4, 4, 3)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(running, before, rtol=0, atol=0)


@pytest.mark.parametrize("argument", ("input", "weight", "bias", "bn_weight", "bn_bias", "dout"))
def test_arguments_in_any_memory_order(argument):
    case = CASES["2d every option"]
    tensors = case.tensors()
    results, dout = run(fused, tensors, case)
    if argument == "dout":
        dout = dout.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        wide = torch.empty(*tensors[argument].shape, 2, dtype=torch.float64)
        tensors[argument] = wide[..., 1].copy_(tensors[argument].detach()).requires_grad_()
    again, _ = run(fused, tensors, case, dout)
    torch.testing.assert_close(again, results)


def test_expanded_gradient():
    case = CASES["2d plain"]
    tensors = case.tensors()
    results = torch.autograd.grad(fused(tensors, case).sum(), list(tensors.values()))
    expected = torch.autograd.grad(unfused(tensors, case).sum(), list(tensors.values()))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("needs_grad", ("input", "weight", "bias", "bn_weight", "bn_bias"))
def test_one_gradient_alone(needs_grad):
    case = CASES["2d every option"]
    tensors = case.tensors()
    expected, dout = run(fused, tensors, case)
    alone = {n: t.detach().requires_grad_(n == needs_grad) for n, t in tensors.items()}
    (grad,) = torch.autograd.grad(fused(alone, case), alone[needs_grad], dout)
    torch.testing.assert_close(grad, expected[needs_grad], rtol=0, atol=0)


def test_nothing_is_saved_without_a_gradient():
    case = CASES["2d plain"]
    assert fused(case.tensors(requires_grad=False), case).grad_fn is None
    with torch.no_grad():
        assert fused(case.tensors(), case).grad_fn is None


def test_backward_twice():
    case = CASES["2d plain"]
    tensors = case.tensors()
    out = fused(tensors, case)
    first = torch.autograd.grad(out.sum(), list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_what_is_saved_is_an_error_and_changing_the_result_is_not():
    case = CASES["2d plain"]
    tensors = case.tensors()
    leaf = tensors["input"]
    tensors["input"] = leaf * 1
    out = fused(tensors, case)
    out.mul_(2)
    out.sum().backward(retain_graph=True)
    with torch.no_grad():
        tensors["input"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(dtype, channels_last, device):
    case = Case((5, 16, 37, 41), (24, 16, 3, 3), padding=(1,))
    tensors = case.tensors(dtype, channels_last, device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        first, dout = run(fused, tensors, case)
        for _ in range(3):
            again, _ = run(fused, tensors, case, dout)
            assert all(torch.equal(again[name], first[name]) for name in first)


@BOTH_LAYOUTS
def test_the_number_of_threads_changes_nothing_but_roundings(channels_last):
    case = Case((5, 16, 37, 41), (24, 16, 3, 3), padding=(1,))
    tensors = case.tensors(torch.float32, channels_last)
    torch.set_num_threads(1)
    one, dout = run(fused, tensors, case)
    torch.set_num_threads(4)
    four, _ = run(fused, tensors, case, dout)
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    case = CASES["2d bias"]
    tensors, running, expected_running = (
        case.tensors(torch.float32),
        case.running(torch.float32),
        case.running(torch.float32),
    )
    with torch.autocast("cpu", dtype=dtype):
        results, dout = run(fused, tensors, case, **running)
        expected, _ = run(unfused, tensors, case, dout, **expected_running)
        evaluated = fused(tensors, case, **running, training=False)
    assert results["output"].dtype == evaluated.dtype == dtype
    assert all(results[name].dtype == torch.float32 for name in tensors)
    torch.testing.assert_close(results, expected, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(running, expected_running, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("capability", (pytest.param("default", marks=pytest.mark.slow), "avx2"))
def test_every_instruction_set(capability):
    """The suite runs with the machine's best; these are the others, each in a process of its
    own."""
    tests = ("test_float64_training", "test_error_is_not_above", "test_statistics_far_from_zero")
    if capability not in os.environ.get("ATEN_CPU_CAPABILITY", capability):
        pytest.skip("this is such a process")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            __file__,
            "-k",
            " or ".join(tests),
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
        cwd=os.path.dirname(__file__),
    )


def test_compiles_in_one_graph():
    case = CASES["2d every option"]
    tensors, running, expected_running = case.tensors(), case.running(), case.running()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    results, dout = run(compiled, tensors, case, **running)
    expected, _ = run(unfused, tensors, case, dout, **expected_running)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(running, expected_running, rtol=1e-9, atol=1e-9)


def test_build_info_names_the_build():
    info = fusedconvbn.build_info()
    assert info["torch"] == torch.__version__
    assert "baseline" in info["instruction_sets"]
