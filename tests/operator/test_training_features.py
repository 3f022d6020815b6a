"""What training scripts do around a layer: checkpoints, hooks, offloading, accumulation, averaging,
parametrisation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fusedconvbn import FusedConvBN2d
from fusedconvbn.activations import activation_module

ACTIVATIONS = pytest.mark.parametrize("activation", ("none", "relu", "silu"))
RESIDUAL = pytest.mark.parametrize("residual", (False, True), ids=("alone", "residual"))


class Layer(nn.Module):
    """One fused layer, or the same three modules in a row."""

    def __init__(self, fused, activation="relu", residual=False):
        super().__init__()
        torch.manual_seed(5)
        self.layer = FusedConvBN2d(4, 4, 3, padding=1, bias=True, activation=activation).double()
        self.is_fused, self.residual = fused, residual

    def forward(self, x):
        residual = x.sin() if self.residual else None
        if self.is_fused:
            return self.layer(x, residual)
        u = self.layer.bn(self.layer.conv(x))
        return activation_module(self.layer.activation)(u if residual is None else u + residual)


def draw():
    return torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)


def compare(use, *options, **tolerances):
    """`use` of the fused and of the unfused layer give the same; it returns tensors."""
    x, results = draw(), []
    for fused in (True, False):
        torch.manual_seed(7)
        results.append(use(Layer(fused, *options), x.detach().clone().requires_grad_()))
    torch.testing.assert_close(*results, **{"rtol": 1e-9, "atol": 1e-9, **tolerances})
    return results[0]


def backward(model, x, out):
    out.sin().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


# ----------------------------------------------------------------------- checkpoints, saved tensors


@ACTIVATIONS
@RESIDUAL
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint(activation, residual, use_reentrant):
    """Forward runs twice. With unfused layers the running statistics move twice; with fused ones
    only where autograd is entered anew (see test_saved_tensors.py)."""

    def use(model, x):
        with set_checkpoint_early_stop(False):
            out = checkpoint(lambda x: model(model(x)), x, use_reentrant=use_reentrant)
        assert model.layer.bn.num_batches_tracked == 2
        results = backward(model, x, out)
        if use_reentrant:
            return results
        assert model.layer.bn.num_batches_tracked == (2 if model.is_fused else 4)
        return results[: -len(list(model.buffers()))]

    results = compare(use, activation, residual)
    assert not use_reentrant or results[-1] == 4


def test_checkpoint_that_stops_early():
    """Where the last tensor has been saved the second forward is left."""

    def use(model, x):
        out = checkpoint(lambda x: model(model(x)), x, use_reentrant=False)
        return backward(model, x, out)[: -len(list(model.buffers()))]

    compare(use, "silu")
    x, once, model = draw(), Layer(True), Layer(True)
    once(x)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), once.buffers(), strict=True))


@ACTIVATIONS
@RESIDUAL
def test_saved_tensors_on_another_device(activation, residual):
    def use(model, x):
        with save_on_cpu():
            out = model(model(x))
        return backward(model, x, out)

    compare(use, activation, residual)


@ACTIVATIONS
@RESIDUAL
def test_saved_tensors_hooks(activation, residual):
    """What backward reads is what unpack gives back; here it comes in another memory format and as
    another object."""
    packed = []

    def use(model, x):
        def pack(t):
            packed.append(model.is_fused)
            return t.detach().clone().numpy().tobytes(), t.dtype, t.shape

        def unpack(p):
            t = torch.frombuffer(bytearray(p[0]), dtype=p[1]).reshape(p[2])
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

        with saved_tensors_hooks(pack, unpack):
            out = model(model(x))
        out.sin().sum().backward(retain_graph=True)
        return backward(model, x, out)

    compare(use, activation, residual)
    assert True in packed


# ------------------------------------------------------------------------------ gradients handed in
#
# The gradient of the result is written over where nobody else has it. These are ways to have it.


def test_backward_twice_over_a_retained_graph():
    def use(model, x):
        out = model(x) * 2
        for _ in range(3):
            out.sin().sum().backward(retain_graph=True)
        return [x.grad, *(p.grad for p in model.parameters())]

    compare(use, "silu", True)


def keep_in_hook(out, dout, kept):
    out.register_hook(lambda g: kept.append(g))


def keep_in_pre_hook(out, dout, kept):
    out.grad_fn.register_prehook(lambda grads: kept.extend(grads))


def keep_by_retain_grad(out, dout, kept):
    out.retain_grad()
    kept.append(out)


def keep_a_view_in_hook(out, dout, kept):
    out.register_hook(lambda g: kept.append(g[1:, :, ::2].detach()))


def keep_the_storage_in_hook(out, dout, kept):
    out.register_hook(lambda g: kept.append(g.untyped_storage()))


def keep_an_array_in_hook(out, dout, kept):
    out.register_hook(lambda g: kept.append(g.numpy()))


def keep_by_replacing_hook(out, dout, kept):
    kept.append(dout.clone())
    out.register_hook(lambda g: kept[0])


def as_numbers(kept):
    t = kept.grad if isinstance(kept, torch.Tensor) and kept.grad_fn is not None else kept
    if isinstance(t, torch.UntypedStorage):
        t = torch.tensor([], dtype=torch.float64).set_(t)
    return torch.as_tensor(t).clone()


KEEPERS = (
    keep_in_hook,
    keep_in_pre_hook,
    keep_by_retain_grad,
    keep_a_view_in_hook,
    keep_the_storage_in_hook,
    keep_an_array_in_hook,
    keep_by_replacing_hook,
)


@ACTIVATIONS
@RESIDUAL
@pytest.mark.parametrize("keep", KEEPERS)
def test_a_gradient_that_somebody_keeps_is_not_written_to(keep, activation, residual):
    def use(model, x):
        kept, dout = [], torch.randn(3, 4, 5, 6, dtype=torch.float64)
        out = model(x)
        keep(out, dout, kept)
        (out * 1).backward(dout)
        assert kept
        return [as_numbers(kept[0]), x.grad, *(p.grad for p in model.parameters())]

    compare(use, activation, residual)


class KeepsWhatItReturns(torch.autograd.Function):
    kept: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        grad = dout.cos()
        KeepsWhatItReturns.kept.append(grad)
        return grad


class ReturnsWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(grad)
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return ctx.saved_tensors[0], None


@ACTIVATIONS
@RESIDUAL
def test_a_function_that_keeps_the_gradient_it_returned(activation, residual):
    def use(model, x):
        KeepsWhatItReturns.kept.clear()
        KeepsWhatItReturns.apply(model(x)).sin().sum().backward()
        return [*KeepsWhatItReturns.kept, x.grad, *(p.grad for p in model.parameters())]

    compare(use, activation, residual)

    def use_saved(model, x):
        grad = torch.randn(3, 4, 5, 6, dtype=torch.float64)
        out = ReturnsWhatItSaved.apply(model(x), grad)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return [grad, x.grad, *(p.grad for p in model.parameters())]

    compare(use_saved, activation, residual)


@ACTIVATIONS
@RESIDUAL
def test_one_gradient_tensor_for_several_results(activation, residual):
    def use(model, x):
        dout = torch.randn(3, 4, 5, 6, dtype=torch.float64)
        before = dout.clone()
        outs = [model(x), model(x * 2), model(x)]
        torch.autograd.backward(outs, [dout, dout, dout])
        # the sum hands one gradient to both of its terms
        first, second = model(x), model(x + 1)
        (first + second).backward(dout)
        outs[0].detach_()
        assert torch.equal(dout, before)
        return [x.grad, *(p.grad for p in model.parameters())]

    compare(use, activation, residual)


@ACTIVATIONS
@RESIDUAL
def test_gradient_of_the_result_itself(activation, residual):
    def use(model, x):
        out = model(x)
        needs_grad = [out, x, *model.parameters()]
        first = torch.autograd.grad((out * out.detach()).sum(), needs_grad, retain_graph=True)
        dout = torch.ones_like(out)
        second = torch.autograd.grad(out, needs_grad, dout)
        assert torch.equal(dout, torch.ones_like(out))
        return [*first, *second]

    compare(use, activation, residual)


@ACTIVATIONS
@RESIDUAL
@pytest.mark.parametrize(
    "reduce",
    [
        lambda out: out.sum(),
        lambda out: out.mean((2, 3)).square().sum(),
        lambda out: out[:, 1:3].square().sum() + out[0].sum(),
        lambda out: out.permute(0, 2, 3, 1).flatten(2)[..., 0].sum(),
        lambda out: torch.cat((out, out), 1).sin().sum(),
        lambda out: out.expand(2, 3, 4, 5, 6).sum(),
        lambda out: (out.detach() * out).sum() + out.abs().max(),
    ],
    ids=("sum", "mean", "slices", "permuted", "twice", "expanded", "max"),
)
def test_views_and_expanded_gradients(reduce, activation, residual):
    def use(model, x):
        reduce(model(x)).backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    compare(use, activation, residual)


def test_gradients_accumulate_over_micro_batches():
    """Also into the .grad of a residual that is itself a leaf, which the first backward may have
    handed over."""
    x, leaf = draw(), draw()
    layer = Layer(True, "none").layer
    grads = []
    for _ in range(3):
        layer(x, leaf).sin().sum().backward()
        grads.append(leaf.grad.clone())
    expected = torch.autograd.grad(
        (layer.bn(layer.conv(x)) + leaf).sin().sum(), (leaf, *layer.parameters())
    )
    torch.testing.assert_close(grads, [expected[0], 2 * expected[0], 3 * expected[0]])
    torch.testing.assert_close([p.grad / 3 for p in layer.parameters()], list(expected[1:]))


def test_a_leaf_residual_has_a_gradient_of_its_own():
    """The gradient of the residual is also what backward goes on with: writing to .grad must not
    reach anything else."""
    for activation in ("none", "relu", "silu"):
        x, first, second = draw(), draw(), draw()
        layer = Layer(True, activation).layer
        out = layer(layer(x, first), second)
        out.retain_grad()
        out.sin().sum().backward()
        expected = out.grad.clone(), second.grad.clone(), x.grad.clone()
        first.grad.zero_()
        torch.testing.assert_close((out.grad, second.grad, x.grad), expected, rtol=0, atol=0)
        second.grad.zero_()
        torch.testing.assert_close((out.grad, x.grad), (expected[0], expected[2]), rtol=0, atol=0)


# -------------------------------------------------------------------------------- modules and hooks


def test_state_dict_both_ways():
    """The keys of the children are theirs, so a plain model's state goes in after renaming, and out
    again."""
    fused = nn.Sequential(FusedConvBN2d(3, 4, 3), FusedConvBN2d(4, 5, 3, bias=True))

    class Plain(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(*args, **kwargs), nn.BatchNorm2d(args[1])

        def forward(self, x):
            return self.bn(self.conv(x))

    plain = nn.Sequential(Plain(3, 4, 3, bias=False), Plain(4, 5, 3))
    x = torch.randn(2, 3, 8, 7)
    plain(x)  # moves the running statistics
    fused.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    fused.train()(x)
    plain.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), fused.eval()(x), rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == list(plain.state_dict())


def test_deepcopy_is_independent():
    model = Layer(True)
    twin = copy.deepcopy(model)
    x = draw()
    model(x).sum().backward()
    assert all(p.grad is None for p in twin.parameters())
    assert twin.layer.bn.num_batches_tracked == 0
    before = twin(x).detach()
    with torch.no_grad():
        model.layer.conv.weight.zero_()
    assert torch.equal(twin(x), before)


def test_exponential_moving_average_and_update_bn():
    def use(model, x):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(x + step).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        update_bn([x.detach() * k for k in (1, 2, 3)], average)
        assert average.module.layer.bn.momentum == 0.1
        return [*average.parameters(), *average.module.buffers(), average.eval()(x)]

    compare(use, "silu")


@pytest.mark.parametrize("parametrization", ("weight_norm", "spectral_norm"))
def test_parametrised_weight(parametrization):
    def use(model, x):
        getattr(parametrizations, parametrization)(model.layer.conv)
        results = backward(model, x, model(x))
        state = model.state_dict()
        parametrize.remove_parametrizations(model.layer.conv, "weight")
        return [*results, *state.values(), model.eval()(x)]

    compare(use, "relu")


def test_parametrised_with_a_cache():
    """Under `parametrize.cached` two layers read one weight, made once."""

    def use(model, x):
        parametrizations.weight_norm(model.layer.conv)
        with parametrize.cached():
            out = model(model(x))
        return backward(model, x, out)

    compare(use, "silu")


def test_hooks_on_the_layer():
    """Forward hooks see and change arguments and result, backward hooks the gradients. Hooks on its
    children are not run."""
    layer, x, calls = Layer(True, "relu").layer, draw(), []
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2,), {**kwargs, "residual": args[0]}), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, out: calls.append(out) or out + 1)
    layer.register_full_backward_pre_hook(lambda m, grad: calls.append(grad[0]))
    layer.register_full_backward_hook(lambda m, din, dout: calls.append(din[0]) or (din[0] * 3,))
    handles = [c.register_forward_hook(lambda *_: calls.append("child")) for c in layer.children()]
    out = layer(x)
    assert len(calls) == 1
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    assert len(calls) == 3
    for handle in handles:
        handle.remove()

    doubled, residual = (x * 2).detach().requires_grad_(), x.detach()
    expected = F.relu(layer.bn(layer.conv(doubled)) + residual)
    torch.testing.assert_close(calls[0], expected)
    torch.testing.assert_close(out, expected + 1)
    dout = (expected + 1).cos().detach()
    torch.testing.assert_close(calls[1], dout)
    (din,) = torch.autograd.grad(expected, doubled, dout)
    torch.testing.assert_close(calls[2], din)
    # times 3 by the hook, times 2 by the pre-hook; the residual was given as a keyword, which hooks
    # do not see
    torch.testing.assert_close(grad, 6 * din + dout * (expected > 0))


def test_optimizer_made_before_the_layers_are():
    """from_modules keeps the parameters, so an optimizer and its state go on."""
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double()
    twin = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (plain, twin)]
    x = draw().detach()
    models = [plain, twin]
    for step in range(4):
        if step == 2:
            models[1] = FusedConvBN2d.from_modules(*twin)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    torch.testing.assert_close(
        list(models[1].state_dict().values()), list(plain.state_dict().values())
    )


@pytest.mark.parametrize("clip", (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_))
def test_gradient_clipping(clip):
    def use(model, x):
        model(x).square().sum().backward()
        clip(model.parameters(), 0.3)
        return [p.grad for p in model.parameters()]

    compare(use, "silu", True)


def test_a_shared_weight():
    """One convolution in two layers, as in a detection head with a batch norm for each level."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    layers = [FusedConvBN2d.from_modules(conv, bn, "silu").double() for bn in norms]
    x = draw()
    needs_grad = [x, conv.weight, *(p for bn in norms for p in bn.parameters())]
    fused = sum(layer(x * k).sin().sum() for k, layer in enumerate(layers, 1))
    plain = sum(F.silu(bn(conv(x * k))).sin().sum() for k, bn in enumerate(norms, 1))
    results = [torch.autograd.grad(loss, needs_grad) for loss in (fused, plain)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
