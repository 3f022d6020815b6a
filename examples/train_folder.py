"""Trains one of torchvision's classifiers, fused, on a folder of images: with a DataLoader, mixed
precision, checkpoints, and a picture.

The folder holds train/CLASS/*.png and val/CLASS/*.png (or .jpg, …). Without --data it is made from
the 1,797 digits that come with scikit-learn. After each epoch a run writes OUTPUT/fused.pt, or
unfused.pt, and at its end OUTPUT/training.png, which shows both runs where both are there.

    python examples/train_folder.py                      # fused
    python examples/train_folder.py --unfused            # the same unfused, to compare
    python examples/train_folder.py --data DIR --model resnet50 --size 224 --budget 0.3 --amp
    python examples/train_folder.py --resume output/train_folder/fused.pt    # after a stop
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist import positive_int
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from train_folder_report import finished, plot, table

import fusedconvbn
from fusedconvbn import _torchvision

models = _torchvision.models()  # first: it lets torchvision be imported without its operators
from torchvision import transforms
from torchvision.datasets import ImageFolder

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")
# What a resumed run has to share with the run that it goes on with, and two runs of one picture.
SETTINGS = ("model", "size", "batch_size", "epochs", "lr", "seed", "amp")


def write_digits(folder: Path) -> Path:
    """Writes scikit-learn's digits, enlarged from 8×8 to 64×64, as a folder of images."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ("val" if i % 6 == 0 else "train") / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((64, 64)).save(path)
    return folder


def loaders(arguments: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Batches to train on, shuffled and cropped at random, and batches to validate on."""
    as_numbers = [transforms.ToTensor(), transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3)]
    crop = transforms.RandomResizedCrop(arguments.size, scale=(0.6, 1))
    whole = transforms.Resize((arguments.size, arguments.size))
    train, val = (
        ImageFolder(arguments.data / part, transforms.Compose([first, *as_numbers]))
        for part, first in (("train", crop), ("val", whole))
    )
    if train.classes != val.classes:
        raise ValueError(f"{arguments.data}: train has {train.classes}, val has {val.classes}")
    if len(train) < arguments.batch_size:
        raise ValueError(f"--batch-size must be at most {len(train)}, the images in train")
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.workers}
    # The last images of a shuffled epoch, too few for a batch, are left out.
    return DataLoader(train, shuffle=True, drop_last=True, **options), DataLoader(val, **options)


class Run:
    """A model, all that its training needs, and what came out so far."""

    def __init__(self, arguments: argparse.Namespace, classes: int) -> None:
        self.device, self.amp = arguments.device, arguments.amp
        self.epochs, self.kind = arguments.epochs, "unfused" if arguments.unfused else "fused"
        self.settings = {name: str(getattr(arguments, name)) for name in SETTINGS}
        self.settings["data"] = arguments.data.resolve().name
        torch.manual_seed(arguments.seed)
        model = models.get_model(arguments.model, weights=None, num_classes=classes)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        if not arguments.unfused:
            # Of the size of a batch; only its shape matters. Under autocast as in training.
            example = self.placed(torch.empty(arguments.batch_size, 3, *[arguments.size] * 2))
            with self.autocast():
                self.model = fusedconvbn.fuse(
                    model, example, memory=arguments.budget, optimizer="sgd"
                )
        self.optimizer = torch.optim.SGD(self.model.parameters(), arguments.lr, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.epochs)
        self.memory: dict[str, int] = {}
        self.history: list[dict[str, float]] = []

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def placed(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=torch.channels_last)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def train_epoch(self, batches: DataLoader) -> None:
        self.model.train()
        title = f"epoch {len(self.history) + 1}"
        start, seen, total = time.perf_counter(), 0, torch.zeros((), device=self.device)
        for images, labels in tqdm(batches, title, leave=False, disable=None):
            images, labels = self.placed(images), labels.to(self.device)
            seen += len(images)
            if self.memory or seen < len(batches) * len(images):
                total += self.step(images, labels)
            else:  # once, in the last step of an epoch: to measure takes longer
                with fusedconvbn.track_memory(self.device) as memory:
                    total += self.step(images, labels)
                self.memory = {"saved": memory.saved, "peak": memory.peak}
        loss = total.item() / len(batches)  # waits for the GPU
        speed = seen / (time.perf_counter() - start)
        self.scheduler.step()
        self.history.append({"loss": loss, "images per second": speed})

    @torch.no_grad()
    def validate(self, batches: DataLoader) -> None:
        self.model.eval()
        loss, right, seen = 0.0, 0, 0
        for images, labels in batches:
            with self.autocast():
                scores = self.model(self.placed(images)).float().cpu()
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            right += (scores.argmax(1) == labels).sum().item()
            seen += len(labels)
        self.history[-1] |= {"validation loss": loss / seen, "accuracy": right / seen}

    def save(self, path: Path) -> None:
        on_gpu = self.device.type == "cuda"
        checkpoint = {
            "model": self.model.state_dict(),  # with the keys of the unfused model
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_gpu else [])],
            "history": self.history,  # one entry for each epoch
            "memory": self.memory,
            "settings": self.settings,
        }
        unfinished = path.with_suffix(".tmp")  # a stop while writing leaves the last one whole
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Goes on where a run, fused or not, wrote this checkpoint."""
        checkpoint = torch.load(path, map_location="cpu")
        for name, value in checkpoint["settings"].items():
            if value != self.settings[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be that of {path}, {value}, "
                    f"got {self.settings[name]}"
                )
        if len(checkpoint["history"]) == self.epochs:
            raise ValueError(f"--resume must be of a run that was stopped, {path} is complete")
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.history = checkpoint["history"]
        torch.set_rng_state(checkpoint["random"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state_all(checkpoint["random"][1:])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def budget(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: the digits, written out")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--size", type=positive_int, default=64, help="of an image")
    parser.add_argument("--budget", type=budget, default="auto", help='"min", 0.4, "6GiB", …')
    parser.add_argument("--unfused", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where autocast chooses it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--epochs", type=positive_int, default=5)
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--output", type=Path, default=Path("output/train_folder"))
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    # The profiler, which measures the memory, otherwise logs its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        arguments.data = arguments.data or write_digits(arguments.output / "digits")
        train, val = loaders(arguments)
        run = Run(arguments, len(train.dataset.classes))
        if arguments.resume:
            run.load(arguments.resume)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None

    checkpoint = arguments.output / f"{run.kind}.pt"
    while len(run.history) < run.epochs:
        run.train_epoch(train)
        run.validate(val)
        run.save(checkpoint)
        epoch = run.history[-1]
        print(
            f"epoch {len(run.history)} of {run.epochs}: loss {epoch['loss']:.4f}, validation "
            f"{epoch['validation loss']:.4f} and {100 * epoch['accuracy']:.1f} %, "
            f"{epoch['images per second']:.0f} images a second"
        )

    runs, picture = finished(arguments.output, run.settings), arguments.output / "training.png"
    title = f"{arguments.model} on {arguments.data.name}, batch {arguments.batch_size} "
    title += f"at {arguments.size}², {'bfloat16' if arguments.amp else 'float32'}, {run.device}"
    plot(runs, title, picture)
    print(f"\n{title}\n\n{table(runs)}\n\ncheckpoint: {checkpoint}\npicture: {picture}")


if __name__ == "__main__":
    main()
