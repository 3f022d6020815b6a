"""Conv → BatchNorm → activation as one operator that saves one feature map for backward where eager
saves two."""

from . import _library

build_info = _library.build_info
_library.load()

from . import dtensor, flops
from .conversion import fold, revert_sync_batchnorm
from .functional import conv_bn
from .fusion.api import fuse, is_fused, unfuse
from .fusion.fit import Fit, PlanFit, fit
from .fusion.report import ChainReport, FrontPoint, MapReport, Report, explain
from .fusion.rescue import rescue
from .fusion.sequential import FusedConvBNSequential
from .memory import MemoryReport, empty_cache, track_memory
from .modules import (
    FusedConvBN,
    FusedConvBN1d,
    FusedConvBN2d,
    FusedConvBN3d,
    FusedConvTransposeBN1d,
    FusedConvTransposeBN2d,
    FusedConvTransposeBN3d,
)
from .recompute_check import check_recompute

dtensor.register()
flops.register()

__version__ = "0.2.0"

__all__ = [
    "ChainReport",
    "Fit",
    "FrontPoint",
    "FusedConvBN",
    "FusedConvBN1d",
    "FusedConvBN2d",
    "FusedConvBN3d",
    "FusedConvBNSequential",
    "FusedConvTransposeBN1d",
    "FusedConvTransposeBN2d",
    "FusedConvTransposeBN3d",
    "MapReport",
    "MemoryReport",
    "PlanFit",
    "Report",
    "build_info",
    "check_recompute",
    "conv_bn",
    "empty_cache",
    "explain",
    "fit",
    "fold",
    "fuse",
    "is_fused",
    "rescue",
    "revert_sync_batchnorm",
    "track_memory",
    "unfuse",
]
