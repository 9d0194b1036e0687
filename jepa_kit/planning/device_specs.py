"""Published peaks (dense matrix products with float32 sums) and memory of devices; those of this CPU, measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from jepa_kit.planning.peak_flops import matrix_peak


@dataclass(frozen=True)
class Device:
    """Peaks and memory of a device from its data sheet.

    Args:
        name: usual name.
        bf16_tflops, tf32_tflops, float32_tflops: dense peak (without sparsity) of matrix products in TFLOP/s, float32
            without matrix units; None if the device has no such units.
        memory_gb: in 10^9 bytes.
        source: the manufacturer's document.
    """

    name: str
    bf16_tflops: float | None
    tf32_tflops: float | None
    float32_tflops: float | None
    memory_gb: float
    source: str

    def peak(self, precision: str) -> float:
        """Return the peak of matrix products in a precision, in TFLOP/s.

        Raises:
            ValueError: the device has no units for it.
        """
        peaks = {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "float32": self.float32_tflops}
        found = peaks[precision]
        if found is None:
            others = " or ".join(f"train.precision={name}" for name, value in peaks.items() if value is not None)
            raise ValueError(
                f"train.precision (={precision!r}) is not available on {self.name}; {others} can be planned"
            )
        return found

    def given(self, peak: float | None, memory: float | None) -> Device:
        """Return the device with a user's peak (for every precision, TFLOP/s) or memory (10^9 bytes)."""
        given = self if memory is None else replace(self, memory_gb=memory)
        if peak is None:
            return given
        return replace(given, bf16_tflops=peak, tf32_tflops=peak, float32_tflops=peak, source="as given")


def this_cpu() -> Device:
    """Return this machine's CPU, with its memory and peaks measured in a few seconds."""
    cpu = torch.device("cpu")
    bf16, float32 = (matrix_peak(cpu, precision) / 1e12 for precision in ("bf16", "float32"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Device("this CPU", bf16, None, float32, memory, "measured: a large product, torch's threads")


# (dense bf16, dense TF32, float32), GB. Rates with sparsity are halved.
DEVICES: dict[str, Device] = {
    "a100-40": Device("NVIDIA A100 SXM 40 GB", 312, 156, 19.5, 40, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    "a100": Device("NVIDIA A100 SXM 80 GB", 312, 156, 19.5, 80, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    "h100": Device("NVIDIA H100 SXM", 989, 494, 67, 80, "NVIDIA H100 data sheet (1,979 and 989 with sparsity)"),
    "h200": Device("NVIDIA H200 SXM", 989, 494, 67, 141, "NVIDIA H200 data sheet (1,979 and 989 with sparsity)"),
    "b200": Device("NVIDIA B200 SXM", 2250, 1125, 75, 180, "NVIDIA HGX B200 data sheet (8: 36 and 18 PFLOP/s sparse)"),
    "l40s": Device("NVIDIA L40S", 362, 183, 91.6, 48, "NVIDIA L40S data sheet (733 and 366 with sparsity)"),
    "a10": Device("NVIDIA A10", 125, 62.5, 31.2, 24, "NVIDIA A10 data sheet (250 and 125 with sparsity)"),
    "a6000": Device(
        "NVIDIA RTX A6000", 154.8, 77.4, 38.7, 48, "NVIDIA RTX A6000 data sheet, GA102 whitepaper, table 2"
    ),
    "v100": Device(
        "NVIDIA V100 SXM2 32 GB", None, None, 15.7, 32, "NVIDIA V100 data sheet; its matrix units are fp16's"
    ),
    "t4": Device("NVIDIA T4", None, None, 8.1, 16, "NVIDIA T4 data sheet; its matrix units are fp16's"),
    # the rate of GeForce cards with float32 sums, which training needs, is half of that with float16 sums
    "3090": Device("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6, 24, "NVIDIA Ampere GA102 whitepaper, appendix A"),
    "4090": Device(
        "NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6, 24, "NVIDIA Ada GPU architecture whitepaper, appendix A"
    ),
    "5090": Device("NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8, 32, "NVIDIA RTX Blackwell whitepaper, appendix A"),
    "mi300x": Device(
        "AMD Instinct MI300X", 1307, 654, 163.4, 192, "AMD Instinct MI300X data sheet (2,615 with sparsity)"
    ),
}
