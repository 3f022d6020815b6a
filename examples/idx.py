"""Reads MNIST's four IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

UINT8 = 0x08
GZIP_MAGIC = b"\x1f\x8b"
SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> Tensor:
    """Reads one IDX file of unsigned bytes.

    The format: two zero bytes, the type, the number of dimensions, each dimension as a big-endian
    32-bit integer, and the elements, last dimension fastest.

    Raises:
        ValueError: The file is damaged, or holds something else.
    """
    data = path.read_bytes()
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: gzip data is damaged: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != UINT8:
        raise ValueError(
            f"{path}: an IDX file of unsigned bytes must begin with 00 00 08, "
            f"got {data[:3].hex(' ') or 'an empty file'}"
        )
    header = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    size = math.prod(shape)
    if len(data) != header + size:
        raise ValueError(
            f"{path}: an IDX file of shape {shape} must have {header + size} bytes, got {len(data)}"
        )
    if size == 0:
        raise ValueError(f"{path}: must hold at least one element, got shape {shape}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(shape)


def load_mnist(root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Reads MNIST from the folder that has its files, under either of their usual spellings.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}``, uint8 ``[N, 28, 28]`` and int64
        ``[N]``.

    Raises:
        FileNotFoundError: Files are missing; the message names all of them.
        ValueError: A file's content is not what its name says.
    """
    names = {
        (split, kind): f"{prefix}-{kind}"
        for split, prefix in SPLITS.items()
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    }
    paths = {key: _find(root, name) for key, name in names.items()}
    missing = [names[key] for key, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"MNIST needs, plain or .gz, in {root}: {', '.join(missing)}")

    data = {}
    for split in SPLITS:
        images_path = paths[split, "images-idx3-ubyte"]
        labels_path = paths[split, "labels-idx1-ubyte"]
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.dim() != 3 or images.shape[1:] != (28, 28):
            raise ValueError(
                f"{images_path}: images must have shape [N, 28, 28], got {[*images.shape]}"
            )
        if labels.dim() != 1 or labels.max() > 9:
            raise ValueError(
                f"{labels_path}: labels must have shape [N] and values 0 to 9, "
                f"got shape {[*labels.shape]} and values to {labels.max()}"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"{labels_path}: must have one label for each image, "
                f"got {len(labels)} for {len(images)} images"
            )
        data[split] = images, labels.long()
    return data


def _find(root: Path, name: str) -> Path | None:
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = root / (spelling + suffix)
            if path.is_file():
                return path
    return None
