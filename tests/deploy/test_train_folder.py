"""examples/train_folder.py: a stopped run goes on as if it had not stopped, fused or not."""

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import train_folder
from train_folder import Run, main, models

SMALL = ["--size", "32", "--batch-size", "8", "--epochs", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, of which one is brighter: 24 images to train on, 8 to validate on."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 4)):
        for label, brightest in (("dark", 150), ("light", 256)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(brightest, (40, 36, 3), generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(folder / part / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("finished")
    main(["--data", str(images), *SMALL, "--output", str(folder)])
    return folder


def losses(checkpoint):
    return [
        {k: v for k, v in epoch.items() if "second" not in k} for epoch in checkpoint["history"]
    ]


def stopped(monkeypatch, arguments):
    """Runs until the middle of the second epoch."""
    validations = []

    def validate(run, batches, validate=Run.validate):
        validations.append(validate(run, batches))
        if len(validations) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "validate", validate)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.undo()


def test_a_resumed_run_ends_as_one_that_was_not_stopped(images, finished, tmp_path, monkeypatch):
    arguments = ["--data", str(images), *SMALL, "--output", str(tmp_path)]
    stopped(monkeypatch, arguments)
    checkpoint = tmp_path / "fused.pt"
    assert len(torch.load(checkpoint)["history"]) == 1
    main([*arguments, "--resume", str(checkpoint)])

    expected, found = torch.load(finished / "fused.pt"), torch.load(checkpoint)
    assert losses(found) == losses(expected)
    assert len(found["history"]) == 2
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    assert found["scheduler"] == expected["scheduler"]


def test_unfused_model_takes_the_checkpoint(finished):
    checkpoint = torch.load(finished / "fused.pt")
    models.resnet18(num_classes=2).load_state_dict(checkpoint["model"])
    assert (finished / "training.png").stat().st_size > 10_000


def test_an_unfused_run_goes_on_with_it(images, finished, tmp_path, monkeypatch, capsys):
    """And the table at its end shows both runs."""
    arguments = ["--data", str(images), *SMALL, "--output", str(tmp_path)]
    stopped(monkeypatch, arguments)
    shutil.move(tmp_path / "fused.pt", tmp_path / "stopped.pt")
    shutil.copy(finished / "fused.pt", tmp_path)
    main([*arguments, "--resume", str(tmp_path / "stopped.pt"), "--unfused"])
    (_, expected), (_, found) = (
        losses(torch.load(tmp_path / f"{kind}.pt")) for kind in ("fused", "unfused")
    )
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["validation loss"] == pytest.approx(expected["validation loss"], rel=1e-2)

    output = capsys.readouterr().out
    assert re.search(r"^ +unfused +fused$", output, re.MULTILINE)
    (row,) = re.findall(r"^saved for backward \(MiB\)(.*)$", output, re.MULTILINE)
    unfused, fused = map(float, row.split())
    assert 0 < fused < 0.6 * unfused


@pytest.mark.slow
@pytest.mark.parametrize("model", train_folder.MODELS)
def test_every_model_in_mixed_precision(model, images, tmp_path):
    """The numbers are those of other tests: bfloat16's rounding, and so few values for a norm,
    drive two runs apart."""
    arguments = ["--data", str(images), *SMALL, "--output", str(tmp_path), "--amp"]
    for more in ([], ["--unfused"]):
        main([*arguments, "--epochs", "1", "--lr", "1e-4", "--model", model, *more])
    fused, unfused = (torch.load(tmp_path / f"{kind}.pt") for kind in ("fused", "unfused"))
    assert math.isfinite(fused["history"][0]["loss"])
    assert fused["memory"]["saved"] < 0.65 * unfused["memory"]["saved"]
    assert all(t.dtype != torch.bfloat16 for t in fused["model"].values())


def test_digits(tmp_path):
    folder = train_folder.write_digits(tmp_path)
    for part, count in (("train", 1497), ("val", 300)):
        assert len(list((folder / part).glob("*/*.png"))) == count
        assert sorted(path.name for path in (folder / part).iterdir()) == list("0123456789")
    with Image.open(next(folder.glob("train/7/*.png"))) as image:
        assert image.size == (64, 64) and image.getextrema()[1] > 200


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "25"], "--batch-size must be at most 24, the images in train"),
        (["--epochs", "3", "--resume", "{finished}/fused.pt"], "--epochs must be .*, 2, got 3"),
        (["--resume", "{finished}/fused.pt"], "of a run that was stopped, .*fused.pt is complete"),
        (["--resume", "{finished}/none.pt"], "No such file or directory: '.*none.pt'"),
        (["--data", "{finished}"], "No such file or directory: '.*train'"),
        (["--budget", "a lot"], "memory.*got 'a lot'"),
    ],
)
def test_says_what_is_wrong(arguments, message, images, finished, tmp_path):
    arguments = [argument.format(finished=finished) for argument in arguments]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["--data", str(images), *SMALL, "--output", str(tmp_path), *arguments])


def test_classes_have_to_be_the_same(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/val/dark").rename(tmp_path / "images/val/black")
    with pytest.raises(SystemExit, match=r"train has \['dark', 'light'\], val has \['black'"):
        main(["--data", str(tmp_path / "images"), *SMALL, "--output", str(tmp_path)])
