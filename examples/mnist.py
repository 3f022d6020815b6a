"""Trains a small network on handwritten digits twice, fused and unfused, and compares the two.

Both start from the same weights and see the same batches and dropout masks, step by step in one
process. A table and a picture show that the losses agree, and what each costs in time and memory.

    python examples/mnist.py                            # the digits that come with scikit-learn
    python examples/mnist.py --data mnist --root DIR    # MNIST's four IDX files
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from idx import load_mnist
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

import fusedconvbn
from fusedconvbn import reference
from fusedconvbn._style import EAGER, FUSED, STYLE, WIDTH

MIB = 2**20
WARMUP_STEPS = 3
COMPARED_STEPS = 10
EPOCHS = {"digits": 12, "mnist": 3}


class ConvBNReLU(nn.Module):
    """Convolution, ``nn.BatchNorm2d`` and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))

    def fused(self) -> nn.Module:
        return fusedconvbn.FusedConvBN2d.from_modules(
            copy.deepcopy(self.conv), copy.deepcopy(self.bn), activation="relu"
        )


class TutorialConvBNReLU(nn.Module):
    """The same with the tutorial's arithmetic: two autograd functions, one for each layer."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_weight = nn.Conv2d(in_channels, out_channels, 3, bias=False).weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(reference.BatchNorm.apply(reference.Conv2D.apply(x, self.conv_weight)))

    def fused(self) -> nn.Module:
        out_channels, in_channels = self.conv_weight.shape[:2]
        layer = fusedconvbn.FusedConvBN(in_channels, out_channels, 3)
        layer.load_state_dict({"conv_weight": self.conv_weight.detach()})
        return nn.Sequential(layer, nn.ReLU(inplace=True))


class Net(nn.Module):
    def __init__(self, arithmetic: str) -> None:
        super().__init__()
        block = ConvBNReLU if arithmetic == "batchnorm" else TutorialConvBNReLU
        self.block1 = block(1, 32)
        self.block2 = block(32, 64)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block2(self.block1(x)), 2)
        x = F.dropout(self.fc1(x.flatten(1)), 0.5, self.training)
        return F.log_softmax(self.fc2(x), dim=1)

    def fused(self) -> Net:
        """A copy of this network with both blocks fused."""
        net = copy.deepcopy(self)
        net.block1 = self.block1.fused()
        net.block2 = self.block2.fused()
        return net


@dataclass
class Data:
    """Normalised images ``[N, 1, 28, 28]`` and their labels ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def from_raw(cls, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Data:
        """Scales all images by the mean and standard deviation of the training images."""
        std, mean = torch.std_mean(train[0])
        return cls((train[0] - mean) / std, train[1], (test[0] - mean) / std, test[1])

    def to(
        self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> Data:
        return Data(
            self.train_images.to(device, dtype, memory_format=memory_format),
            self.train_labels.to(device),
            self.test_images.to(device, dtype, memory_format=memory_format),
            self.test_labels.to(device),
        )


def load_digits(seed: int) -> Data:
    """The 1,797 digits of scikit-learn, enlarged from 8×8 to 28×28; 1,536 of them to train on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1536], order[1536:]
    return Data.from_raw((images[train], labels[train]), (images[test], labels[test]))


def load_mnist_digits(root: Path) -> Data:
    splits = load_mnist(root)
    train, test = ((images.unsqueeze(1).float(), labels) for images, labels in splits.values())
    return Data.from_raw(train, test)


@dataclass
class Contestant:
    """One of the two networks, with its optimizer and its measurements."""

    net: Net
    seed: int
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adadelta(self.net.parameters(), lr=1.0)
        self.scheduler = StepLR(self.optimizer, step_size=1, gamma=0.7)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        # Both networks draw the same dropout mask in the same step.
        torch.manual_seed(self.seed + len(self.losses))
        loss = F.nll_loss(self.net(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timed_step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        synchronize(images.device)
        start = time.perf_counter()
        loss = self.step(images, labels)
        synchronize(images.device)
        self.times.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def measured_step(self, images: Tensor, labels: Tensor) -> fusedconvbn.memory.MemoryReport:
        self.optimizer.zero_grad()
        with fusedconvbn.track_memory(images.device) as memory:
            self.step(images, labels)
        return memory

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor, batch_size: int) -> float:
        self.net.eval()
        right = sum(
            (self.net(x).argmax(1) == y).sum().item()
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )
        self.net.train()
        return right / len(labels)


def train(
    data: Data,
    *,
    arithmetic: str = "batchnorm",
    epochs: int = 1,
    batch_size: int = 256,
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
    max_steps: int | None = None,
) -> tuple[Contestant, Contestant]:
    """Trains the unfused and the fused network side by side; returns both."""
    to = {"device": data.train_images.device, "dtype": data.train_images.dtype}
    torch.manual_seed(seed)
    unfused_net = Net(arithmetic)
    contestants = tuple(
        Contestant(net.to(**to, memory_format=memory_format), seed)
        for net in (unfused_net, unfused_net.fused())
    )
    shuffle = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(data.train_labels) / batch_size)
    with tqdm(total=min(total, max_steps or total), desc="training both", unit="step") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.train_labels), generator=shuffle)
            for index in order.to(data.train_labels.device).split(batch_size):
                images, labels = data.train_images[index], data.train_labels[index]
                # The two take turns to go first, so that neither always finds the caches warm.
                for contestant in contestants[:: 1 if progress.n % 2 == 0 else -1]:
                    contestant.timed_step(images, labels)
                progress.set_postfix(loss=f"{contestants[0].losses[-1]:.4f}", refresh=False)
                progress.update()
                if progress.n == max_steps:
                    return contestants
            for contestant in contestants:
                contestant.scheduler.step()
    return contestants


@dataclass
class Result:
    """What the table and the picture show of one network."""

    losses: list[float]
    accuracy: float
    seconds: float
    memory: fusedconvbn.memory.MemoryReport


def evaluate(contestant: Contestant, data: Data, batch_size: int) -> Result:
    accuracy = contestant.accuracy(data.test_images, data.test_labels, batch_size)
    times = contestant.times[WARMUP_STEPS:] or contestant.times
    # Last, because one more step moves the weights. Cloned, because a slice saves all the images.
    images, labels = data.train_images[:batch_size].clone(), data.train_labels[:batch_size].clone()
    memory = contestant.measured_step(images, labels)
    return Result(contestant.losses, accuracy, statistics.median(times), memory)


def largest_difference(unfused: Result, fused: Result) -> float:
    """The largest relative difference between two losses of the same step, of the first steps."""
    pairs = list(zip(unfused.losses, fused.losses, strict=True))[:COMPARED_STEPS]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def figures(unfused: Result, fused: Result) -> list[tuple[str, str, float, float]]:
    """The rows of the table: what it is, how it is written, unfused and fused."""
    rows = [
        ("loss of the last step", "{:.4f}", lambda result: result.losses[-1]),
        ("test accuracy (%)", "{:.2f}", lambda result: 100 * result.accuracy),
        ("time per step (ms)", "{:.1f}", lambda result: 1e3 * result.seconds),
        ("end of forward (MiB)", "{:.1f}", lambda result: result.memory.end_of_forward / MIB),
        ("peak of a step (MiB)", "{:.1f}", lambda result: result.memory.peak / MIB),
        ("saved for backward (MiB)", "{:.1f}", lambda result: result.memory.saved / MIB),
    ]
    return [(name, form, value(unfused), value(fused)) for name, form, value in rows]


def table(unfused: Result, fused: Result) -> str:
    lines = [f"{'':26}{'unfused':>10}{'fused':>10}{'ratio':>8}"]
    for name, form, a, b in figures(unfused, fused):
        ratio = f"{b / a:.2f}" if a else "-"
        lines.append(f"{name:26}{form.format(a):>10}{form.format(b):>10}{ratio:>8}")
    return "\n".join(lines)


def plot(unfused: Result, fused: Result, title: str, path: Path) -> None:
    """Draws both loss curves over each other, and the memory of both as bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4))
        curves, bars = figure.subplots(1, 2)
        figure.suptitle(title)

        steps = range(1, len(unfused.losses) + 1)
        curves.plot(steps, unfused.losses, color=EAGER, linewidth=7, alpha=0.4)
        curves.plot(steps, fused.losses, color=FUSED, linestyle="--")
        curves.set(title="Training loss", xlabel="step", ylabel="negative log-likelihood (nats)")
        curves.set_yscale("log")
        curves.yaxis.set_major_formatter(ScalarFormatter())
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        above = {"xycoords": "axes fraction", "ha": "right", "weight": "bold"}
        curves.annotate("unfused, the thick line", (1, 0.93), color=EAGER, **above)
        curves.annotate("fused, the dashed line", (1, 0.86), color=FUSED, **above)

        before, after = (
            [result.memory.end_of_forward / MIB, result.memory.peak / MIB]
            for result in (unfused, fused)
        )
        groups = ["end of forward", "peak of a step"]
        for place, name, heights, look in (
            (-0.2, "unfused", before, {"color": EAGER, "alpha": 0.45}),
            (0.2, "fused", after, {"color": FUSED}),
        ):
            drawn = bars.bar([i + place for i in range(2)], heights, 0.38, **look)
            labels = [f"{name}\n{height:.0f}" for height in heights]
            bars.bar_label(drawn, labels, padding=3, color=look["color"], weight="bold")
        ratios = [f"× {a / b:.2f}" for a, b in zip(after, before, strict=True)]
        bars.bar_label(
            drawn, ratios, label_type="center", color="white", weight="bold", fontsize=12
        )
        bars.set_xticks(range(2), groups)
        bars.tick_params(axis="x", length=0)
        bars.set(title="Memory of a training step", ylabel="memory (MiB)")
        bars.margins(y=0.16)
        figure.savefig(path)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=EPOCHS, default="digits")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder with MNIST's IDX files")
    parser.add_argument("--arithmetic", choices=("batchnorm", "tutorial"), default="batchnorm")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--epochs", type=positive_int, help="default: 12 for digits, 3 for mnist")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=2048,
        help="lowered to the number of training images where there are fewer",
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="float64 shows that losses differ by rounding alone",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("mnist.png"), help="the picture's path")
    arguments = parser.parse_args(argv)
    if arguments.data == "mnist" and arguments.root is None:
        parser.error("--data mnist needs --root DIR, the folder with its four IDX files")
    arguments.epochs = arguments.epochs or EPOCHS[arguments.data]
    return arguments


def run(arguments: argparse.Namespace) -> tuple[str, Result, Result]:
    """What is trained, and the results of the unfused and the fused network."""
    # The profiler, which measures the memory, otherwise logs its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        data = (
            load_digits(arguments.seed)
            if arguments.data == "digits"
            else load_mnist_digits(arguments.root)
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    memory_format = torch.channels_last if arguments.channels_last else torch.contiguous_format
    data = data.to(arguments.device, getattr(torch, arguments.dtype), memory_format)
    batch_size = min(arguments.batch_size, len(data.train_labels))

    contestants = train(
        data,
        arithmetic=arguments.arithmetic,
        epochs=arguments.epochs,
        batch_size=batch_size,
        memory_format=memory_format,
        seed=arguments.seed,
    )
    unfused, fused = (evaluate(contestant, data, batch_size) for contestant in contestants)

    layout = "channels_last" if arguments.channels_last else "contiguous"
    title = (
        f"{arguments.data}, batch {batch_size}, {arguments.arithmetic} arithmetic, "
        f"{arguments.dtype}, {layout}, {arguments.device}"
    )
    return title, unfused, fused


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    title, unfused, fused = run(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot(unfused, fused, title, arguments.output)
    print(f"\n{title}\n\n{table(unfused, fused)}\n")
    compared = min(COMPARED_STEPS, len(unfused.losses))
    print(
        f"largest relative difference of the losses, first {compared} steps: "
        f"{largest_difference(unfused, fused):.1e}"
    )
    print(f"picture: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
