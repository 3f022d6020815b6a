"""The models that the tests train, by torchvision's names."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusedconvbn import _torchvision

models = _torchvision.models()


def _classifier(name: str, size: int = 64) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        options = {"googlenet": {"init_weights": True}}.get(name, {})
        if name == "inception_v3":  # its auxiliary head needs an image of 299
            options = {"init_weights": True, "aux_logits": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = models.get_model(name, weights=None, num_classes=10, **options)
        return model, torch.randn(4, 3, size, size)

    return make


def _segmenter(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def make() -> tuple[nn.Module, Tensor]:
        model = models.get_model(
            name, weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        )
        return model, torch.randn(2, 3, 64, 64)

    return make


def _video() -> tuple[nn.Module, Tensor]:
    return models.video.r3d_18(weights=None, num_classes=10), torch.randn(4, 3, 8, 32, 32)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        name: _classifier(name)
        for name in (
            "resnet18",
            "resnet50",
            "resnext50_32x4d",
            "wide_resnet50_2",
            "densenet121",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "regnet_y_400mf",
            "shufflenet_v2_x1_0",
            "googlenet",
            "mnasnet1_0",
            "vgg16_bn",
        )
    },
    "inception_v3": _classifier("inception_v3", 128),
    "deeplabv3_resnet50": _segmenter("deeplabv3_resnet50"),
    "fcn_resnet50": _segmenter("fcn_resnet50"),
    "r3d_18": _video,
}

SMALL = ("resnet18", "mobilenet_v2")  # a step takes a few seconds
# Residuals; gates and depthwise convolutions; concatenations.
NETWORKS = ("resnet18", "efficientnet_b0", "densenet121")


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of a model's result: one, a tuple of them, or a dict."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for t in values if t is not None]
