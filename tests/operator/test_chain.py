"""Chains of up to six links, under every plan."""

import pytest
import torch
from links import PATTERNS, differentiable, draw, links, plans, unfused

from fusedconvbn.chain import Conv, Gate, Norm, Prelu, pack

ops = torch.ops.fusedconvbn


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_plan_gives_the_unfused_gradients(pattern, device):
    chain, input = links(pattern), draw(2, 3, 4, 3)
    packed = pack(input, chain)
    expected_out = unfused(input, chain)
    dout = torch.randn_like(expected_out)
    expected = torch.autograd.grad(expected_out, differentiable(packed, chain), dout)
    tensors = [t.detach().to(device).requires_grad_(t.requires_grad) for t in packed.tensors]
    for saved in plans(len(chain)):
        out, maps, statistics = ops._chain_forward(tensors, *packed.options, saved)
        assert len(maps) == len(saved)
        assert len(statistics) == pattern.count("n") + pattern.count("f")
        torch.testing.assert_close(out.cpu(), expected_out)
        grads = torch.autograd.grad(out, [t for t in tensors if t.requires_grad], dout.to(device))
        for grad, value in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.cpu(), value, rtol=1e-8, atol=1e-8, msg=str(saved))


@pytest.mark.parametrize(
    "pattern", ("cnc", "ncn", "cncn", "dncnt", "cndncn", "gcn", "cfgdn", "cnrc", "nsn")
)
def test_gradcheck_under_every_plan(pattern):
    chain, input = links(pattern), draw(2, 3, 3, 2)
    packed = pack(input, chain)
    for saved in plans(len(chain)):

        def function(*tensors, saved=saved):
            return ops._chain_forward(tensors, *packed.options, saved)[0]

        assert torch.autograd.gradcheck(function, packed.tensors, fast_mode=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_gradient_alone(pattern, device):
    chain, input = links(pattern), draw(2, 3, 4, 3)
    packed = pack(input, chain)
    out = unfused(input, chain)
    dout = torch.randn_like(out)
    indices = [i for i, t in enumerate(packed.tensors) if t.requires_grad]
    expected = torch.autograd.grad(out, [packed.tensors[i] for i in indices], dout)
    for needs_grad, value in zip(indices, expected, strict=True):
        tensors = [t.detach().to(device) for t in packed.tensors]
        tensors[needs_grad].requires_grad_()
        out = ops._chain_forward(tensors, *packed.options, [])[0]
        (grad,) = torch.autograd.grad(out, tensors[needs_grad], dout.to(device))
        torch.testing.assert_close(grad.cpu(), value, rtol=1e-8, atol=1e-8, msg=str(needs_grad))


def known_statistics(tensors, packed, chain):
    """The statistics of the norms that use those of the batch, side by side."""
    norms = [link for link in chain if isinstance(link, Norm) and link.arithmetic != "none"]
    found = ops._chain_forward(tensors, *packed.options, [])[2]
    batch = [s for s, n in zip(found, norms, strict=True) if n.arithmetic != "running"]
    return torch.cat(batch, 1)


def test_known_statistics_are_not_computed(device):
    """They are used as they are, and those of some channels of a link are refused."""
    chain = links("ncn", 6)
    packed = pack(draw(2, 6, 4, 3), chain)
    tensors = [t.detach().to(device) for t in packed.tensors]
    known = known_statistics(tensors, packed, chain)
    out, _, statistics = ops._chain_forward(tensors, *packed.options, [], known)
    torch.testing.assert_close(torch.cat(statistics, 1), known, rtol=0, atol=0)
    torch.testing.assert_close(out, ops._chain_forward(tensors, *packed.options, [])[0])
    other = known * 2
    _, _, statistics = ops._chain_forward(tensors, *packed.options, [], other)
    torch.testing.assert_close(torch.cat(statistics, 1), other, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected statistics of the first norm links"):
        ops._chain_forward(tensors, *packed.options, [], known[:, :7])


PARTS = (1, 2, 3)  # channels


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("statistics", (False, True), ids=("", "known statistics"))
@pytest.mark.parametrize("pattern", ("ncn", "nc", "n", "cn", "cncn", "fcn"))
def test_a_list_is_a_virtual_concatenation(pattern, statistics, format, device):
    """The parts are saved, their concatenation is not; their gradients are those through
    torch.cat."""
    chain = links(pattern, sum(PARTS))
    parts = [draw(2, c, 4, 3).detach().to(memory_format=format).requires_grad_() for c in PARTS]
    packed = pack(parts, chain)
    expected_out = unfused(parts, chain)
    dout = torch.randn_like(expected_out)
    expected = torch.autograd.grad(expected_out, differentiable(packed, chain), dout)
    tensors = [t.detach().to(device).requires_grad_(t.requires_grad) for t in packed.tensors]
    given = None
    if statistics and pattern[0] == "n":  # those of the first norm
        given = torch.cat([ops._channel_stats(t, "") for t in tensors[: len(parts)]], 1)
    elif statistics:
        given = known_statistics(tensors, packed, chain)
    for saved in plans(len(chain)):
        saved = []

        def save(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            out = ops._chain_forward(tensors, *packed.options, saved, given)[0]
        assert all(t.shape[:2] != (2, sum(PARTS)) or t.dim() != 4 for t in saved[: len(tensors)])
        torch.testing.assert_close(out.cpu(), expected_out)
        grads = torch.autograd.grad(out, [t for t in tensors if t.requires_grad], dout.to(device))
        for grad, value in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.cpu(), value, rtol=1e-8, atol=1e-8, msg=str(saved))
    for needs_grad in range(len(parts)):  # one part's gradient alone, and the second derivative
        one = [t.detach().requires_grad_(i == needs_grad) for i, t in enumerate(tensors)]
        out = ops._chain_forward(one, *packed.options, [])[0]
        (grad,) = torch.autograd.grad(out, one[needs_grad], dout.to(device))
        torch.testing.assert_close(grad.cpu(), expected[needs_grad], rtol=1e-8, atol=1e-8)
    inputs = [t for t in packed.tensors if t.requires_grad]
    assert torch.autograd.gradgradcheck(
        lambda *_: ops._chain_forward(packed.tensors, *packed.options, [])[0],
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize("shape", [(3, 5, 1, 1), (3, 5, 4, 6), (3, 1, 4, 6), (3, 5, 7)])
@pytest.mark.parametrize("format", ("contiguous", "channels_last"))
def test_a_gates_gradients(shape, format, device):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    if format == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    s = torch.randn(*shape[:2], *(1 for _ in shape[2:]), dtype=torch.float64, device=device)
    x, s = x.requires_grad_(), s.requires_grad_()
    packed = pack(x, [Gate(s)])
    assert torch.autograd.gradcheck(
        lambda x, s: ops._chain_forward([x, s], *packed.options, [])[0], (x, s)
    )


def test_gradients_of_one_call_share_no_memory():
    """An operator's results are its own, though the gradient of a residual is that of the map
    too."""
    for activation in ("none", "relu", "silu"):
        for arithmetic in ("batchnorm", "none"):
            norm = Norm(residual=draw(2, 3, 4, 3), arithmetic=arithmetic, activation=activation)
            packed = pack(draw(2, 3, 4, 3), [norm])
            tensors = [t.detach() for t in packed.tensors]
            out, _, statistics = ops._chain_forward(tensors, *packed.options, [])
            dout = torch.randn_like(out)
            grads = ops._chain_backward(dout, tensors, [], statistics, *packed.options, [], [0, 1])
            assert len({t.data_ptr() for t in (dout, *grads, *tensors)}) == 3 + len(tensors)


@pytest.mark.parametrize("activation", ("relu", "silu"))
@pytest.mark.parametrize("create_graph", (False, True))
def test_a_result_that_is_kept_for_any_activation(activation, create_graph):
    norm = Norm(draw(4), draw(4), draw(2, 4, 5, 3), activation=activation)
    packed = pack(draw(2, 3, 4, 3), [Conv(draw(4, 3, 2, 1), padding=(1, 0)), norm])
    grads = []
    for saved in ([], [2]):
        out = ops._chain_forward(packed.tensors, *packed.options, saved)[0]
        dout = torch.ones_like(out) * 0.7
        grads.append(torch.autograd.grad(out, packed.tensors, dout, create_graph=create_graph))
    torch.testing.assert_close(*grads)


def test_what_was_kept_is_not_written_to():
    chain, input = links("cncn"), draw(2, 3, 4, 3)
    packed = pack(input, chain)
    out, maps, _ = ops._chain_forward(packed.tensors, *packed.options, [1, 2, 3])
    before = [t.clone() for t in maps]
    first = torch.autograd.grad(out.sum(), packed.tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), packed.tensors)
    assert all(torch.equal(a, b) for a, b in zip(maps, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(links=[0, 0, 0]), "ends inside a link"),
        (dict(links=[7, 0, 0, 0, 0, 0]), "ends inside a link or names what there is not"),
        (dict(scalars=[]), "malformed chain"),
        (dict(saved=[3]), "expected `saved` between 1 and 2"),
        (dict(saved=[0]), "expected `saved` between 1 and 2, ascending, got"),
        (dict(tensors=2), "malformed chain"),
        (dict(links=[0, 0, 0, 1, 2, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0]), "malformed chain"),
        (dict(links=[1, 0, 0, 0, 3, 0], tensors=1), "malformed chain"),
        (dict(links=[1, 0, 0, 0, 0, 12], tensors=1), "malformed chain"),
    ],
)
def test_malformed_chains(change, message):
    packed = pack(draw(2, 3, 4, 3), links("cn"))
    tensors = packed.tensors[: change.get("tensors")]
    for device in ("cpu", "meta"):
        arguments = (
            dict(
                tensors=tensors,
                links=packed.links,
                scalars=packed.scalars,
                process_group="",
                saved=[],
            )
            | change
        )
        arguments["tensors"] = [t.to(device) for t in tensors]
        with pytest.raises(ValueError, match=message):
            ops._chain_forward(**arguments)


BACKWARD = {
    "dout of another shape": (
        dict(dout=torch.zeros(2, 4, 5, 4)),
        "expected a gradient like the output",
    ),
    "dout of another dtype": (
        dict(dout=torch.zeros(2, 4, 5, 3)),
        "expected a gradient like the output",
    ),
    "statistics missing": (dict(statistics=[]), "got 0 statistics for 1 norm links"),
    "statistics of another shape": (
        dict(statistics=[torch.zeros(2, 9)]),
        "expected the statistics",
    ),
    "statistics of another dtype": (
        dict(statistics=[torch.zeros(2, 4)]),
        "expected the statistics",
    ),
    "saved maps missing": (dict(saved=[1]), "got 0 saved maps for 1 indices"),
    "needs_grad": (dict(needs_grad=[5]), "expected `needs_grad` between 0 and 3"),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_malformed_backward(name):
    change, message = BACKWARD[name]
    packed = pack(
        draw(2, 3, 4, 3), [Conv(draw(4, 3, 2, 1), padding=(1, 0)), Norm(draw(4), draw(4))]
    )
    tensors = [t.detach() for t in packed.tensors]
    out, _, statistics = ops._chain_forward(tensors, *packed.options, [])
    arguments = dict(
        dout=torch.ones_like(out),
        tensors=tensors,
        saved_maps=[],
        statistics=statistics,
        links=packed.links,
    )
    arguments |= dict(scalars=packed.scalars, process_group="", saved=[], needs_grad=[0]) | change
    with pytest.raises(ValueError, match=message):
        ops._chain_backward(**arguments)


@pytest.mark.parametrize("shape", [(0, 3, 4, 3), (2, 3, 0, 3), (2, 0, 4, 3), (3,)])
def test_a_norm_link_without_values(shape):
    packed = pack(torch.zeros(shape), [Norm()])
    with pytest.raises(ValueError, match=r"a norm link needs (values|channels), got shape"):
        ops._chain_forward(packed.tensors, *packed.options, [])


def test_norm_vectors_of_another_length():
    packed = pack(draw(2, 3, 4, 3), [Norm(draw(1), None)])
    with pytest.raises(ValueError, match="expected a vector of 3 values"):
        ops._chain_forward(packed.tensors, *packed.options, [])


SLOPES = r"link 1: expected slopes of shape \[1\] or \[5\], got "


@pytest.mark.parametrize(
    ("input", "chain", "message"),
    [
        ([5], [Norm(), Prelu(draw(2))], SLOPES + r"\[2\]"),
        ([5], [Norm(), Prelu(draw(1, 1))], SLOPES + r"\[1, 1\]"),
        (
            [5],
            [Norm(residual=draw(2, 5, 4, 3)), Norm()],
            "link 0: expected a residual at the last norm link alone",
        ),
        ([2, 3], [Gate(draw(2, 5, 1, 1)), Norm()], "expected one input in front of a gate, got 2"),
    ],
)
def test_errors_name_the_link(input, chain, message):
    packed = pack([draw(2, channels, 4, 3) for channels in input], chain)
    with pytest.raises(ValueError, match=message):
        ops.conv_bn_chain(*packed.call([]))
