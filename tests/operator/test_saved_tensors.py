"""Hooks on what is saved for backward: what they hand back may lie in memory in another way, they
may raise at any tensor, and torch.utils.checkpoint does."""

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, LAYOUTS, lay
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fusedconvbn
from fusedconvbn import FusedConvBN2d, FusedConvBNSequential, chain, conv_bn

ops = torch.ops.fusedconvbn


def padded(t: Tensor) -> Tensor:
    """With a gap behind each row."""
    return torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]] if t.dim() > 1 else t


RELAID = {name: lambda t, name=name: lay(t, name) for name in LAYOUTS if name != "expanded"}
RELAID["padded"] = padded


def conv_bn_call(name):
    case = CASES[name]

    def make():
        tensors = case.tensors(channels_last="channels" in name)
        return list(tensors.values()), lambda: conv_bn(**tensors, **case.options)

    return make


def chain_call(saved):
    def make():
        torch.manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

        x, residual = draw(2, 3, 5, 6), draw(2, 16, 5, 6)
        links = [
            chain.Norm(draw(3), draw(3), activation="silu"),
            chain.Conv(draw(4, 3, 3, 3), padding=[1, 1]),
            chain.Norm(draw(4), draw(4), activation="relu"),
            chain.Gate(draw(2, 4, 1, 1)),
            chain.Prelu(draw(4)),
            chain.Conv(draw(16, 4, 1, 1)),
            chain.Norm(draw(16), draw(16), residual, activation="relu"),
        ]
        packed = chain.pack([x[:, :1], x[:, 1:]], links)
        return [x, *packed.tensors[2:]], lambda: ops._chain_forward(
            packed.tensors, *packed.options, saved
        )[0]

    return make


def pool_call():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    return [x], lambda: ops.max_pool2d(x, [3, 3], [2, 2], [1, 1])


CALLS = {name: conv_bn_call(name) for name in CASES}
CALLS |= {f"chain, {saved} saved": chain_call(saved) for saved in ([], [2], [3, 5], [2, 5, 6], [6])}
CALLS["max pool"] = pool_call


def gradients(call, pack=lambda t: t, unpack=lambda t: t):
    tensors, forward = call()
    with saved_tensors_hooks(pack, unpack):
        out = forward()
    dout = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return torch.autograd.grad(out, tensors, dout)


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("layout", RELAID)
@pytest.mark.parametrize("name", CALLS)
def test_a_saved_tensor_comes_back_in_another_layout(name, layout):
    expected = gradients(CALLS[name])
    got = gradients(CALLS[name], unpack=RELAID[layout])
    for grad, due in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, due, rtol=1e-9, atol=1e-9)


OTHER = {
    "a value less": lambda t: t.narrow(-1, 0, t.size(-1) - 1) if t.dim() else t,
    "a dimension less": lambda t: t.flatten(-2) if t.dim() > 1 else t,
    "a sample more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t,
    "another dtype": lambda t: t.float() if t.is_floating_point() else t.int(),
    "no values": lambda t: t[:0] if t.dim() else t,
}


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("name", CALLS)
def test_another_tensor_in_the_place_of_a_saved_one(name, change):
    """Of each in turn: an error that is no internal one, or the right gradients."""
    expected = gradients(CALLS[name])
    count = 0

    def pack(t):
        nonlocal count
        count += 1
        return count, t

    for at in range(1, 100):
        count = 0
        try:
            got = gradients(
                CALLS[name], pack, lambda p, at=at: (OTHER[change](p[1]) if p[0] == at else p[1])
            )
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            assert "INTERNAL ASSERT" not in str(error)
        else:
            for grad, due in zip(got, expected, strict=True):
                torch.testing.assert_close(grad, due, rtol=1e-5, atol=1e-5, check_dtype=False)
        if at >= count:
            break


@pytest.mark.parametrize("groups", (1, 32), ids=("Winograd's", "depthwise"))
def test_shapes_that_do_not_fit_in_front_of_convolutions_of_our_own(groups):
    """They read memory by the shape of one tensor alone."""
    x = torch.randn(4, 32, 17, 16).to(memory_format=torch.channels_last)
    conv = chain.Conv(torch.randn(32, 32 // groups, 3, 3), padding=[1, 1], groups=groups)
    packed = chain.pack(x, [chain.Norm(activation="relu"), conv])
    out, (saved,), statistics = ops._chain_forward(packed.tensors, *packed.options, [1])
    for other in (torch.cat([saved, saved[:1]]), saved[:, :, 1:]):
        other = other.contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="expected the saved map 1 of shape"):
            ops._chain_backward(
                torch.ones_like(out),
                packed.tensors,
                [other],
                statistics,
                *packed.options,
                [1],
                [0, 1],
            )
    wide = torch.randn(32, 2 * conv.weight.size(1), 3, 3)
    packed = chain.pack(x, [chain.Conv(wide, padding=[1, 1], groups=groups)])
    with pytest.raises((ValueError, RuntimeError), match=r"expected a weight for|channels"):
        ops._chain_forward(packed.tensors, *packed.options, [])


@pytest.mark.parametrize(
    "strided", (lambda t: t.t().contiguous().t(), lambda t: t[:, :1].expand(-1, 4))
)
def test_statistics_of_another_layout(strided):
    """Of a caller's own: those of the input, and those that backward is given."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 5, 2), torch.randn(4)
    x[:] = x[:, :1]  # channels that are alike
    packed = chain.pack(x, [chain.Norm(weight, activation="silu")])
    out, _, (statistics,) = ops._chain_forward(packed.tensors, *packed.options, [])
    got, *_ = ops._chain_forward(packed.tensors, *packed.options, [], strided(statistics))
    torch.testing.assert_close(got, out)
    backward = [torch.ones_like(out), packed.tensors, []], [*packed.options, [], [0, 1]]
    due, found = (
        ops._chain_backward(*backward[0], [s], *backward[1])
        for s in (statistics, strided(statistics))
    )
    for grad, expected in zip(found, due, strict=True):
        torch.testing.assert_close(grad, expected)
    with pytest.raises(
        ValueError, match=r"statistics of a map of shape .* to be of shape \[2, 4\]"
    ):
        ops._chain_backward(*backward[0], [statistics[:1]], *backward[1])


# --------------------------------------------------------------------------------- hooks that raise


class Stop(Exception):
    pass


def stopping(at):
    """A hook that raises at its call number `at`, from 1; and how often it was called."""
    calls = [0]

    def hook(t):
        calls[0] += 1
        if calls[0] == at:
            raise Stop
        return t

    return hook, calls


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("when", ("pack", "unpack"))
def test_a_hook_that_raises_leaves_nothing_behind(name, when):
    for at in range(1, 100):
        hook, calls = stopping(at)

        def attempt(hook=hook):
            tensors, forward = CALLS[name]()
            alive = [weakref.ref(t) for t in tensors]
            with saved_tensors_hooks(
                *((hook, lambda t: t) if when == "pack" else (lambda t: t, hook))
            ):
                try:
                    forward().sum().backward()
                except Stop:
                    return alive, True
            return alive, False

        alive, stopped = attempt()
        if any(ref() is not None for ref in alive):
            gc.collect()
        assert all(ref() is None for ref in alive), f"at tensor {at}"
        assert stopped == (calls[0] >= at)
        if not stopped:
            assert at > 2
            break


def test_running_statistics_where_a_hook_raises():
    layer = FusedConvBN2d(3, 4, 3, activation="relu", momentum=None)
    block = FusedConvBNSequential(
        nn.Conv2d(4, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    )
    x = torch.randn(2, 3, 6, 5)
    for at in range(1, 100):
        for run in (
            lambda: layer(x, torch.ones(2, 4, 4, 3)),
            lambda: block(x.new_ones(2, 4, 3, 3), x.new_ones(2, 4, 3, 3)),
        ):
            before = [copy.deepcopy(m.state_dict()) for m in (layer, block)]
            hook, calls = stopping(at)
            try:
                with saved_tensors_hooks(hook, lambda t: t):
                    run()
            except Stop:
                for m, state in zip((layer, block), before, strict=True):
                    assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())
        if calls[0] < at:
            break
    assert at > 4


# --------------------------------------------------------------------------------------- checkpoint


class Block(nn.Module):
    """Two chains when it is fused, the last with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, momentum=None)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = y + y.mean((2, 3), keepdim=True)
        return torch.relu(self.bn2(self.conv2(y)) + x)


def run_checkpointed(model, x, **options):
    x = x.clone().requires_grad_()
    checkpoint(model, x, **options).sin().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("early_stop", (True, False))
@pytest.mark.parametrize("nested", (False, True))
def test_a_batch_that_is_checkpointed_counts_once(early_stop, nested):
    """Fused: the recomputation is no other batch. (Eager counts it twice.)"""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 5)
    plain = Block()
    fused = fusedconvbn.fuse(copy.deepcopy(plain), x)
    assert fusedconvbn.is_fused(fused)
    plain(x.clone().requires_grad_()).sin().sum().backward()
    run = fused if not nested else lambda x: checkpoint(fused, x, use_reentrant=False)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        y = x.clone().requires_grad_()
        checkpoint(run, y, use_reentrant=False).sin().sum().backward()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    for name, t in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), t)


def test_a_reentrant_checkpoint_counts_as_eager_does():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 5)
    plain = Block()
    fused = fusedconvbn.fuse(copy.deepcopy(plain), x)
    for model in (plain, fused):
        run_checkpointed(model, x, use_reentrant=True)
    assert fused.bn1.num_batches_tracked == 2
    for name, t in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), t)


def test_a_forward_inside_of_backward_counts():
    """Which is no recomputation: an auxiliary network that a hook trains."""
    layer, x = FusedConvBN2d(3, 4, 3), torch.randn(2, 3, 6, 5)
    t = torch.ones(2, requires_grad=True)
    t.register_hook(lambda grad: layer(x).sum() * 0 + grad)
    (2 * t).sum().backward()
    assert layer.bn.num_batches_tracked == 1


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096


def test_checkpointed_blocks_do_not_grow():
    layer = FusedConvBN2d(16, 16, 3, padding=1, activation="relu")
    x = torch.randn(8, 16, 96, 96, requires_grad=True)
    for step in range(15):
        if step == 5:
            gc.collect()
            before = resident()
        checkpoint(lambda: layer(x, x), use_reentrant=False).sum().backward()
    gc.collect()
    assert resident() - before < 4 * x.numel() * x.element_size()
