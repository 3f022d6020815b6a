"""What `fuse` finds in many models, and the bytes it predicts: `benchmarks/models.py --count`."""

import torch

import fusedconvbn
from fusedconvbn import _torchvision

COUNTED = [
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
    "inception_v3",
    "mnasnet1_0",
    "vgg16_bn",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "r3d_18",
]


def count(batch: int, size: int) -> None:
    """What fuse finds in many models, and the bytes that it predicts; nothing is computed."""
    print(
        "| model | pairs fused / found | chains | saved, auto | saved, min |\n|---|---|---|---|---|"
    )
    for name in COUNTED:
        options = {"weights": None}
        if "_resnet50" in name and name[0] in "df":
            options |= {"weights_backbone": None, "aux_loss": True}
        if name in ("googlenet", "inception_v3"):
            options |= {"init_weights": False}
        model = _torchvision.models().get_model(name, **options)
        image = (16, 112, 112) if name == "r3d_18" else 2 * (299 if "inception" in name else size,)
        reports = [
            fusedconvbn.explain(model, torch.empty(batch, 3, *image), memory=memory)
            for memory in ("auto", "min")
        ]
        shares = " | ".join(f"{r.saved / r.eager:.2f}" for r in reports)
        report = reports[0]
        pairs = f"{report.fused_pairs} / {report.pairs}"
        print(f"| {name} | {pairs} | {len(report.chains)} | {shares} |", flush=True)
