"""What accelerators can do at most, from their data sheets: for planning on devices that are not here.

Figures are of dense arithmetic, per second and per device; a link's bandwidth is that of one direction, half of what data
sheets call its total. Bytes of memory are the data sheet's gigabytes, 10^9 bytes each: a little less than there are, which
leaves room for what the driver takes. A network is one adapter for each device where the maker's own 8-device host has
that. Nobody reaches these figures: seconds that are counted with them are the least that a device could take.

Latencies are on no data sheet. They are those that NCCL assumes of its "simple" protocol in a ring (nccl, src/graph/
tuning.cc: 8.4 us, and 3.4 us over NVLink, 5.7 us over PCIe, 14 us over a network).

The figures of H100 were compared with pages that quote its sheet, NCCL's with its source. All others were written down
from knowledge of the sheets below and are still to be compared with them.

Sources:
    [H100]   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    [H200]   https://resources.nvidia.com/en-us-data-center-overview/hpc-datasheet-sc23-h200
    [A100]   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    [V100]   https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    [L4]     https://resources.nvidia.com/en-us-data-center-overview/l4-gpu-datasheet
    [DGX-H]  https://resources.nvidia.com/en-us-dgx-systems/ai-enterprise-dgx   (eight ConnectX-7 of 400 Gb/s)
    [DGX-A]  https://images.nvidia.com/aem-dam/Solutions/Data-Center/nvidia-dgx-a100-datasheet.pdf   (eight of 200 Gb/s)
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Link:
    """A connection: sending n bytes takes ``latency + n / bandwidth`` seconds."""

    bandwidth: float  # bytes per second, in one direction
    latency: float = 0.0  # seconds

    def seconds(self, nbytes: float) -> float:
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device can do at most; an operation takes the longer of its arithmetic and its memory traffic.

    Source: Williams, Waterman, Patterson, "Roofline" (CACM 2009).
    """

    flops: float  # per second, of matrix products in float32 as torch does them by default
    bandwidth: float  # bytes per second
    launch: float = 5e-6  # seconds that an operation takes at least
    half_flops: float | None = None  # per second, of matrix products in 16 bits
    tensor_float_flops: float | None = None  # the same in float32 where TF32 is allowed

    def seconds(self, flops: int, nbytes: int, half: bool = False, tensor_float: bool = False) -> float:
        """Seconds of an operation.

        Args:
            half: its numbers have 16 bits.
            tensor_float: float32 products may be rounded to TF32.
        """
        if not flops and not nbytes:
            return 0.0  # a view
        peak = (half and self.half_flops) or (tensor_float and self.tensor_float_flops) or self.flops
        return max(self.launch, flops / peak, nbytes / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A kind of device, and how two of them are connected."""

    roofline: Roofline
    memory: int  # bytes
    link: Link  # between two on one host
    network: Link  # between two on different hosts
    source: str


_NVLINK, _PCIE, _NETWORK = 11.8e-6, 14.1e-6, 22.4e-6  # seconds

ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "H100": Accelerator(  # SXM5
            Roofline(67e12, 3.35e12, half_flops=989.4e12, tensor_float_flops=494.7e12),
            80 * 10**9, Link(450e9, _NVLINK), Link(50e9, _NETWORK), "[H100], [DGX-H]",
        ),
        "H100-PCIe": Accelerator(
            Roofline(51e12, 2.0e12, half_flops=756e12, tensor_float_flops=378e12),
            80 * 10**9, Link(64e9, _PCIE), Link(50e9, _NETWORK), "[H100]; PCIe 5.0 x16",
        ),
        "H200": Accelerator(  # SXM5
            Roofline(67e12, 4.8e12, half_flops=989.4e12, tensor_float_flops=494.7e12),
            141 * 10**9, Link(450e9, _NVLINK), Link(50e9, _NETWORK), "[H200], [DGX-H]",
        ),
        "A100-80GB": Accelerator(  # SXM4
            Roofline(19.5e12, 2.039e12, half_flops=312e12, tensor_float_flops=156e12),
            80 * 10**9, Link(300e9, _NVLINK), Link(25e9, _NETWORK), "[A100], [DGX-A]",
        ),
        "A100-40GB": Accelerator(  # SXM4
            Roofline(19.5e12, 1.555e12, half_flops=312e12, tensor_float_flops=156e12),
            40 * 10**9, Link(300e9, _NVLINK), Link(25e9, _NETWORK), "[A100], [DGX-A]",
        ),
        "V100-32GB": Accelerator(  # SXM2
            Roofline(15.7e12, 0.9e12, half_flops=125e12),
            32 * 10**9, Link(150e9, _NVLINK), Link(12.5e9, _NETWORK), "[V100]; a network of 100 Gb/s",
        ),
        "V100-16GB": Accelerator(  # SXM2
            Roofline(15.7e12, 0.9e12, half_flops=125e12),
            16 * 10**9, Link(150e9, _NVLINK), Link(12.5e9, _NETWORK), "[V100]; a network of 100 Gb/s",
        ),
        "L4": Accelerator(
            Roofline(30.3e12, 0.3e12, half_flops=121e12, tensor_float_flops=60e12),
            24 * 10**9, Link(32e9, _PCIE), Link(12.5e9, _NETWORK), "[L4]; PCIe 4.0 x16, a network of 100 Gb/s",
        ),
    }
)  # fmt: skip
