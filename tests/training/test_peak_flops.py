"""Peak FLOP/s of GPUs, looked up by the name the driver reports."""

import pytest
import torch

from seqmix.training.monitoring.peak_flops import PEAKS, peak_flops, peak_of

DEVICES = {
    **{"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989},
    **{"NVIDIA H200 NVL": 836, "NVIDIA GH200 480GB": 989, "NVIDIA B200": 2250, "NVIDIA A100-SXM4-80GB": 312},
    **{"NVIDIA A100 80GB PCIe": 312, "NVIDIA A10G": 70, "NVIDIA L4": 121, "NVIDIA L40S": 362},
    **{"NVIDIA GeForce RTX 4090": 165, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA L40": None},
    **{"NVIDIA A10": None, "Some Other Device": None},
}


@pytest.mark.parametrize("name", DEVICES)
def test_peak_flops_are_looked_up_by_device_name(name):
    expected = DEVICES[name]
    assert peak_of(name, torch.bfloat16) == (None if expected is None else expected * 1e12)


def test_float32_peak_is_below_bfloat16_peak_and_cpu_peak_is_unknown():
    assert peak_of("NVIDIA H100 80GB HBM3", torch.float32) == 67e12
    assert all(float32 < bfloat16 for bfloat16, float32 in PEAKS.values())
    assert peak_flops(torch.device("cpu"), torch.float32) is None
