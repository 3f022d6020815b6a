"""The example: its IDX reader, its data, and a few steps of its training."""

import gzip
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import idx
import mnist

COUNTS = {"train": 5, "t10k": 3}


def idx_bytes(shape, payload=None, kind=0x08):
    dimensions = b"".join(size.to_bytes(4, "big") for size in shape)
    if payload is None:
        payload = bytes(i % 251 for i in range(math.prod(shape)))
    return bytes([0, 0, kind, len(shape)]) + dimensions + payload


def write_mnist(root, *, dotted=False, compress=False):
    for prefix, count in COUNTS.items():
        files = {
            "images-idx3-ubyte": idx_bytes((count, 28, 28)),
            "labels-idx1-ubyte": idx_bytes((count,)),
        }
        for kind, data in files.items():
            name = f"{prefix}-{kind}".replace("-idx", ".idx" if dotted else "-idx")
            if compress:
                name, data = name + ".gz", gzip.compress(data)
            (root / name).write_bytes(data)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 2, 4)])
@pytest.mark.parametrize("compress", [False, True])
def test_read_idx(tmp_path, shape, compress):
    data = idx_bytes(shape)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data) if compress else data)
    expected = torch.arange(math.prod(shape)).to(torch.uint8).view(shape)
    torch.testing.assert_close(idx.read_idx(path), expected)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "must begin with 00 00 08, got an empty file"),
        (b"PNG image", "must begin with 00 00 08, got 50 4e 47"),
        (idx_bytes((2, 3), kind=0x0D), "must begin with 00 00 08, got 00 00 0d"),
        (idx_bytes((2, 3), b"12345"), r"of shape \[2, 3\] must have 18 bytes, got 17"),
        (idx_bytes((2, 3), b"1234567"), "must have 18 bytes, got 19"),
        (idx_bytes((2, 3))[:7], "must have .* bytes, got 7"),
        (idx_bytes((0, 3)), r"at least one element, got shape \[0, 3\]"),
        (gzip.compress(idx_bytes((2, 3)), mtime=0)[:-9], "gzip data is damaged"),
        (gzip.compress(idx_bytes((2, 3)), mtime=0)[:12] + b"damaged", "gzip data is damaged"),
    ],
)
def test_read_idx_errors(tmp_path, data, message):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        idx.read_idx(path)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("compress", [False, True])
def test_load_mnist(tmp_path, dotted, compress):
    write_mnist(tmp_path, dotted=dotted, compress=compress)
    splits = idx.load_mnist(tmp_path)
    for (images, labels), count in zip(splits.values(), COUNTS.values(), strict=True):
        assert images.shape == (count, 28, 28) and images.dtype == torch.uint8
        assert labels.tolist() == [*range(count)] and labels.dtype == torch.int64


def test_load_mnist_names_each_missing_file(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as error:
        idx.load_mnist(tmp_path)
    assert str(error.value).endswith(": train-labels-idx1-ubyte, t10k-images-idx3-ubyte")
    with pytest.raises(SystemExit, match="train-labels-idx1-ubyte"):
        mnist.main(["--data", "mnist", "--root", str(tmp_path)])


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("train-images-idx3-ubyte", (5, 28, 27), r"must have shape \[N, 28, 28\], got \[5, 28, 27"),
        ("train-labels-idx1-ubyte", (5, 1), r"must have shape \[N\] .* got shape \[5, 1\]"),
        ("train-labels-idx1-ubyte", (11,), "values 0 to 9, got .* values to 10"),
        ("t10k-labels-idx1-ubyte", (4,), "one label for each image, got 4 for 3 images"),
    ],
)
def test_load_mnist_errors(tmp_path, name, shape, message):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx_bytes(shape))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        idx.load_mnist(tmp_path)


def test_mnist_without_root_is_an_error(capsys):
    with pytest.raises(SystemExit):
        mnist.main(["--data", "mnist"])
    assert "--data mnist needs --root DIR" in capsys.readouterr().err


def test_load_mnist_digits(tmp_path):
    write_mnist(tmp_path)
    data = mnist.load_mnist_digits(tmp_path)
    assert data.train_images.shape == (5, 1, 28, 28)
    assert data.test_labels.shape == (3,)


def test_load_digits():
    data = mnist.load_digits(seed=1)
    assert data.train_images.shape == (1536, 1, 28, 28)
    assert data.test_images.shape == (261, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert abs(data.train_images.mean()) < 1e-4 and abs(data.train_images.std() - 1) < 1e-4
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))
    again = mnist.load_digits(seed=1)
    assert torch.equal(again.train_images, data.train_images)
    assert not torch.equal(mnist.load_digits(seed=2).train_labels, data.train_labels)


@pytest.fixture
def small_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (30,), generator=generator)
    return mnist.Data(images[:24], labels[:24], images[24:], labels[24:])


# In single precision rounding grows from step to step, in unfused networks too.
@pytest.mark.parametrize(
    "arithmetic, dtype, memory_format, tolerance",
    [
        ("batchnorm", torch.float32, torch.contiguous_format, 1e-3),
        ("batchnorm", torch.float64, torch.channels_last, 1e-10),
        ("tutorial", torch.float32, torch.channels_last, 1e-3),
        ("tutorial", torch.float64, torch.contiguous_format, 1e-10),
    ],
)
def test_training(small_data, arithmetic, dtype, memory_format, tolerance, tmp_path):
    data = small_data.to(torch.device("cpu"), dtype, memory_format)
    contestants = mnist.train(
        data, arithmetic=arithmetic, batch_size=8, memory_format=memory_format, max_steps=3
    )
    unfused, fused = (mnist.evaluate(contestant, data, 8) for contestant in contestants)
    assert len(unfused.losses) == len(fused.losses) == 3
    assert mnist.largest_difference(unfused, fused) < tolerance
    assert fused.memory.saved < 0.62 * unfused.memory.saved
    assert fused.memory.end_of_forward < 0.62 * unfused.memory.end_of_forward

    mnist.plot(unfused, fused, "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "time per step (ms)" in mnist.table(unfused, fused)


def test_both_networks_start_alike(small_data):
    torch.manual_seed(0)
    net = mnist.Net("batchnorm")
    fused = net.fused()
    for ours, theirs in zip(net.parameters(), fused.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
