"""Saves a scripted model, and the data and numbers that main.cpp compares with.

python make_model.py FOLDER
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedconvbn import FusedConvBN2d

RATE, STEPS = 0.5, 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = FusedConvBN2d(3, 8, 3, padding=1, activation="silu")
        self.block = FusedConvBN2d(8, 8, 3, padding=1, activation="relu")
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.block(x, x)
        return self.head(x.mean([2, 3]))


class Data(nn.Module):
    """A way to hand tensors to C++: attributes of a scripted module."""

    def __init__(self, rate: float, **tensors: Tensor) -> None:
        super().__init__()
        self.rate = rate
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = Model().double()
    torch.jit.script(model).save(folder / "model.pt")

    images, targets = torch.randn(16, 3, 12, 10).double(), torch.randn(16, 4).double()
    model, losses = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(images), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        output = model.eval()(images)
    data = Data(
        RATE,
        images=images,
        targets=targets,
        losses=torch.stack(losses),
        stem_running_var=model.stem.bn.running_var,
        block_running_var=model.block.bn.running_var,
        output=output,
    )
    torch.jit.script(data).save(folder / "data.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
