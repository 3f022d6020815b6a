"""The mean over positions in fused models, with PyTorch's own numbers.

The gradient of a mean over positions is one value for all of them. PyTorch divides it by their number where it is a map already,
and so makes one, which is then added to that of the map's other readers (squeeze-and-excitation): divided before it is
expanded, no map is made.
"""

import torch
from torch import Tensor


def position_mean(input: Tensor, dims: list[int]) -> Tensor:
    """``input.mean(dims, keepdim=True)``, to the bit, and so its gradient. Of half types it is that: their mean is taken in
    float, and no gradient is cast before it is expanded."""
    if input.dtype == torch.float16 or input.dtype == torch.bfloat16:
        return input.mean(dims, keepdim=True)
    count = 1
    for d in dims:
        count *= input.size(d)
    return input.sum(dims, keepdim=True, dtype=input.dtype) / count
