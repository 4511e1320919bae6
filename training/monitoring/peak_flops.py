"""Peak FLOP/s of known GPUs, for model FLOPs utilization (MFU).

The figures are from the vendor's data sheets, for dense matrix products: bfloat16 on tensor cores with float32
accumulation, and float32 without tensor cores (torch's default). CPUs have none, as their throughput
depends on other programs; `seqmix bench` measures their peak rate beside each call.
"""

import re

import torch

TERA = 1e12

# the first key found in the device name counts, so a longer key comes before its prefix
PEAKS: dict[str, tuple[float, float]] = {
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "GH200": (989, 67),
    "H200 NVL": (836, 60),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "A10G": (70, 35),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
}
"""Peak TFLOP/s in bfloat16 and in float32, by a part of the device name."""


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device in a precision; None if unknown."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a GPU by its device name; None if unknown."""
    for key, (bfloat16, float32) in PEAKS.items():
        # a laptop GPU has the name of a faster desktop GPU
        if re.search(rf"(?<![\w-]){key}(?!\w)", name) and "Laptop" not in name:
            return TERA * (bfloat16 if precision is torch.bfloat16 else float32)
    return None
