"""Every bad argument is named, with the rule and what was found, before anything is computed."""

import numpy as np
import pytest
import torch
from torch import nn

from fusedconvbn import FusedConvBN2d, FusedConvTransposeBN1d, conv_bn

X, W = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 2)


def vector(n=6, dtype=torch.float32):
    return torch.ones(n, dtype=dtype)


def running(n=6, dtype=torch.float32):
    return {"running_mean": vector(n, dtype), "running_var": vector(n, dtype)}


# what is changed in conv_bn(X, W, **running()), and what the message says
BAD = {
    "input of 2 dimensions": (
        dict(input=X[0, 0]),
        ValueError,
        "expected input of 4 dimensions.*got shape",
    ),
    "unbatched input": (
        dict(input=X[0]),
        ValueError,
        r"expected input of 4 dimensions.*\[4, 6, 5\]",
    ),
    "weight of 2 dimensions": (dict(weight=W[0, 0]), ValueError, "expected weight of 3, 4 or 5"),
    "weight of 6 dimensions": (
        dict(weight=W[..., None, None]),
        ValueError,
        "expected weight of 3, 4 or 5",
    ),
    "channels": (dict(input=X[:, :3]), ValueError, r"expected weight of shape \[out_channels, 3"),
    "groups": (dict(groups=3), ValueError, "input channels divisible by groups=3"),
    "groups of output": (
        dict(groups=4, weight=torch.randn(6, 1, 3, 2)),
        ValueError,
        "out_channels divisible by groups=4",
    ),
    "no groups": (dict(groups=0), ValueError, "groups of at least 1, got 0"),
    "negative groups": (dict(groups=-2), ValueError, "groups of at least 1, got -2"),
    "transposed channels": (
        dict(transposed=True),
        ValueError,
        r"expected weight of shape \[4, out_channels / groups",
    ),
    "empty kernel": (dict(weight=W[..., :0]), ValueError, "kernel of at least 1"),
    "no output channels": (dict(weight=W[:0], **running(0)), ValueError, "with output channels"),
    "bias length": (dict(bias=vector(5)), ValueError, r"expected bias of shape \[6\].*got \[5\]"),
    "bias dimensions": (
        dict(bias=vector()[None]),
        ValueError,
        r"bias of shape \[6\].*got \[1, 6\]",
    ),
    "bn_weight length": (
        dict(bn_weight=vector(7)),
        ValueError,
        r"bn_weight of shape \[6\].*got \[7\]",
    ),
    "bn_bias length": (dict(bn_bias=vector(1)), ValueError, r"bn_bias of shape \[6\].*got \[1\]"),
    "running_mean length": (
        dict(running_mean=vector(5)),
        ValueError,
        r"running_mean of shape \[6\]",
    ),
    "running_var length": (dict(running_var=vector(5)), ValueError, r"running_var of shape \[6\]"),
    "no running_mean": (
        dict(running_mean=None),
        ValueError,
        "both or neither, got only running_var",
    ),
    "no running_var": (
        dict(running_var=None),
        ValueError,
        "both or neither, got only running_mean",
    ),
    "running_mean with a gradient": (
        dict(running_mean=vector().requires_grad_()),
        ValueError,
        "expected running_mean that does not require grad",
    ),
    "expanded running_var": (
        dict(running_var=torch.ones(1).expand(6)),
        ValueError,
        "expected running_var with a place in memory for each value",
    ),
    "inference tensor": (
        dict(running_var=torch.inference_mode()(vector)()),
        ValueError,
        "expected running_var that can be updated, got an inference tensor",
    ),
    "eval without statistics": (
        dict(training=False, running_mean=None, running_var=None),
        ValueError,
        "running_mean and running_var when training=False",
    ),
    "device of weight": (
        dict(weight=W.to("meta")),
        ValueError,
        r"weight on the device of input \(cpu\), got meta",
    ),
    "device of running_mean": (
        dict(running_mean=vector().to("meta")),
        ValueError,
        "running_mean on the device of",
    ),
    "integer input": (dict(input=X.int()), TypeError, "input of dtype float64.*got Int"),
    "complex input": (dict(input=X.cfloat()), TypeError, "input of dtype.*got ComplexFloat"),
    "integer weight": (dict(weight=W.long()), TypeError, "weight of dtype.*got Long"),
    "boolean bn_weight": (
        dict(bn_weight=vector().bool()),
        TypeError,
        "bn_weight of dtype.*got Bool",
    ),
    "mixed dtypes": (
        dict(weight=W.double()),
        TypeError,
        r"weight of the dtype of input \(Float\), got Double",
    ),
    "dtype of bias": (dict(bias=vector().double()), TypeError, "bias of the dtype of input"),
    "dtype of bn_bias": (dict(bn_bias=vector().half()), TypeError, "bn_bias of the dtype of input"),
    "dtype of running_var": (
        dict(running_var=vector().double()),
        TypeError,
        "running_var of the dtype of input",
    ),
    "zero stride": (dict(stride=0), ValueError, r"stride of at least 1, got \[0\]"),
    "negative stride": (dict(stride=[1, -1]), ValueError, r"stride of at least 1, got \[1, -1\]"),
    "zero dilation": (dict(dilation=0), ValueError, "dilation of at least 1"),
    "negative padding": (dict(padding=-1), ValueError, "padding of at least 0"),
    "stride list": (
        dict(stride=[1, 1, 1]),
        ValueError,
        r"stride of 1 or 2 values.*got \[1, 1, 1\]",
    ),
    "padding list": (dict(padding=[]), ValueError, r"padding of 1 or 2 values.*got \[\]"),
    "dilation list": (dict(dilation=[1] * 4), ValueError, "dilation of 1 or 2 values"),
    "output_padding": (
        dict(output_padding=1),
        ValueError,
        "output_padding 0 unless transposed, got",
    ),
    "large output_padding": (
        dict(transposed=True, weight=torch.randn(4, 6, 3, 2), output_padding=1),
        ValueError,
        "output_padding below stride or dilation, got",
    ),
    "kernel larger than the image": (
        dict(dilation=4),
        ValueError,
        r"output size above 0, got \[2, 6, -?\d",
    ),
    "one value for each channel": (
        dict(input=X[:1, :, :3, :2]),
        ValueError,
        r"more than 1 value per channel when training, got output shape \[1, 6, 1, 1\]",
    ),
    "activation": (
        dict(activation="swish"),
        ValueError,
        r"activation to be one of 'none', 'relu', .*, or 'leaky_relu\(slope\)'.*, got 'swish'",
    ),
    "parameter of an activation without": (
        dict(activation="relu(0.1)"),
        ValueError,
        r"got 'relu\(0.1\)'",
    ),
    "activation's parameter": (
        dict(activation="leaky_relu(0.1"),
        ValueError,
        r"got 'leaky_relu\(0.1'",
    ),
    "activation's parameter is no number": (
        dict(activation="elu(nan)"),
        ValueError,
        r"got 'elu\(nan\)'",
    ),
    "residual that would be broadcast": (
        dict(residual=torch.zeros(2, 6, 1, 1)),
        ValueError,
        r"residual of shape \[2, 6, 4, 4\] .*not broadcast\), got \[2, 6, 1, 1\]",
    ),
    "dtype of residual": (
        dict(residual=torch.zeros(2, 6, 4, 4).double()),
        TypeError,
        r"residual of the dtype of input \(Float\), got Double",
    ),
    "device of residual": (
        dict(residual=torch.zeros(2, 6, 4, 4, device="meta")),
        ValueError,
        "residual on the device of input",
    ),
    "counter's dtype": (
        dict(num_batches_tracked=torch.tensor(0.0)),
        TypeError,
        "num_batches_tracked of dtype int64, got Float",
    ),
    "counter's shape": (
        dict(num_batches_tracked=torch.zeros(1, dtype=torch.int64)),
        ValueError,
        r"num_batches_tracked of shape \[\] on the device of input \(cpu\), got \[1\]",
    ),
    "no counter": (dict(momentum=None), ValueError, "num_batches_tracked when momentum is None"),
    "synchronised tutorial": (
        dict(arithmetic="tutorial", process_group="0"),
        ValueError,
        "arithmetic 'batchnorm' with a process_group, got 'tutorial'",
    ),
    "arithmetic": (
        dict(arithmetic="exact"),
        ValueError,
        "arithmetic 'batchnorm' or 'tutorial', got 'exact'",
    ),
    "negative eps": (
        dict(eps=-1e-5),
        ValueError,
        "eps (of at least 0|above 0 when training), got -1e-05",
    ),
    "eps not a number": (
        dict(eps=float("nan")),
        ValueError,
        "eps (of at least 0|above 0 when training), got nan",
    ),
    "momentum not a number": (
        dict(momentum=float("nan")),
        ValueError,
        "momentum that is a number or None, got nan",
    ),
    "sparse input": (
        dict(input=X.to_sparse()),
        TypeError,
        "expected input to be dense, got layout Sparse",
    ),
    "sparse weight": (dict(weight=W.to_sparse()), TypeError, "expected weight to be dense"),
    "nested input": (
        dict(input=torch.nested.nested_tensor([X[0], X[1]])),
        TypeError,
        "expected input to be dense, got a nested tensor",
    ),
    "nested residual": (
        dict(residual=torch.nested.nested_tensor([torch.randn(6, 4, 4)] * 2)),
        TypeError,
        "expected residual to be dense, got a nested tensor",
    ),
    "padding without end": (
        dict(padding=2**31 - 1),
        ValueError,
        r"expected an output of less than 2\*\*59 values, got shape \[2, 6, 4294967298, 4294967298",
    ),
    "stride without end": (
        dict(weight=torch.randn(4, 6, 3, 2), transposed=True, stride=2**31 - 1),
        ValueError,
        r"expected an output of less than 2\*\*59 values",
    ),
    "padding by name": (
        dict(padding="same"),
        TypeError,
        "expected padding to be an int, or one for each spatial dim.*, got 'same'.*FusedConvBN2d",
    ),
    "eps of 0": (dict(eps=0), ValueError, "expected eps above 0 when training, got 0"),
    "huge stride": (
        dict(stride=2**62, padding=2**62),
        ValueError,
        "expected stride of at most 2147483647, got",
    ),
}


TRAINING_ONLY = (
    "one value for each channel",
    "running_mean with a gradient",
    "expanded running_var",
    "inference tensor",
    "counter's dtype",
    "counter's shape",
    "no counter",
    "synchronised tutorial",
    "eps of 0",
)


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", (True, False))
def test_bad_arguments(name, training):
    change, error, message = BAD[name]
    arguments = {"input": X, "weight": W, "training": training, **running(), **change}
    if not training and name in TRAINING_ONLY:
        conv_bn(**arguments)  # no error in eval mode
        return
    before = {
        n: t.clone() for n, t in arguments.items() if n.startswith("running") and t is not None
    }
    with pytest.raises(error, match=message):
        conv_bn(**arguments)
    for n, t in before.items():
        assert t.is_meta or torch.equal(arguments[n], t)


def test_quantised_input():
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    with pytest.raises(
        TypeError, match=r"expected input to be dense, got a quantised tensor($|\n)"
    ):
        conv_bn(x, W)


def test_wrong_python_types():
    with pytest.raises(TypeError, match=r"expected stride to be an int, or .*got 'two'"):
        conv_bn(X, W, stride="two")
    with pytest.raises(ValueError, match="weight to be a tensor, got an undefined one"):
        conv_bn(X, None)


def test_numpy_integers():
    """Alone and in a list, as arithmetic on shapes makes them."""
    two, one = np.int64(2), np.int32(1)
    expected = conv_bn(X, W, stride=2, padding=[1, 2], dilation=1, groups=1)
    got = conv_bn(X, W, stride=two, padding=[one, two], dilation=one, groups=np.int64(1))
    assert torch.equal(got, expected)


LAYER = {
    "activation": (
        dict(activation="swish"),
        ValueError,
        "expected activation None, one of 'none', 'relu', .* got 'swish'",
    ),
    "activation module": (dict(activation=nn.Softplus()), ValueError, r"got Softplus\("),
    "conv": (
        dict(conv=nn.Conv1d(3, 4, 2)),
        TypeError,
        "expected conv to be an nn.Conv2d, got Conv1d",
    ),
    "bn": (
        dict(bn=nn.GroupNorm(2, 4)),
        TypeError,
        "expected bn to be an nn.BatchNorm2d, got GroupNorm",
    ),
    "features, synchronised": (dict(bn=nn.SyncBatchNorm(5)), ValueError, "num_features, got 5"),
    "features": (
        dict(bn=nn.BatchNorm2d(5)),
        ValueError,
        r"out_channels of conv \(4\) as num_features, got 5",
    ),
}


@pytest.mark.parametrize("name", LAYER)
def test_bad_modules(name):
    change, error, message = LAYER[name]
    arguments = {"conv": nn.Conv2d(3, 4, 2), "bn": nn.BatchNorm2d(4), "activation": None, **change}
    with pytest.raises(error, match=message):
        FusedConvBN2d.from_modules(**arguments)


def test_children_are_checked_when_they_are_exchanged():
    layer = FusedConvBN2d(3, 4, 2)
    with pytest.raises(TypeError, match=r"expected bn to be .* got BatchNorm1d"):
        layer.bn = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="as num_features, got 5"):
        layer.bn = nn.SyncBatchNorm(5)
    assert "synchronised" not in repr(layer)
    with pytest.raises(TypeError, match=r"expected conv to be .* got Identity"):
        layer.conv = nn.Identity()
    with pytest.raises(ValueError, match="as num_features, got 5"):
        layer.bn = nn.BatchNorm2d(5)
    layer.conv = nn.Conv2d(3, 4, 3, stride=2)
    assert layer(torch.randn(2, 3, 7, 7)).shape == (2, 4, 3, 3)


def test_a_failed_call_does_not_count_a_batch():
    layer = FusedConvBN2d(4, 6, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="expected input of 4 dimensions"):
        layer(torch.randn(4, 3, 3))
    assert layer.bn.num_batches_tracked == 0
    assert torch.equal(layer.bn.running_mean, torch.zeros(6))


def test_output_size_out_of_reach():
    layer = FusedConvTransposeBN1d(4, 6, 3, stride=2)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(torch.randn(2, 4, 5), output_size=[99])
