"""The models of benchmarks/coverage.py: convolutions and batch norm, from seven libraries."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Row
from torch import Tensor, nn

from fusedconvbn import _torchvision

BATCH, SIZE = 4, 64

# NAME@SIZE: an image of SIZE², or of other extents (a volume, a video). NAME is an argument of the
# library's function below.
TIMM = """
    resnet18 resnet26t resnet50d resnetblur50 resnetrs50 resnetv2_50 resnext50_32x4d
    seresnet33ts ecaresnet26t legacy_seresnet18 legacy_seresnext26_32x4d gcresnet33ts
    resnet50_clip regnetx_002 regnety_002 regnetz_005 efficientnet_b0 efficientnet_cc_b0_4e
    efficientnet_es efficientnet_lite0 tf_efficientnet_b0 tf_efficientnetv2_b0 mixnet_s
    mnasnet_100 mobilenetv1_100 mobilenetv2_100 mobilenet_edgetpu_v2_xs fbnetc_100 spnasnet_100
    tinynet_a hardcorenas_a mobilenetv3_large_100 mobilenetv3_small_100 mobilenetv4_conv_small
    mobilenetv4_hybrid_medium fbnetv3_b lcnet_100 densenet121 densenetblur121d dpn48b dla34
    dla60_res2net hrnet_w18_small ese_vovnet19b_dw ese_vovnet39b vovnet39a@224 cspresnet50
    cspresnext50 cspdarknet53 cs3darknet_s cs3sedarknet_l repvgg_a0 mobileone_s0 gernet_s
    botnet26t_256@128 halonet26t@256 lambda_resnet26t@128 ghostnet_100 ghostnetv2_100 rexnet_100
    res2net50_26w_4s res2next50 resnest14d skresnet18 tresnet_m legacy_xception xception41
    inception_v3@160 inception_v4@160 inception_resnet_v2@160 nasnetalarge pnasnet5large
    vgg11_bn levit_128s@128 levit_conv_128s@128 fastvit_t8 selecsls42b repghostnet_100
    starnet_s1 efficientformer_l1@224 efficientvit_b0 repvit_m0_9 mobilevit_xxs mobilevitv2_050
    visformer_tiny@128 shvit_s1@128 fasternet_t0 hgnetv2_b0 convmixer_768_32
"""
TORCHVISION = """
    resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2
    mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf
    shufflenet_v2_x0_5 shufflenet_v2_x1_0 googlenet inception_v3@160 mnasnet1_0 vgg11_bn
    deeplabv3_resnet50 deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large
    r3d_18@8x32x32 mc3_18@8x32x32 r2plus1d_18@8x32x32 s3d@16x64x64 retinanet_resnet50_fpn_v2
    fasterrcnn_resnet50_fpn_v2 ssdlite320_mobilenet_v3_large
"""
PYTORCHCV = """
    efficientnet_b0 preresnet18 sepreresnet18 bam_resnet18 cbam_resnet18 bagnet9 bninception
    darknet_tiny densenet40_k12_cifar10@32 diaresnet10 drnc26 espnetv2_wd2 fdmobilenet_wd4
    hardnet39ds ibn_resnet50 igcv3_wd2 menet108_8x1_g3 mixnet_s msdnet22_cifar10@32
    nasnet_4a1056 octresnet10_ad2 peleenet proxylessnas_mobile pyramidnet110_a48_cifar10@32
    resattnet56 resnesta18 scnet50@128 senet16 shakeshakeresnet20_2x16d_cifar10@32
    shufflenet_g3_wd4 shufflenetv2_wd2 sknet50 sqnxt23_w1@128 vovnet27s xdensenet121_2
    enet_cityscapes erfnet_cityscapes lednet_cityscapes linknet_cityscapes unet_cityscapes
    quartznet5x5_en_ls simplepose_resnet18_coco
"""
SMP = """
    Unet:resnet18 Unet:efficientnet-b0 Unet:vgg11_bn Unet:mit_b0 Unet:tu-regnety_002
    UnetPlusPlus:mobilenet_v2 Linknet:resnet34 FPN:densenet121 PSPNet:resnet18
    DeepLabV3:resnet18 DeepLabV3Plus:mobilenet_v2 PAN:resnet34@128 MAnet:resnet18
    UPerNet:timm-efficientnet-b0 Segformer:mobileone_s0
"""
ULTRALYTICS = """
    yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-seg yolov8n-pose yolov8n-cls
    yolov9t yolov10n yolo11n yolo12n yolo26n
"""
MONAI: dict[str, tuple[str, Row, tuple[int, ...]]] = {
    "UNet": ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (16, 32,
        64, 128), "strides": (2, 2, 2), "num_res_units": 2, "norm": "BATCH"}, (1, 64, 64)),
    "UNet, 3D": ("UNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8,
        16, 32), "strides": (2, 2), "num_res_units": 1, "norm": "BATCH"}, (1, 32, 32, 32)),
    "AttentionUnet": ("AttentionUnet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2,
        "channels": (16, 32, 64), "strides": (2, 2)}, (1, 64, 64)),
    "BasicUNet": ("BasicUNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "norm":
        "batch"}, (1, 64, 64)),
    "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {"spatial_dims": 2, "in_channels": 1, "out_channels":
        2, "norm": "batch"}, (1, 64, 64)),
    "DenseNet121": ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 4}, (1, 64,
        64)),
    "DenseNet121, 3D": ("DenseNet121", {"spatial_dims": 3, "in_channels": 1, "out_channels": 4}, (1,
        32, 32, 32)),
    "DynUNet": ("DynUNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size":
        (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "norm_name": "batch"}, (1,
        16, 16, 16)),
    "EfficientNetBN b0": ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False,
        "spatial_dims": 2, "in_channels": 3, "num_classes": 4}, (3, 64, 64)),
    "ResNet18, 3D": ("resnet18", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 4}, (1,
        16, 16, 16)),
    "ResNet50": ("resnet50", {"spatial_dims": 2, "n_input_channels": 3, "num_classes": 4}, (3, 64,
        64)),
    "SegResNet": ("SegResNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "norm":
        "batch"}, (1, 64, 64)),
    "SEResNet50": ("SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 4}, (3, 64,
        64)),
    "VNet": ("VNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}, (1, 16, 16, 16)),
}  # fmt: skip
SMALL_RESNET = (
    "ResNetConfig",
    {
        "embedding_size": 16,
        "hidden_sizes": [32, 64, 96, 128],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
)

# The class, the class and the options of its configuration, the shape of the input.
TRANSFORMERS: dict[str, tuple[str, str, Row, tuple[int, ...]]] = {
    "ResNet-18": ("ResNetForImageClassification", "ResNetConfig", {"depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}, (3, 64, 64)),
    "ResNet-50": ("ResNetForImageClassification", "ResNetConfig", {}, (3, 64, 64)),
    "RegNet": ("RegNetForImageClassification", "RegNetConfig", {"hidden_sizes": [32, 64, 160, 384],
        "depths": [1, 2, 7, 12], "groups_width": 16}, (3, 64, 64)),
    "MobileNetV1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {}, (3, 64, 64)),
    "MobileNetV2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, (3, 64, 64)),
    "DeepLabV3+, MobileNetV2": ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {}, (3,
        64, 64)),
    "EfficientNet-B0": ("EfficientNetForImageClassification", "EfficientNetConfig",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
        "drop_connect_rate": 0.0}, (3, 64, 64)),
    "LeViT": ("LevitForImageClassification", "LevitConfig", {"image_size": 128}, (3, 128, 128)),
    "MobileViT": ("MobileViTForImageClassification", "MobileViTConfig", {}, (3, 64, 64)),
    "DeepLabV3, MobileViT": ("MobileViTForSemanticSegmentation", "MobileViTConfig", {}, (3, 64,
        64)),
    "MobileViTV2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier":
        0.5}, (3, 64, 64)),
    "SegFormer-B0": ("SegformerForSemanticSegmentation", "SegformerConfig", {}, (3, 64, 64)),
    "SwiftFormer": ("SwiftFormerForImageClassification", "SwiftFormerConfig", {}, (3, 64, 64)),
    "CvT": ("CvtForImageClassification", "CvtConfig", {}, (3, 64, 64)),
    "HGNetV2": ("HGNetV2ForImageClassification", "HGNetV2Config", {}, (3, 64, 64)),
    "TextNet": ("TextNetForImageClassification", "TextNetConfig", {}, (3, 64, 64)),
    "PP-LCNet": ("PPLCNetForImageClassification", "PPLCNetConfig", {}, (3, 64, 64)),
    "UperNet, ResNet": ("UperNetForSemanticSegmentation", "UperNetConfig", {"backbone_config":
        SMALL_RESNET, "hidden_size": 64, "auxiliary_in_channels": 96, "auxiliary_channels": 32}, (3,
        64, 64)),
    "RT-DETR": ("RTDetrForObjectDetection", "RTDetrConfig", {"freeze_backbone_batch_norms": False,
        "num_queries": 20, "decoder_layers": 2}, (3, 64, 64)),
    "D-FINE": ("DFineForObjectDetection", "DFineConfig", {"freeze_backbone_batch_norms": False,
        "num_queries": 20, "decoder_layers": 2}, (3, 64, 64)),
    "Wav2Vec2-Conformer": ("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", {"hidden_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192,
        "apply_spec_augment": False, "layerdrop": 0.0}, (8000,)),
}  # fmt: skip
Made = tuple[nn.Module, Any]


def images(size: str) -> Tensor:
    extents = [int(n) for n in size.split("x")] if size else [SIZE]
    return torch.randn(BATCH, 3, *(2 * extents if len(extents) == 1 else extents))


def timm_model(name: str, size: str) -> Made:
    import timm

    # Models with a fixed size of image can be created for another one.
    sized = re.match("levit|botnet|visformer", name)
    return timm.create_model(name, **{"img_size": int(size)} if sized else {}), images(size)


class Detector(nn.Module):
    """A detector that ends at its heads.

    What follows them is not differentiated, and needs operators that torchvision may lack.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def torchvision_model(name: str, size: str) -> Made:
    options: Row = {"googlenet": {"init_weights": True}}.get(name, {})
    if name.startswith("inception"):  # its auxiliary head needs an image of 299
        options = {"init_weights": True, "aux_logits": False}
    detects = re.search("fpn|ssd", name)
    if detects or re.search("deeplab|fcn|lraspp", name):
        options["weights_backbone"] = None
    if detects:
        options["trainable_backbone_layers"] = 6 if "mobilenet" in name else 5
    model = _torchvision.models().get_model(name, weights=None, **options)
    if name == "s3d":  # its pool takes 7² positions
        model.avgpool = nn.AdaptiveAvgPool3d(1)
    return Detector(model) if detects else model, images(size)


def pytorchcv_model(name: str, size: str) -> Made:
    from pytorchcv.model_provider import get_model

    if name.startswith("quartznet"):  # takes sound: features and their lengths
        model = get_model(name, from_audio=False)
        return model, (torch.randn(BATCH, 64, 128), torch.full((BATCH,), 128))
    sized = re.search("cityscapes|coco|dice|msd", name)
    model = get_model(name, **{"in_size": 2 * (int(size or SIZE),)} if sized else {})
    for module in list(model.modules()):
        for child, pool in module.named_children():
            if isinstance(pool, nn.AvgPool2d) and pool.kernel_size >= 7:  # a whole map, at 224²
                setattr(module, child, nn.AdaptiveAvgPool2d(1))
    return model, images(size)


def smp_model(name: str, size: str) -> Made:
    import segmentation_models_pytorch as smp

    decoder, encoder = name.split(":")
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=4), images(size)


def monai_model(name: str, size: str) -> Made:
    import monai.networks.nets as nets

    kind, options, shape = MONAI[name]
    return getattr(nets, kind)(**options), torch.randn(BATCH, *shape)


def ultralytics_model(name: str, size: str) -> Made:
    from ultralytics.nn import tasks

    kinds = {"seg": "Segmentation", "pose": "Pose", "obb": "OBB", "cls": "Classification"}
    kind = kinds.get(name.rpartition("-")[2], "Detection")
    return getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False), images(size)


def transformers_model(name: str, size: str) -> Made:
    import transformers

    kind, config, options, shape = TRANSFORMERS[name]
    options = {
        key: getattr(transformers, value[0])(**value[1]) if key == "backbone_config" else value
        for key, value in options.items()
    }
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return model, {model.main_input_name: torch.randn(BATCH, *shape)}


@dataclass(frozen=True)
class Entry:
    library: str
    name: str
    size: str
    make: Callable[[str, str], Made]

    @property
    def key(self) -> str:
        return f"{self.library} {self.name}"


def entries() -> list[Entry]:
    rows = [
        ("monai", monai_model, MONAI),
        ("pytorchcv", pytorchcv_model, PYTORCHCV.split()),
        ("segmentation_models_pytorch", smp_model, SMP.split()),
        ("timm", timm_model, TIMM.split()),
        ("torchvision", torchvision_model, TORCHVISION.split()),
        ("transformers", transformers_model, TRANSFORMERS),
        ("ultralytics", ultralytics_model, ULTRALYTICS.split()),
    ]
    return [
        Entry(library, *name.partition("@")[::2], make)
        for library, make, names in rows
        for name in sorted(names)
    ]
