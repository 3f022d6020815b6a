"""The reference itself: its gradients, its equality with plain operations, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fusedconvbn import reference
from fusedconvbn.reference import BatchNorm, Conv2D, FusedConvBN2DFunction, conv_bn


def tensor(*shape, requires_grad=True, dtype=torch.double):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)


def needs(input, weight):
    return tensor(3, 2, 6, 5, requires_grad=input), tensor(4, 2, 3, 2, requires_grad=weight)


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("function", [Conv2D, FusedConvBN2DFunction])
def test_gradcheck_of_convolutions(function, needs_grad):
    assert gradcheck(function.apply, needs(*needs_grad))


@pytest.mark.parametrize("shape", [(3, 2, 6, 5), (2, 3, 1, 1), (1, 1, 2, 1)])
def test_gradcheck_of_batch_norm(shape):
    assert gradcheck(BatchNorm.apply, (tensor(*shape), 1e-2))


@pytest.mark.parametrize("function", [Conv2D, FusedConvBN2DFunction])
def test_computes_only_the_gradients_that_are_needed(function, monkeypatch):
    asked = []

    def recorded(dout, input, weight, needs):
        asked.append(tuple(needs))
        return original(dout, input, weight, needs)

    original = reference.convolution_backward
    monkeypatch.setattr(reference, "convolution_backward", recorded)
    for needs_grad in [(True, True), (True, False), (False, True)]:
        input, weight = needs(*needs_grad)
        function.apply(input, weight).sum().backward()
        assert [input.grad is not None, weight.grad is not None] == [*needs_grad]
    assert asked == [(True, True), (True, False), (False, True)]


def test_convolution_backward_leaves_out_what_is_not_needed():
    input, weight = needs(False, False)
    dout = torch.ones(3, 4, 4, 4, dtype=torch.double)
    assert reference.convolution_backward(dout, input, weight, (False, False)) == (None, None)


@pytest.mark.parametrize(
    "call",
    [
        lambda input, weight: Conv2D.apply(input, weight),
        lambda input, weight: BatchNorm.apply(input),
        lambda input, weight: FusedConvBN2DFunction.apply(input, weight),
    ],
)
def test_second_derivative_is_an_error(call):
    input, weight = needs(True, True)
    (grad,) = torch.autograd.grad(call(input, weight).square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def gradients(output, *inputs):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_function_is_the_unfused_pair(memory_format):
    input, weight = needs(True, True)
    input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
    fused = gradients(FusedConvBN2DFunction.apply(input, weight, 1e-3), input, weight)
    layers = gradients(BatchNorm.apply(Conv2D.apply(input, weight), 1e-3), input, weight)
    plain = conv_bn(input, weight, eps=1e-3, arithmetic="tutorial")
    torch.testing.assert_close(fused, layers)
    torch.testing.assert_close(fused, gradients(plain, input, weight))


@pytest.mark.parametrize("function", [BatchNorm, FusedConvBN2DFunction])
def test_constant_channel_has_finite_gradients(function):
    input, weight = tensor(2, 3, 5, 4), torch.zeros(2, 3, 2, 2, dtype=torch.double)
    weight.requires_grad_()
    if function is BatchNorm:
        output = BatchNorm.apply(F.conv2d(input, weight))
    else:
        output = FusedConvBN2DFunction.apply(input, weight)
    plain = conv_bn(input, weight, eps=1e-3, arithmetic="tutorial")
    expected = gradients(plain, input, weight)
    assert all(each.isfinite().all() for each in expected)
    torch.testing.assert_close(gradients(output, input, weight), expected)


def test_fused_function_saves_no_feature_map():
    input, weight = needs(True, True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = FusedConvBN2DFunction.apply(input, weight)
    assert [tuple(each.shape) for each in saved] == [input.shape, weight.shape, (4,), (4,)]
    assert saved[0] is input and saved[1] is weight
    assert output.shape == (3, 4, 4, 4)


# Dimensions, transposed, options; all sizes differ.
OPTIONS = [
    (1, False, {}),
    (2, False, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}),
    (3, False, {"stride": 2, "padding": 1}),
    (1, True, {"stride": 3, "output_padding": 1, "groups": 2}),
    (2, True, {"stride": (2, 3), "padding": 1, "output_padding": (1, 2), "dilation": (3, 1)}),
    (3, True, {"padding": 1}),
]


def arguments(dims, transposed, options, dtype=torch.double):
    groups = options.get("groups", 1)
    channels = (4, 6 // groups) if transposed else (6, 4 // groups)
    input = tensor(3, 4, *(7, 6, 5)[:dims], dtype=dtype)
    weight = tensor(*channels, *(3, 2, 3)[:dims], dtype=dtype)
    vectors = [tensor(6, dtype=dtype) + shift for shift in (0, 1, 2)]
    return input, weight, *(vector.detach().requires_grad_() for vector in vectors)


@pytest.mark.parametrize("dims, transposed, options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_conv_bn_is_convolution_then_batch_norm(dims, transposed, options, training, activation):
    args = arguments(dims, transposed, options)
    name = f"conv_transpose{dims}d" if transposed else f"conv{dims}d"
    running = torch.linspace(-1, 1, 6).double(), torch.linspace(0.5, 2, 6).double()
    expected_running = [each.clone() for each in running]

    y = getattr(F, name)(*args[:3], **options)
    u = F.batch_norm(y, *expected_running, *args[3:], training, 0.3, 1e-2)
    expected = F.relu(u) if activation == "relu" else u
    output = conv_bn(
        *args,
        *running,
        training=training,
        momentum=0.3,
        eps=1e-2,
        transposed=transposed,
        activation=activation,
        **options,
    )
    torch.testing.assert_close(gradients(output, *args), gradients(expected, *args))
    torch.testing.assert_close([*running], expected_running)


@pytest.mark.thin(1)
@pytest.mark.parametrize("arithmetic", ["batchnorm", "tutorial"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims, transposed, options", OPTIONS[:2] + OPTIONS[4:5])
def test_gradcheck_of_conv_bn(arithmetic, training, dims, transposed, options):
    mean, var = torch.zeros(6).double(), torch.ones(6).double()

    def function(*args):
        # Cloned: each call of gradcheck must find the same running statistics.
        return conv_bn(
            *args,
            mean.clone(),
            var.clone(),
            training=training,
            transposed=transposed,
            activation="relu",
            arithmetic=arithmetic,
            **options,
        )

    args = arguments(dims, transposed, options)
    assert gradcheck(function, args)
    assert gradgradcheck(function, args, fast_mode=True) if dims == 1 else True


def test_tutorial_arithmetic_written_out():
    input, weight = needs(False, False)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    output = conv_bn(
        input, weight, None, None, None, mean, var, momentum=0.25, eps=0.5, arithmetic="tutorial"
    )
    y = F.conv2d(input, weight).transpose(0, 1).flatten(1)
    expected = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) ** 0.5 + 0.5)
    torch.testing.assert_close(output.transpose(0, 1).flatten(1), expected)
    torch.testing.assert_close(mean, 0.25 * y.mean(1))
    torch.testing.assert_close(var, 0.75 + 0.25 * y.var(1))


def test_both_arithmetics_move_the_running_statistics_alike():
    input, weight = needs(False, False)
    running = {}
    for arithmetic in ("batchnorm", "tutorial"):
        running[arithmetic] = torch.zeros(4).double(), torch.ones(4).double()
        conv_bn(input, weight, None, None, None, *running[arithmetic], arithmetic=arithmetic)
    torch.testing.assert_close(running["batchnorm"], running["tutorial"])


def test_tutorial_arithmetic_takes_half_input_with_float_vectors():
    input, weight = (each.bfloat16() for each in needs(False, False))
    vectors = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
    output = conv_bn(input, weight, None, *vectors, arithmetic="tutorial")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.double(),
        conv_bn(input.double(), weight.double(), arithmetic="tutorial"),
        atol=0.05,
        rtol=0.02,
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "swish"}, "expected activation .*, got 'swish'"),
        ({"arithmetic": "exact"}, "arithmetic must be 'batchnorm' or 'tutorial', got 'exact'"),
        ({"arithmetic": "tutorial", "training": False}, "must be given when training=False"),
    ],
)
def test_conv_bn_errors(options, message):
    with pytest.raises(ValueError, match=message):
        conv_bn(*needs(False, False), **options)


@pytest.mark.parametrize("arithmetic", ["batchnorm", "tutorial"])
def test_one_value_per_channel_is_an_error(arithmetic):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_bn(torch.ones(1, 2, 3, 2), torch.ones(4, 2, 3, 2), arithmetic=arithmetic)
