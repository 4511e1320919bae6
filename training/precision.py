"""The dtype of matrix products in training.

`auto` depends on the device alone, so that a run has the same dtype by itself, in a study, from Python, and on a busy
machine.
"""

import torch

from ..ops.recurrence import products
from .config import TrainingConfig


def precision_of(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products on a device: for `auto`, bfloat16 where the device multiplies it faster."""
    if settings.precision == "auto":
        has_bfloat16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else products.HAS_BFLOAT16
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
