"""check_recompute finds what was changed behind autograd's back, and nothing else."""

import contextlib
import threading

import pytest
import torch
from cases import CASES, DTYPES
from torch import nn

import fusedconvbn
from fusedconvbn import FusedConvBN, FusedConvBN2d, conv_bn, recompute_check


@pytest.fixture
def checked():
    fusedconvbn.check_recompute(True)
    yield
    assert not recompute_check._running.stack
    fusedconvbn.check_recompute(False)


class Block(nn.Module):
    def __init__(self, activation="relu"):
        super().__init__()
        self.conv1 = FusedConvBN2d(3, 4, 3, padding=1, activation=activation)
        self.conv2 = nn.Sequential(FusedConvBN2d(4, 3, 3, padding=1, activation="silu"))

    def forward(self, x):
        return self.conv2(self.conv1(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = FusedConvBN2d(2, 3, 3, padding=1)
        self.layer1 = nn.Sequential(Block(), Block("gelu"))
        self.head = FusedConvBN(3, 2, 3)

    def forward(self, x):
        return self.head(self.layer1(self.stem(x)))


def image(channels=2):
    return torch.randn(2, channels, 7, 6)


@pytest.mark.parametrize(
    "name", ("stem", "layer1.0.conv1", "layer1.1.conv1", "layer1.1.conv2.0", "head")
)
@pytest.mark.parametrize("what", ("input", "weight"))
def test_a_change_is_found_and_the_layer_named(checked, name, what):
    model = Model()
    layer = model.get_submodule(name)
    inputs = {}
    layer.register_forward_pre_hook(lambda _, args: inputs.update(input=args[0]))
    loss = model(image()).square().sum()
    weight = layer.conv_weight if name == "head" else layer.conv.weight
    (inputs["input"] if what == "input" else weight).data.mul_(1.001)
    with pytest.raises(
        RuntimeError, match=rf"^check_recompute: {name}: the statistics of \d of \d"
    ):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_a_small_change_of_one_channel_is_found(checked, dtype, channels_last):
    tensors = CASES["2d wide"].tensors(dtype, channels_last)
    out = conv_bn(**tensors, **CASES["2d wide"].options)
    tensors["weight"].data[5].mul_(1.02)
    with pytest.raises(RuntimeError, match="the statistics of 1 of 70 channels"):
        out.sum().backward()


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("threads", ((1, 1), (1, 2), (2, 1)))
def test_a_clean_step_raises_nothing(checked, dtype, channels_last, threads, device):
    for case in CASES.values():
        tensors = case.tensors(dtype, channels_last, device)
        torch.set_num_threads(threads[0])
        out = conv_bn(**tensors, **case.options)
        torch.set_num_threads(threads[1])
        out.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", (100.0, 1e4))
def test_a_clean_step_far_from_zero_raises_nothing(checked, dtype, mean, device):
    if dtype == torch.float16 and mean > 1e3:
        pytest.skip("not a float16")
    x = (torch.randn(4, 8, 20, 20) + mean).to(device, dtype).requires_grad_()
    w = (torch.randn(6, 8, 3, 3) / 10).to(device, dtype).requires_grad_()
    torch.set_num_threads(1)
    out = conv_bn(x, w)
    torch.set_num_threads(2)
    out.square().sum().backward()


def rounded(t, bits):
    """To so many bits of a float32's 24."""
    whole = t.view(torch.int32)
    return ((whole + (1 << (23 - bits))) >> (24 - bits) << (24 - bits)).view(torch.float32)


@pytest.mark.parametrize("mean", (0.0, 0.4, 100.0))
@pytest.mark.parametrize(("precision", "bits"), (("tf32", 11), ("bf16", 8)))
def test_operands_that_one_of_two_algorithms_rounds(checked, precision, bits, mean):
    """Backward's convolution here is exact where forward's had rounded operands, as cuDNN's may be
    with TF32."""
    x, w = torch.randn(4, 16, 12, 11) + mean, torch.randn(8, 16, 3, 3).requires_grad_()

    def step():
        weight = w.detach().clone().requires_grad_()
        image = rounded(x, bits)
        weight.data = rounded(weight.data, bits)
        out = conv_bn(image, weight, activation="relu")
        image.data.copy_(x)
        weight.data.copy_(w.data)
        out.square().sum().backward()

    with pytest.raises(RuntimeError, match="are not those of forward"):
        step()
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = precision
    try:
        step()
        with pytest.raises(RuntimeError, match="are not those of forward"):
            change_and_run_backward(conv_bn(x, w), w)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before


@pytest.mark.parametrize("values", (7, 1000))
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_a_value_rounded_the_other_way_raises_nothing(checked, dtype, values):
    """As where another algorithm's float32 sum lies on the other side of the middle between two
    values."""
    x = torch.randn(values, 3, 1, 1).to(dtype)
    w = torch.eye(3, dtype=dtype)[:, :, None, None].contiguous().requires_grad_()
    out = conv_bn(x, w, activation="silu")
    largest = x.abs().argmax(0, keepdim=True)
    neighbour = torch.nextafter(x, 2 * x) if dtype == torch.bfloat16 else x * (1 + 2**-10)
    x.data.scatter_(0, largest, neighbour.gather(0, largest))
    out.square().sum().backward()


def test_off_is_off():
    for _ in range(2):
        fusedconvbn.check_recompute()
        fusedconvbn.check_recompute(False)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    x, model = image(), Model()
    loss = model(x).sum()
    x.data.zero_()
    loss.backward()


def test_on_twice_has_one_pair_of_hooks(checked):
    fusedconvbn.check_recompute(True)
    assert len(nn.modules.module._global_forward_hooks) == 1
    assert len(nn.modules.module._global_forward_pre_hooks) == 1


def test_switched_on_between_forward_and_backward():
    model, x = Model(), image()
    model(x).sum().backward()
    loss = model(x).sum()
    fusedconvbn.check_recompute(True)
    try:
        x.data.zero_()
        with pytest.raises(RuntimeError, match=r"^check_recompute: .*: the statistics of 3 of 3"):
            loss.backward()
    finally:
        fusedconvbn.check_recompute(False)


class WithFunction(nn.Module):
    """Calls the function itself, after a layer."""

    def __init__(self):
        super().__init__()
        self.layer = FusedConvBN2d(2, 3, 3)
        self.weight = nn.Parameter(torch.randn(4, 3, 2, 2))

    def forward(self, x):
        return conv_bn(self.layer(x), self.weight)


def change_and_run_backward(out, weight):
    weight.data.add_(0.1 * torch.randn_like(weight))
    out.square().sum().backward()


def test_the_function_is_named_after_the_module_that_calls_it(checked):
    model = nn.Sequential(FusedConvBN2d(2, 2, 1), WithFunction())
    with pytest.raises(RuntimeError, match=r"^check_recompute: 1: the statistics"):
        change_and_run_backward(model(image()), model[1].weight)
    with pytest.raises(RuntimeError, match=r"^check_recompute: 1.layer: the statistics"):
        change_and_run_backward(model(image()), model[1].layer.conv.weight)


def test_the_function_alone_has_the_name_of_the_operator(checked):
    model = Model()
    model(image())
    w = torch.randn(3, 2, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^check_recompute: conv_bn: the statistics"):
        change_and_run_backward(conv_bn(image(), w), w)


def test_the_function_alone_after_a_backward_has_the_name_of_the_operator(checked):
    Model()(image()).sum().backward()
    w = torch.randn(3, 2, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^check_recompute: conv_bn: the statistics"):
        change_and_run_backward(conv_bn(image(), w), w)


def test_a_layer_alone_has_the_name_of_its_class(checked):
    for layer in (FusedConvBN2d(2, 3, 3), FusedConvBN(2, 3, 3)):
        weight = next(layer.parameters())
        with pytest.raises(RuntimeError, match=rf"^check_recompute: {type(layer).__name__}: "):
            change_and_run_backward(layer(image()), weight)


def test_a_scripted_model(checked):
    scripted = torch.jit.script(Model())
    with pytest.raises(RuntimeError, match="check_recompute: Model: the statistics of"):
        change_and_run_backward(scripted(image()), scripted.stem.conv.weight)
    model = nn.ModuleDict({"a": torch.jit.script(Block()), "b": FusedConvBN2d(3, 3, 1)})
    model.forward = lambda x: model["b"](model["a"](x))
    with pytest.raises(RuntimeError, match="check_recompute: a: the statistics of"):
        change_and_run_backward(model(image(3)), model["a"].conv1.conv.weight)


def test_a_module_that_raises_does_not_disturb_the_names(checked):
    model = Model()
    with pytest.raises(ValueError, match="expected"):
        model(image(channels=5))
    assert not recompute_check._running.stack

    class Forgiving(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.model = FusedConvBN2d(9, 3, 3), Model()

        def forward(self, x):
            for _ in range(2):
                with contextlib.suppress(ValueError):
                    self.broken(x)
            return self.model(x)

    model = Forgiving()
    with pytest.raises(RuntimeError, match=r"^check_recompute: model.layer1.1.conv1: the stat"):
        change_and_run_backward(model(image()), model.model.layer1[1].conv1.conv.weight)


def test_threads_have_names_of_their_own(checked):
    """As in nn.DataParallel: one model's replicas at the same time, in threads."""
    messages, ready = {}, threading.Barrier(2)

    def both_are_inside(*_):
        ready.wait()

    def run(name):
        model = nn.ModuleDict({name: Model(), "other": FusedConvBN2d(2, 3, 3)})
        model.forward = lambda x: model[name](x)
        layer = model[name].layer1[0].conv1
        layer.register_forward_hook(both_are_inside)
        with pytest.raises(RuntimeError) as error:
            change_and_run_backward(model(image()), layer.conv.weight)
        messages[name] = str(error.value)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("left", "right"):
        assert messages[name].startswith(f"check_recompute: {name}.layer1.0.conv1: ")


@pytest.mark.parametrize("fullgraph", (False, True))
def test_a_compiled_model(checked, fullgraph):
    model = Block()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    x = image(3)
    expected = torch.autograd.grad(model(x).sum(), model.parameters())
    got = torch.autograd.grad(compiled(x).sum(), model.parameters())
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match=r"^check_recompute: "):
        change_and_run_backward(compiled(x), model.conv1.conv.weight)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpointed_block(checked, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    model = Model()
    h = model.stem(image()).detach().requires_grad_()
    out = checkpoint(model.layer1, h, use_reentrant=use_reentrant)
    model.head(out).sum().backward()
    out = model.head(checkpoint(model.layer1, h, use_reentrant=use_reentrant))
    with pytest.raises(RuntimeError, match=r"^check_recompute: FusedConvBN: "):
        change_and_run_backward(out, model.head.conv_weight)


def test_an_eval_step_raises_nothing(checked):
    model = Model().eval()
    model(image()).sum().backward()
