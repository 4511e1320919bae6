"""What known GPUs can do at most, to see which share of it a model uses.

Dense products of the vendor's data sheets, in operations a second: bfloat16 by tensor cores with float32 sums; float32
by ordinary cores, as torch multiplies unless told otherwise. A CPU has no such figure: what it reaches depends on what
else runs, and is measured beside each call by `seqmix bench`.
"""

import re

import torch

TERA = 1e12

# the first name that a device's own contains: longer ones stand before their beginnings
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
"""Tera-operations a second in bfloat16 and in float32, by the name in the device's."""


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """Operations a second that the device can do in a precision; None where that is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: torch.dtype) -> float | None:
    """The same of a device by its name."""
    for known, (bfloat16, float32) in PEAKS.items():
        # a laptop's chip has the name of a larger one
        if re.search(rf"(?<![\w-]){known}(?!\w)", name) and "Laptop" not in name:
            return TERA * (bfloat16 if precision is torch.bfloat16 else float32)
    return None
