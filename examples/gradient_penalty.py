"""Two steps of a WGAN-GP critic with fused layers, next to the same critic unfused.

The penalty keeps the norm of the critic's gradient with respect to its input near 1, so training
differentiates that gradient once more. The fused layers give the same losses; for a second
derivative they compute and save what the unfused layers do. (The critic of the paper has no batch
norm, as the penalty is meant for each sample by itself; here it shows a second derivative through
batch norm.)

    I. Gulrajani et al., Improved Training of Wasserstein GANs, arXiv:1704.00028
"""

import copy

import torch
from torch import Tensor, nn

from fusedconvbn import FusedConvBN2d


class Critic(nn.Module):
    """Convolutions with stride 2, batch norm and leaky ReLU; the last layer has a residual."""

    def __init__(self) -> None:
        super().__init__()
        options = {"stride": 2, "padding": 1, "activation": nn.LeakyReLU(0.2)}
        self.down = FusedConvBN2d(3, 8, 4, **options)
        self.further_down = FusedConvBN2d(8, 12, 4, **options)
        self.last = FusedConvBN2d(12, 12, 3, padding=1, activation="silu")
        self.score = nn.Linear(12 * 4 * 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.further_down(self.down(images))
        return self.score(self.last(features, residual=features).flatten(1))


class UnfusedCritic(nn.Module):
    """The same critic, from copies of its modules, which run their own forward."""

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = copy.deepcopy(critic)

    def forward(self, images: Tensor) -> Tensor:
        def pair(layer: FusedConvBN2d, x: Tensor) -> Tensor:
            return layer.bn(layer.conv(x))

        c = self.critic
        features = nn.functional.leaky_relu(pair(c.down, images), 0.2)
        features = nn.functional.leaky_relu(pair(c.further_down, features), 0.2)
        return c.score(nn.functional.silu(pair(c.last, features) + features).flatten(1))


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


def main(steps: int = 2) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    fused = Critic()
    unfused = UnfusedCritic(fused)
    optimizers = [
        torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.9)) for m in (fused, unfused)
    ]
    losses = []
    for step in range(steps):
        # synthetic data: smooth images against noise
        real = torch.nn.functional.interpolate(torch.randn(16, 3, 4, 4), 16, mode="bilinear")
        fake, mix = torch.randn(16, 3, 16, 16), torch.rand(16, 1, 1, 1)
        pair = []
        for critic, optimizer in zip((fused, unfused), optimizers, strict=True):
            loss = critic_loss(critic, real, fake, mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pair.append(loss.item())
        print(f"step {step + 1}: critic's loss {pair[0]:.5f} fused, {pair[1]:.5f} unfused")
        losses.append(tuple(pair))
    return losses


if __name__ == "__main__":
    main()
