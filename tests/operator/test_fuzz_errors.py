"""Random bad calls: each ends in an exception, which is no internal error, and changes nothing."""

import pytest
import torch
from fuzzing import calls, chain_calls, described, examples, layer_calls, modules_of, remember
from hypothesis import assume, event, given, reject
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedconvbn
from fusedconvbn import chain

pytestmark = pytest.mark.filterwarnings("ignore")
ops = torch.ops.fusedconvbn


# No int that makes an output of some gigabytes: too much, and yet what was asked for.
INTS = (-(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**64)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, -1e-300, 0.0, 1e308, 10**400)
STRINGS = (
    *("", "swish", "relu(", "relu(1)", "leaky_relu()", "leaky_relu(1e999)", "elu(nan)", "elu(0.5"),
    *("relu\0", "é" * 50, "\udc80", "none", "no such group"),
)
OTHERS = (
    None,
    True,
    "two",
    b"relu",
    object(),
    1j,
    [],
    [1] * 4,
    [-1, 2],
    [2**62] * 2,
    [None],
    {},
    int,
    nn.ReLU(),
)
TENSORS = {
    "meta": lambda t: t.to("meta"),
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64).conj(),
    "negative": lambda t: torch.complex(t, t).conj().imag,
    "float": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "fewer dimensions": lambda t: t.flatten(),
    "more dimensions": lambda t: t[None],
    "no dimension": lambda t: t.sum(),
    "empty": lambda t: t[:0] if t.dim() else t.new_empty(0),
    "longer": lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    "cut": lambda t: t.narrow(-1, 0, t.size(-1) - 1) if t.dim() and t.size(-1) else t,
    "expanded": lambda t: t.new_ones(()).expand(t.shape),
    "nan": lambda t: t * float("nan"),
    "inf": lambda t: t.abs() * float("inf"),
    "inference": torch.inference_mode()(lambda t: t.clone()),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "uninitialised": lambda t: nn.parameter.UninitializedParameter(),
    "without storage": lambda t: _without_storage(t),
}
# What may be raised; a SystemError, say, would be a bug.
ERRORS = (TypeError, ValueError, RuntimeError, OverflowError, IndexError)


def _without_storage(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def junk_for(value):
    """Something in the place of `value`: of its type more often than not."""
    if isinstance(value, Tensor):
        of_its_type = st.sampled_from(sorted(TENSORS)).map(lambda kind: (kind, None))
    elif isinstance(value, str):
        of_its_type = st.sampled_from(STRINGS).map(lambda v: ("", v))
    elif isinstance(value, float):
        of_its_type = st.sampled_from(FLOATS).map(lambda v: ("", v))
    elif isinstance(value, list):
        ints = st.sampled_from(INTS)
        of_its_type = (st.lists(ints, max_size=4) | ints).map(lambda v: ("", v))
    else:
        of_its_type = st.sampled_from(INTS).map(lambda v: ("", v))
    anything = st.sampled_from((*OTHERS, *INTS, *FLOATS, *STRINGS)).map(lambda v: ("", v))
    return of_its_type | of_its_type | anything


def replaced(value, junk):
    kind, other = junk
    try:
        return TENSORS[kind](value) if kind else other
    except RuntimeError:  # an int64 that requires grad, say, there is not
        reject()


def bits(t: Tensor) -> str:
    return repr(t.tolist())  # NaN is what it was, too


def backward_may_fail(out) -> None:
    try:
        if isinstance(out, Tensor) and out.requires_grad:
            out.sum().backward()
    except ERRORS as error:
        assert_is_no_internal_error(error)


def assert_is_no_internal_error(error: BaseException) -> None:
    assert "INTERNAL ASSERT" not in str(error), error


@examples(0.15)
@given(calls(), st.data())
def test_bad_arguments_raise_and_change_nothing(call, data):
    tensors, running, _ = call.tensors()
    for name in call.requires_grad & set(tensors):
        tensors[name] = tensors[name].clone().requires_grad_()
    arguments = tensors | running | call.options | {"momentum": call.momentum, "process_group": ""}
    for name in ("bias", "bn_weight", "bn_bias", "residual", *BUFFERS):
        arguments.setdefault(name, None)
    changed = data.draw(
        st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True)
    )
    for name in changed:
        arguments[name] = replaced(
            arguments[name], data.draw(junk_for(arguments[name]), label=name)
        )
    buffers = {n: arguments[n] for n in BUFFERS if n in running and n not in changed}
    before = {n: bits(t) for n, t in buffers.items()}
    remember({name: described(value) for name, value in arguments.items()})
    try:
        out = fusedconvbn.conv_bn(**arguments)
    except ERRORS as error:
        event("raised")
        assert_is_no_internal_error(error)
        for n, t in buffers.items():
            assert bits(t) == before[n], n
    else:
        event("accepted")
        backward_may_fail(out)


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@examples(0.05)
@given(layer_calls(), st.data())
def test_bad_layers_raise_and_change_nothing(call, data):
    torch.manual_seed(call.seed)
    layer_class, conv, bn = modules_of(call)
    layer = layer_class.from_modules(conv, bn, call.activation)
    x = torch.randn(call.geometry.input, dtype=torch.float64)
    changed = data.draw(st.sampled_from(("forward", "buffers", "options", "constructor")))
    arguments = {"input": x, "residual": None}
    if changed == "constructor":
        names = "in_channels out_channels kernel_size stride padding dilation groups eps momentum "
        names += "activation"
        options = {"in_channels": 4, "out_channels": 6, "kernel_size": 2}
        for name in data.draw(st.lists(st.sampled_from(names.split()), min_size=1, max_size=2)):
            options[name] = replaced(1, data.draw(junk_for(1), label=name))
        small = all(not isinstance(v, int) or abs(v) < 100 for v in options.values())
        assume(small)  # a weight of gigabytes is what was asked for
        try:
            layer, arguments["input"] = layer_class(**options), x.float()
        except (*ERRORS, AssertionError, AttributeError, ZeroDivisionError):  # nn.Conv*'s own
            return
    elif changed == "forward":
        arguments["input"] = replaced(x, data.draw(junk_for(x), label="input"))
        arguments["residual"] = replaced(x, data.draw(junk_for(x), label="residual"))
    else:
        where = {"buffers": layer.bn, "options": layer.conv}[changed]
        names = [*where._parameters, *where._buffers, "eps", "momentum", "groups"]
        name = data.draw(st.sampled_from([n for n in names if getattr(where, n, None) is not None]))
        junk = replaced(getattr(where, name), data.draw(junk_for(getattr(where, name)), label=name))
        try:
            delattr(where, name)
            setattr(where, name, junk)
        except (*ERRORS, KeyError):
            return
    buffers = {n: b for n, b in layer.bn._buffers.items() if isinstance(b, Tensor)}
    kept = {
        n: b for n, b in buffers.items() if b.layout == torch.strided and b.device.type == "cpu"
    }
    kept = {n: b for n, b in kept.items() if not b.is_quantized and b.untyped_storage().nbytes()}
    before = {n: bits(b) for n, b in kept.items()}
    try:
        out = layer(**arguments)
    except (*ERRORS, AttributeError) as error:
        assert_is_no_internal_error(error)
        for n, b in kept.items():
            assert bits(b) == before[n], n
    else:
        backward_may_fail(out)


def mangled(draw, values: list, junk) -> list:
    """`values` with some replaced, left out or put in."""
    values = list(values)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(values)))
        how = draw(st.sampled_from(("replace", "replace", "remove", "insert", "cut")))
        if how == "cut":
            values = values[:at]
        elif how == "insert" or at == len(values):
            values.insert(at, draw(junk))
        elif how == "remove":
            values.pop(at)
        else:
            values[at] = draw(junk)
    return values


@examples(0.1)
@given(chain_calls(), st.data())
def test_malformed_chains_raise(call, data):
    input, links = call.build()
    packed = chain.pack(input, links)
    device = data.draw(st.sampled_from(("cpu", "cpu", "meta")))
    ints, floats = st.sampled_from(INTS), st.sampled_from(FLOATS[:-1])
    kinds = st.sampled_from(sorted(TENSORS))
    arguments = {
        "tensors": [t.to(device) for t in packed.tensors],
        "links": packed.links,
        "scalars": packed.scalars,
        "process_group": "",
        "saved": list(call.saved),
    }

    def change(names):
        for name in data.draw(
            st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)
        ):
            value = arguments[name]
            if name in ("dout", "process_group"):
                arguments[name] = replaced(value, data.draw(junk_for(value), label=name))
            elif name in ("tensors", "saved_maps", "statistics"):
                tensor = value[0].cpu() if value else torch.zeros(2, 3)
                junk = kinds.map(lambda kind, t=tensor: replaced(t, (kind, None)))
                arguments[name] = mangled(data.draw, value, junk)
            else:
                arguments[name] = mangled(data.draw, value, floats if name == "scalars" else ints)

    in_backward = data.draw(st.booleans())
    if in_backward:
        out, maps, statistics = ops._chain_forward(**arguments)
        arguments |= {
            "dout": torch.ones_like(out),
            "saved_maps": maps + ([out] if len(links) in call.saved else []),
            "statistics": statistics,
            "needs_grad": [0, *range(call.parts, len(packed.tensors))],
        }
    try:
        if in_backward:
            change(sorted(arguments))
            remember({n: described(v) for n, v in arguments.items()})
            ops._chain_backward(**arguments)
        else:
            change(sorted(arguments))
            remember({n: described(v) for n, v in arguments.items()})
            out, *_ = ops._chain_forward(**arguments)
            backward_may_fail(out)
    except ERRORS as error:
        event("raised")
        assert_is_no_internal_error(error)
