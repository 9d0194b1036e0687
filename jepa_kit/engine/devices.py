"""What makers say of their devices: dense bf16 matrix products with float32 sums, and memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device as its data sheet has it.

    Args:
        name: what people call it.
        bf16_tflops: dense (without sparsity), in TFLOP/s.
        memory_gb: in 10^9 bytes.
        source: the maker's document.
    """

    name: str
    bf16_tflops: float
    memory_gb: float
    source: str


DEVICES: dict[str, Device] = {
    "a100-40": Device("NVIDIA A100 SXM 40 GB", 312, 40, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    "a100": Device("NVIDIA A100 SXM 80 GB", 312, 80, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    "h100": Device("NVIDIA H100 SXM", 989, 80, "NVIDIA H100 Tensor Core GPU data sheet (1,979 with sparsity)"),
    "h200": Device("NVIDIA H200 SXM", 989, 141, "NVIDIA H200 Tensor Core GPU data sheet (1,979 with sparsity)"),
    "b200": Device("NVIDIA B200 SXM", 2250, 180, "NVIDIA HGX B200 data sheet (4,500 with sparsity; 1.44 TB for 8)"),
    "l40s": Device("NVIDIA L40S", 362, 48, "NVIDIA L40S data sheet (733 with sparsity)"),
    "mi300x": Device("AMD Instinct MI300X", 1307, 192, "AMD Instinct MI300X data sheet (2,615 with sparsity)"),
}
