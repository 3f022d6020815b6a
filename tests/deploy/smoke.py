"""What an installed wheel has to do, in an environment that holds torch and fusedconvbn alone:

python tests/deploy/smoke.py 2.13.0    # the torch that was installed before the wheel
"""

import copy
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fusedconvbn


def check_installation(expected: str) -> None:
    assert Path(fusedconvbn.__file__).is_relative_to(sys.prefix), fusedconvbn.__file__
    assert torch.__version__.split("+")[0] == expected, f"pip installed torch {torch.__version__}"
    assert fusedconvbn.build_info()["torch"] == torch.__version__
    minor = ".".join(expected.split(".")[:2])
    version = importlib.metadata.version("fusedconvbn")
    assert version.startswith(f"{fusedconvbn.__version__}+torch{minor}"), version


def check_command_line() -> None:
    """By module, in a folder where no sources are found, and by each script of the package."""
    scripts = importlib.metadata.distribution("fusedconvbn").entry_points
    commands = [
        [Path(sys.executable).with_name(s.name)] for s in scripts.select(group="console_scripts")
    ]
    for command in ([sys.executable, "-m", "fusedconvbn"], *commands):
        with tempfile.TemporaryDirectory() as folder:
            facts = subprocess.run(
                command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        assert f"torch: {torch.__version__}" in facts, facts
    print(facts, end="")


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(model: nn.Module, images: torch.Tensor) -> tuple[list[float], int]:
    """The losses of three steps, and the bytes that the last one saved for backward."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with fusedconvbn.track_memory() as memory:
            loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)))
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, memory.saved


def check_training() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    model = network().double()
    fused = fusedconvbn.fuse(copy.deepcopy(model), images, memory="min")
    assert fusedconvbn.is_fused(fused)
    losses, saved = train(model, images)
    fused_losses, fused_saved = train(fused, images)
    print(f"losses {losses} unfused, {fused_losses} fused; saved {saved} and {fused_saved} bytes")
    assert max(abs(a - b) for a, b in zip(losses, fused_losses, strict=True)) < 1e-12
    assert losses[-1] < losses[0] and fused_saved < 0.6 * saved
    state = model.state_dict()
    assert fused.state_dict().keys() == state.keys()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-12, msg=name)


if __name__ == "__main__":
    check_installation(*sys.argv[1:])
    check_command_line()
    check_training()
