"""torch.export, AOTInductor and ONNX: the exported model runs, agrees, and has nothing in it that
needs this package where it need not."""

import copy
import re
import subprocess
import sys
import zipfile
from collections import Counter

import onnxruntime
import pytest
import torch
from deployed import Activations, Network, random_statistics
from torch import nn
from torch.testing import assert_close

import fusedconvbn
from fusedconvbn import FusedConvBN1d, FusedConvBN2d, FusedConvBN3d

BATCH = torch.export.Dim("batch", min=2, max=64)
# registering a tree type in torch itself
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(
        str(node.target) for node in program.graph_module.graph.nodes if node.op == "call_function"
    )


def export(model, x, dynamic):
    return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},) if dynamic else None)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("decomposed", (False, True), ids=("composite", "decomposed"))
def test_exported_training(dynamic, decomposed):
    """Two steps of the exported program: results, running statistics and, before decomposition,
    gradients."""
    model = Network().double()
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    program = export(copy.deepcopy(model), x, dynamic)
    assert operators(program) == {"fusedconvbn.conv_bn.default": 4}
    if decomposed:
        program = program.run_decompositions()
        found = operators(program)
        # the frozen layer is a plain convolution; the others are chains
        assert found["fusedconvbn._chain_forward.default"] == 3
        assert found["aten.convolution.default"] == 1
        assert "fusedconvbn.conv_bn.default" not in found
    exported = program.module()
    for batch in (6, 3) if dynamic else (4, 4):
        x = torch.randn(batch, 3, 7, 6, dtype=torch.float64)
        out, expected = exported(x), model(x)
        assert_close(out, expected)
        if not decomposed:
            out.square().sum().backward(), expected.square().sum().backward()
    parameters = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        assert_close(parameters[name].grad, p.grad)
    assert_close(dict(exported.state_dict()), dict(model.state_dict()))
    assert model.tail.bn.num_batches_tracked == 2


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("network", (Network, Activations))
def test_exported_evaluation(network, dynamic, tmp_path):
    model = network().double().eval()
    x, other = (torch.randn(b, 3 + (network is Activations), 7, 6).double() for b in (4, 7))
    program = export(model, x, dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    decomposed = program.run_decompositions()
    found = operators(decomposed)
    layers = len([m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    assert found["aten.convolution.default"] == layers
    assert not [name for name in found if "fusedconvbn" in name or "batch_norm" in name]
    for exported in (program, decomposed):
        for y in (x, other) if dynamic else (x,):
            assert_close(exported.module()(y), model(y))


WITHOUT_THE_PACKAGE = """
import sys, torch
sys.modules["fusedconvbn"] = None  # an import of it fails
x, expected = torch.load("data.pt")
torch.testing.assert_close(torch._inductor.aoti_load_package("model.pt2")(x), expected)
"""


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    """Ahead of time compiled, a model for evaluation runs without the package: no operator of it is
    left."""
    model = Network().eval()
    x = torch.randn(4, 3, 7, 6)
    path = torch._inductor.aoti_compile_and_package(
        export(model, x, dynamic=True), package_path=str(tmp_path / "model.pt2")
    )
    with zipfile.ZipFile(path) as package:
        code = b"".join(package.read(n) for n in package.namelist() if n.endswith((".cpp", ".so")))
    assert b"convolution" in code
    assert not re.search(rb"fusedconvbn(::|\.)", code)  # a path of the sources may be there
    loaded = torch._inductor.aoti_load_package(path)
    for batch in (4, 5):
        x = torch.randn(batch, 3, 7, 6)
        assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    torch.save((x, loaded(x)), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE], check=True, cwd=tmp_path)


def run_onnx(program, *inputs):
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    values = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, values)[0])


def nodes(program):
    graph = program.model_proto.graph
    assert not program.model_proto.functions
    assert {node.domain for node in graph.node} == {""}  # of the ONNX standard
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("folded", (False, True), ids=("as it is", "folded"))
def test_onnx(folded):
    """Every activation, with and without a residual, and a transposed layer, for any batch size."""
    model = Activations().eval()
    x, other = torch.randn(3, 4, 7, 6), torch.randn(5, 4, 7, 6)
    exported = fusedconvbn.fold(model, keep_signature=True) if folded else model
    program = torch.onnx.export(
        exported, (x,), dynamo=True, dynamic_shapes={"x": {0: "batch"}}, verbose=False
    )
    found = nodes(program)
    assert found["Conv"] == len(model.layers) + 1
    assert found["ConvTranspose"] == 1
    assert found["Add"] == len(model.layers) // 2
    assert "BatchNormalization" not in found
    expected = {"Relu", "Clip", "LeakyRelu", "Elu", "Sigmoid", "HardSwish", "Gelu", "Mish", "Tanh"}
    assert expected <= set(found)
    for y in (x, other):
        assert_close(run_onnx(program, y), model(y).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", (FusedConvBN1d, FusedConvBN2d, FusedConvBN3d))
def test_onnx_of_a_layer_with_a_residual(layer):
    n = int(layer.__name__[-2])
    model = random_statistics(layer(4, 4, 3, padding="same", bias=True, activation="silu")).eval()
    inputs = [torch.randn(2, 4, *range(4, 4 + n)) for _ in range(2)]
    program = torch.onnx.export(model, tuple(inputs), dynamo=True, verbose=False)
    assert set(nodes(program)) == {"Conv", "Add", "Sigmoid", "Mul"}
    assert_close(run_onnx(program, *inputs), model(*inputs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_older_onnx_exporter_takes_a_folded_model(tmp_path):
    model, x = FusedConvBN2d(3, 4, 3, activation="relu").eval(), torch.randn(2, 3, 5, 6)
    path = tmp_path / "model.onnx"
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="fusedconvbn::conv_bn"):
        torch.onnx.export(model, (x,), path, dynamo=False)
    torch.onnx.export(fusedconvbn.fold(model, keep_signature=True), (x,), path, dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [i.name for i in session.get_inputs()]
    assert_close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x).detach())
