"""The GPU table and torch's names of devices."""

import pytest

from train.config.gpus import GPUS, peak_flops


@pytest.mark.parametrize("device_name, expected", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA H200", 989e12), ("NVIDIA B200", 2250e12), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_device_names(device_name, expected):
    assert peak_flops(device_name) == expected


def test_less_memory_than_on_the_label():
    for name, gpu in GPUS.items():
        label = int(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.85 * label * 1e9 < gpu.memory < 1.08 * label * 1e9
