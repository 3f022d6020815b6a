"""The command line: what it prints and writes, what it refuses before it works, and how it ends."""

import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedconvbn
from fusedconvbn import __main__ as command_line
from fusedconvbn import sources
from fusedconvbn.__main__ import main
from fusedconvbn.fusion import progress

pytestmark = pytest.mark.independent
PACKAGE = Path(fusedconvbn.__file__).parent

# What a user's file may have.
MODELS = """
from pathlib import Path

from fusing import unit
import torch
from torch import nn

HERE = Path(__file__).parent  # as many do, to find their configuration
assert HERE.is_absolute()


def net():
    return unit(3, 8)


def volumes():
    return nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU())


def plain():
    return nn.Conv2d(3, 8, 3)


def alone():
    return nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = unit(3, 8), nn.Linear(9, 9)

    def forward(self, x):
        return self.head(self.net(x).mean((2, 3)))


def of_width(width, depth=3):
    return unit(3, width)


def fails():
    raise KeyError("no weights\\nhere")


def three():
    return 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "made", raising=False)
    (tmp_path / "made.py").write_text(MODELS)
    return f"{tmp_path}/made.py"


def ends(arguments, capsys):
    """The exit status, the output and the errors of a command."""
    status = 0
    try:
        main(arguments if isinstance(arguments, list) else arguments.split())
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):  # as Python does at its end
            print(status, file=sys.stderr)
            status = 1
    said = capsys.readouterr()
    return status, said.out, said.err


# ----------------------------------------------------------------------------- the three commands


@pytest.mark.parametrize("arguments", ("info", ""))
def test_the_facts(arguments, capsys):
    status, out, _ = ends(arguments, capsys)
    assert status == 0 and str(PACKAGE) in out
    for name, value in fusedconvbn.build_info().items():
        assert f"  {name}: " in out
        assert str(value) in out or isinstance(value, tuple)
    assert ("usage: fusedconvbn" in out) is (not arguments)


def test_the_version(capsys):
    expected = f"fusedconvbn {fusedconvbn.__version__} (torch {torch.__version__})\n"
    assert ends("--version", capsys)[:2] == (0, expected)


def test_explain(capsys, tmp_path):
    drawn, numbers = tmp_path / "out.png", tmp_path / "out.json"
    status, out, err = ends(
        "explain torchvision:resnet18 --batch 2 --size 64 --budget 60% "
        f"--plot {drawn} --json {numbers}",
        capsys,
    )
    assert (status, err) == (0, "") and "20 of 20 pairs" in out
    report = json.loads(numbers.read_text())
    assert 0.5 < report["saved"] / report["eager"] <= 0.6
    assert drawn.stat().st_size > 10_000


def test_explain_says_that_a_budget_is_out_of_reach(capsys, models):
    status, out, _ = ends(f"explain {models}:net --size 16 --budget 0.001", capsys)
    assert status == 0 and "expected memory of at least" in out and "1 of 1 pairs" in out


def test_explain_takes_the_options_of_a_step(capsys, models, tmp_path):
    """Half of the bytes under autocast; a peak has the state of the optimizer."""
    numbers = tmp_path / "out.json"

    def eager(options):
        assert ends(f"explain {models}:net --size 64 --json {numbers} {options}", capsys)[0] == 0
        return json.loads(numbers.read_text())

    full, half = eager(""), eager("--dtype bfloat16")
    assert half["eager"] == pytest.approx(full["eager"] / 2, rel=0.01)
    assert eager("--batch 4")["eager"] == pytest.approx(full["eager"] / 2, rel=0.01)
    assert eager("--contiguous")["eager"] == full["eager"]
    whole = ["--size", "64", "--budget", "peak 4MB"]
    assert "1 of 1 pairs" in ends(["explain", f"{models}:net", *whole], capsys)[1]


def test_explain_takes_volumes(capsys, models):
    status, out, _ = ends(f"explain {models}:volumes --sample 1x8x8x8 --batch 2", capsys)
    assert status == 0 and "1 of 1 pairs" in out


def test_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fusedconvbn.fusion.fit"], "_PLANS", ("eager", "auto"))
    numbers = tmp_path / "out.json"
    status, out, err = ends(
        "fit torchvision:resnet18 --size 64 --memory 512MiB --optimizer adam --dtype bfloat16 "
        f"--device h200 --contiguous --json {numbers}",
        capsys,
    )
    assert (status, err) == (0, "")
    assert "resnet18, 3×64×64, bfloat16, optimizer adam, in 512.00 MiB" in out
    eager, auto = json.loads(numbers.read_text())["plans"]
    assert f"eager  {eager['batch']:6}" in out and "ms a sample, h200" in out
    assert auto["batch"] > eager["batch"] > 0


def test_fit_takes_volumes(capsys, models):
    status, out, _ = ends(f"fit {models}:volumes --sample 1x8x8x8 --memory 1000000", capsys)
    assert status == 0 and "1×8×8×8" in out


# ------------------------------------------------------------------------------------- what fails

USAGE = {
    "explain resnet18": "argument source: expected a source like torchvision:NAME",
    "explain a:b --batch 0": "--batch: expected a whole number of at least 1, got '0'",
    "explain a:b --size -3": "--size: expected",
    "explain a:b --channels three": "--channels: expected a whole number of at least 1, got 'th",
    "explain a:b --sample 3*8": "--sample: expected a shape like 3x224x224, got '3[*]8'",
    "explain a:b --sample 3x8x8 --size 8": "--sample: not allowed with --size or --channels",
    "explain a:b --budget much": '--budget: expected memory "auto", "min", a fraction',
    "explain a:b --budget 1": "--budget: expected memory .* write 1.0 or '100%' for a fraction",
    "explain a:b --budget 0%": "--budget: expected memory .* got 0.0",
    "explain a:b --budget nan": "--budget: expected memory .* got nan",
    "explain a:b --dtype float8": "--dtype: invalid choice: 'float8'",
    "explain a:b --optimizer lion": "--optimizer: invalid choice: 'lion'",
    "explain a:b --device tpu": "--device: ",
    "explain a:b --device meta": "--device: expected cpu or cuda, got 'meta'",
    "explain a:b --device cuda:77": "--device: expected a device that torch finds, got 'cuda:77'",
    "explain a:b --json /not/there.json": "--json: expected a folder that exists, got '/not/the",
    "explain a:b --json /": "--json: expected a file, got the folder '/'",
    "explain a:b --plot /not/there.png": "--plot: expected a folder that exists",
    "explain a:b --plot out.docx": "--plot: expected a name that ends in .*.png, .* got 'out.docx'",
    "explain a:b --plot out": "--plot: expected a name that ends in",
    "fit a:b": "the following arguments are required: --memory",
    "fit a:b --memory much": "--memory: fit: expected memory in bytes or a size like .* 'much'",
    "fit a:b --memory 0.5": "--memory: fit: expected memory in bytes or a size like .* '0.5'",
    "fit a:b --memory auto": "--memory: fit: expected memory in bytes or a size like .* 'auto'",
    "fit a:b --memory 1GiB --device tpu": "--device: invalid choice: 'tpu'",
    "shrink a:b": "invalid choice: 'shrink'",
}


@pytest.mark.parametrize("arguments", USAGE)
def test_arguments_are_checked_before_anything_is_done(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sources, "factory_of", None)
    status, out, err = ends(arguments, capsys)
    assert (status, out) == (2, "")
    with pytest.raises(ValueError, match=USAGE[arguments]):
        raise ValueError(err)


def test_a_file_that_cannot_be_written_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write
    status, _, err = ends(f"explain a:b --json {tmp_path}/out.json", capsys)
    assert status == 2 and "--json: expected a path that can be written" in err


def test_a_picture_needs_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    status, _, err = ends("explain a:b --plot out.png", capsys)
    assert status == 2 and "--plot: needs matplotlib, which is not installed" in err


FAILURES = {
    "explain MODELS:fails": "MODELS:fails raised KeyError: 'no weights\\nhere'",
    "explain MODELS:three": "expected MODELS:three to return an nn.Module, got int",
    "explain MODELS:of_width": "expected MODELS:of_width to need no arguments, got one that needs "
    "width: name a function that passes them",
    "explain MODELS:Broken": "the model raised RuntimeError: ",
    "explain torchvision:resnet5": "expected a model that torchvision has, got 'resnet5'; it has "
    "resnet50, ",
    "explain not_there:net": "the import of not_there failed: No module named 'not_there'",
    "fit MODELS:fails --memory 1GiB": "MODELS:fails raised KeyError",
    "fit torchvision:fasterrcnn_resnet50_fpn --memory 8GiB": "fit: expected a model whose forward "
    "takes one batch of samples, got torchvision:fasterrcnn_resnet50_fpn",
    "fit MODELS:net --memory 5KB": "fit: expected memory of at least",
}


@pytest.mark.parametrize("arguments", FAILURES)
def test_what_fails_is_said_in_a_sentence(arguments, capsys, models):
    status, out, err = ends(arguments.replace("MODELS", models), capsys)
    assert (status, out) == (1, "")
    (said,) = err.splitlines()
    assert said.startswith(f"fusedconvbn: {FAILURES[arguments].replace('MODELS', models)}")


def test_the_traceback_can_be_seen(capsys, models):
    status, _, err = ends(f"explain {models}:fails --traceback", capsys)
    assert status == 1 and "Traceback" in err and 'raise KeyError("no weights' in err
    assert err.splitlines()[-1].startswith(f"fusedconvbn: {models}:fails raised KeyError")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("explain MODELS:plain --size 16", "nothing of Conv2d is fused, it runs no batch norm"),
        ("explain MODELS:alone --size 16", "none of its 1 batch norms can be: "),
        ("fit MODELS:plain --size 16 --memory 1MiB", ":plain is fused, it runs no batch norm"),
    ],
)
def test_a_model_of_which_nothing_is_fused(arguments, why, capsys, models, tmp_path):
    numbers = tmp_path / "out.json"
    arguments = f"{arguments} --json {numbers}".replace("MODELS", models)
    status, out, err = ends(arguments, capsys)
    assert status == 1 and why in err and out  # the report comes all the same
    assert json.loads(numbers.read_text())["unfused"] in err


def test_results_are_written_before_the_picture(capsys, models, monkeypatch, tmp_path):
    def plot(self, path):
        raise OSError("no space left")

    monkeypatch.setattr(command_line.Report, "plot", plot)
    numbers = tmp_path / "out.json"
    status, out, err = ends(
        f"explain {models}:net --size 16 --json {numbers} --plot {tmp_path}/out.png", capsys
    )
    assert status == 1 and "OSError: no space left" in err
    assert "1 of 1 pairs" in out and json.loads(numbers.read_text())["pairs"] == 1


# ---------------------------------------------------------------------------------------- sources

TORCHVISION = {
    "inception_v3": (3, 299, 299),
    "r3d_18": (3, 16, 224, 224),
    "deeplabv3_resnet50": (3, 224, 224),
    "fasterrcnn_resnet50_fpn": (3, 224, 224),
    "ssd300_vgg16": (3, 224, 224),
    "quantized_resnet18": (3, 224, 224),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_models_of_torchvision_are_built_without_a_download(name, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    source = f"torchvision:{name}"
    assert sources.sample_of(source) == TORCHVISION[name]
    model = sources.without_memory(sources.factory_of(source))
    assert all(p.requires_grad for p in model.parameters())


def test_a_detector_gets_images_and_what_is_in_them(capsys):
    """Where torchvision's operators load, it is explained."""
    source = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
    images, objects = sources.inputs_of(source, 2, (3, 64, 48))
    assert [t.shape for t in images] == 2 * [(3, 64, 48)] and len(objects) == 2
    assert objects[0]["masks"].shape == (1, 64, 48) and objects[0]["boxes"].shape == (1, 4)
    x0, y0, x1, y1 = objects[0]["boxes"][0].tolist()
    assert 0 < x0 < x1 < 48 and 0 < y0 < y1 < 64
    status, out, err = ends(f"explain {source} --size 64 --batch 1", capsys)
    if sys.modules["torchvision.extension"]._has_ops():
        assert status == 0 and "46 of 46 pairs" in out
    else:
        assert (status, out) == (1, "") and "Couldn't load custom C++ ops" in err


def test_optical_flow_gets_two_batches():
    first, second = sources.inputs_of("torchvision:raft_small", 2, (3, 128, 128))
    assert first.shape == second.shape == (2, 3, 128, 128)


# --------------------------------------------------------------------------------- how it is called


def test_the_console_script():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fusedconvbn")
    assert script.load() is main


def test_the_script_runs_where_the_sources_are(tmp_path):
    """A folder of the same name, which is not built, in the folder where it is started: a script is
    searched for its modules first, and not that folder."""
    shutil.copytree(PACKAGE, tmp_path / "fusedconvbn", ignore=shutil.ignore_patterns("*.so"))
    script = tmp_path / "bin" / "fusedconvbn"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fusedconvbn.__main__ import main\nsys.exit(main())\n")
    (tmp_path / "made.py").write_text(MODELS)
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}:{tests}"}
    arguments = ["explain", "made:net", "--size", "16"]
    result = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert (result.returncode, result.stderr) == (0, "") and "1 of 1 pairs" in result.stdout


def test_a_pipe_that_is_closed_ends_it(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fusedconvbn", "explain", f"{tmp_path}/made.py:volumes"]
    (tmp_path / "made.py").write_text(MODELS)
    result = subprocess.run(
        [*command, "--sample", "1x8x8x8"],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "titles"),
    [
        ("explain MODELS:net --size 16 --plot OUT.png", ("explain /", "fuse Sequential", "draw")),
        ("fit MODELS:net --size 16 --memory 100MiB", ("fit /",)),
    ],
)
def test_a_bar_is_shown_while_it_works(arguments, titles, models, monkeypatch, tmp_path):
    """Here it waits for no two seconds. Each line is shorter than the terminal is wide."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    main(arguments.replace("MODELS", models).replace("OUT", f"{tmp_path}/out").split())
    shown = terminal.getvalue()
    assert all(f"\r{title}" in shown for title in titles) and shown.endswith("\r\033[K")
    assert max(len(line.removesuffix("\033[K")) for line in shown.split("\r")) < 40


# ------------------------------------------------------------------------------------------- docs

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^(?: {4,}|\$ | {4,}\$ )fusedconvbn( [^#\n]*)", re.MULTILINE)
SHOWN = [
    (page.name, arguments)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for arguments in COMMAND.findall(page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "arguments"), SHOWN)
def test_the_commands_in_the_docs_are_commands(page, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = command_line.parser().parse_args(shlex.split(arguments))
    assert options.command in ("info", "explain", "fit")


def test_the_docs_show_commands():
    assert {"README.md", "cli.md", "batch-size.md"} <= {page for page, _ in SHOWN}
