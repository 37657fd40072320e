"""What a run needs to know about GPUs: memory, speed and number formats, in one table."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. `device_name` is the part of `torch.cuda.get_device_name` that identifies it."""

    device_name: str
    memory: float  # bytes that a process can use, which is less than the number on the label
    peak_flops: float  # dense bf16 FLOP/s, from the data sheet
    has_fp8: bool


# By the name that `dry_run_gpu` takes. A device name is matched with the first entry that it contains.
GPUS = {
    "a100-40gb": GPU("A100", 39.4 * GIB, 312e12, has_fp8=False),
    "a100-80gb": GPU("A100", 79.1 * GIB, 312e12, has_fp8=False),
    "h100-pcie-80gb": GPU("H100 PCIe", 79.1 * GIB, 756e12, has_fp8=True),
    "h100-80gb": GPU("H100", 79.1 * GIB, 989e12, has_fp8=True),
    "h200-141gb": GPU("H200", 139.8 * GIB, 989e12, has_fp8=True),
    "b200-192gb": GPU("B200", 178.0 * GIB, 2250e12, has_fp8=True),
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that torch calls `device_name`, or None if it is not in the table."""
    return next((gpu.peak_flops for gpu in GPUS.values() if gpu.device_name in device_name), None)
