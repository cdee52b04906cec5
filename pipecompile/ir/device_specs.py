"""Peak figures of accelerators from their data sheets, for planning on devices that are not available.

Arithmetic throughput is dense, per second and per device, with 16-bit products accumulated in float32, as torch does. Some
sheets print twice that first. A link's bandwidth is that of one direction between two devices, half of what sheets call the
total: the full rate through switches, two of a V100's six NVLinks in the mesh of its usual hosts. Bridges between two cards
are not counted. Memory is the sheet's gigabytes (10^9 bytes), minus a sixteenth on cards whose ECC stores its bits in GDDR
memory. That is 4 to 7 % less than the device reports, which leaves room for the driver. The network is one adapter per device
if the vendor's own 8-device host has that. Otherwise it is an assumed adapter of the stated rate, shared by a host's devices.
Real kernels do not reach these figures: seconds computed from them are lower bounds.

Data sheets do not state latencies. The ones here are those that NCCL assumes for its "simple" protocol in a ring (nccl,
src/graph/tuning.cc: 8.4 us, plus 3.4 us over NVLink, 5.7 us over PCIe, 14 us over a network).

All figures were checked against public pages that quote the sheets, not against the sheets themselves; NCCL's against its
source.

Sources:
    [H100]   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    [H200]   https://resources.nvidia.com/en-us-data-center-overview/hpc-datasheet-sc23-h200
    [HGX]    https://www.nvidia.com/en-us/data-center/hgx/   (of eight, with sparsity: a sixteenth is one, dense)
    [A100]   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
             and, of 40 GB, https://developer.nvidia.com/blog/nvidia-ampere-architecture-in-depth/
    [V100]   https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    [L40S]   https://www.nvidia.com/en-us/data-center/l40s/
    [L4]     https://www.nvidia.com/en-us/data-center/l4/   (arithmetic with sparsity)
    [A10G]   https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf
    [T4]     https://www.nvidia.com/en-us/data-center/tesla-t4/
    [GA102]  https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    [Ada]    https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    [RTX-B]  https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
    [DGX-B]  https://www.nvidia.com/en-us/data-center/dgx-b200/   (eight ConnectX-7 of 400 Gb/s)
    [DGX-H]  https://resources.nvidia.com/en-us-dgx-systems/ai-enterprise-dgx   (the same)
    [DGX-A]  https://images.nvidia.com/aem-dam/Solutions/Data-Center/nvidia-dgx-a100-datasheet.pdf   (eight of 200 Gb/s)
    [DGX-1]  https://images.nvidia.com/content/pdf/dgx1-v100-system-architecture-whitepaper.pdf   (25 GB/s an NVLink)
    [ECC]    https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/   (theoretical bandwidth calculation)
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
    """Peak rates of a device. An operation takes the longer of its arithmetic time and its memory time.

    Source: Williams, Waterman, Patterson, "Roofline" (CACM 2009).
    """

    flops: float  # per second, matrix products in float32 with torch's defaults
    bandwidth: float  # bytes per second
    launch: float = 5e-6  # minimum seconds of an operation
    half_flops: float | None = None  # per second, matrix products in 16 bits
    tensor_float_flops: float | None = None  # per second, matrix products in float32 if TF32 is allowed

    def seconds(self, flops: int, nbytes: int, half: bool = False, tensor_float: bool = False) -> float:
        """Returns the seconds of an operation.

        Args:
            flops: arithmetic operations.
            nbytes: bytes that it reads and writes.
            half: the operands have 16 bits.
            tensor_float: float32 products may use TF32.
        """
        if not flops and not nbytes:
            return 0.0  # a view
        peak = (half and self.half_flops) or (tensor_float and self.tensor_float_flops) or self.flops
        return max(self.launch, flops / peak, nbytes / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A kind of device, and the links between two of them."""

    roofline: Roofline
    memory: int  # bytes
    link: Link  # between two on the same host
    network: Link  # between two on different hosts
    host: Link  # to the memory of its host, in one direction
    source: str


_NVLINK, _PCIE, _NETWORK = 11.8e-6, 14.1e-6, 22.4e-6  # seconds
_PCIE_3, _PCIE_4, _PCIE_5 = (Link(bandwidth, _PCIE) for bandwidth in (16e9, 32e9, 64e9))  # of 16 lanes
_NET_100, _NET_200, _NET_400 = (Link(bandwidth, _NETWORK) for bandwidth in (12.5e9, 25e9, 50e9))  # named by Gb/s
_GB, _GB_ECC = 10**9, 10**9 * 15 // 16  # bytes; the second if ECC bits are stored in GDDR memory [ECC]

ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "B200": Accelerator(  # SXM6
            Roofline(75e12, 8.0e12, half_flops=2250e12, tensor_float_flops=1125e12),
            180 * _GB, Link(900e9, _NVLINK), _NET_400, _PCIE_5, "[HGX], [DGX-B]",
        ),
        "H200": Accelerator(  # SXM5
            Roofline(67e12, 4.8e12, half_flops=989.4e12, tensor_float_flops=494.7e12),
            141 * _GB, Link(450e9, _NVLINK), _NET_400, _PCIE_5, "[H200], [DGX-H]",
        ),
        "H100": Accelerator(  # SXM5
            Roofline(67e12, 3.35e12, half_flops=989.4e12, tensor_float_flops=494.7e12),
            80 * _GB, Link(450e9, _NVLINK), _NET_400, _PCIE_5, "[H100], [DGX-H]",
        ),
        "H100-PCIe": Accelerator(
            Roofline(51e12, 2.0e12, half_flops=756e12, tensor_float_flops=378e12),
            80 * _GB, _PCIE_5, _NET_400, _PCIE_5, "[H100]; PCIe 5.0, a network of 400 Gb/s",
        ),
        "A100-80GB": Accelerator(  # SXM4
            Roofline(19.5e12, 2.039e12, half_flops=312e12, tensor_float_flops=156e12),
            80 * _GB, Link(300e9, _NVLINK), _NET_200, _PCIE_4, "[A100], [DGX-A]",
        ),
        "A100-40GB": Accelerator(  # SXM4
            Roofline(19.5e12, 1.555e12, half_flops=312e12, tensor_float_flops=156e12),
            40 * _GB, Link(300e9, _NVLINK), _NET_200, _PCIE_4, "[A100], [DGX-A]",
        ),
        "V100-32GB": Accelerator(  # SXM2
            Roofline(15.7e12, 0.9e12, half_flops=125e12),
            32 * _GB, Link(50e9, _NVLINK), _NET_100, _PCIE_3, "[V100], [DGX-1]; a network of 100 Gb/s",
        ),
        "V100-16GB": Accelerator(  # SXM2
            Roofline(15.7e12, 0.9e12, half_flops=125e12),
            16 * _GB, Link(50e9, _NVLINK), _NET_100, _PCIE_3, "[V100], [DGX-1]; a network of 100 Gb/s",
        ),
        "L40S": Accelerator(
            Roofline(91.6e12, 0.864e12, half_flops=362.05e12, tensor_float_flops=183e12),
            48 * _GB_ECC, _PCIE_4, _NET_100, _PCIE_4, "[L40S]; PCIe 4.0, a network of 100 Gb/s",
        ),
        "L4": Accelerator(
            Roofline(30.3e12, 0.3e12, half_flops=121e12, tensor_float_flops=60e12),
            24 * _GB_ECC, _PCIE_4, _NET_100, _PCIE_4, "[L4]; PCIe 4.0, a network of 100 Gb/s",
        ),
        "A10G": Accelerator(
            Roofline(35e12, 0.6e12, half_flops=70e12, tensor_float_flops=35e12),
            24 * _GB_ECC, _PCIE_4, _NET_100, _PCIE_4, "[A10G]; PCIe 4.0, a network of 100 Gb/s",
        ),
        "T4": Accelerator(
            Roofline(8.1e12, 0.32e12, half_flops=65e12),
            16 * _GB_ECC, _PCIE_3, _NET_100, _PCIE_3, "[T4]; PCIe 3.0, a network of 100 Gb/s",
        ),
        "A6000": Accelerator(  # RTX A6000, of the Ampere generation
            Roofline(38.7e12, 0.768e12, half_flops=154.8e12, tensor_float_flops=77.4e12),
            48 * _GB_ECC, _PCIE_4, _NET_100, _PCIE_4, "[GA102]; PCIe 4.0, a network of 100 Gb/s",
        ),
        "RTX-5090": Accelerator(
            Roofline(104.8e12, 1.792e12, half_flops=209.5e12, tensor_float_flops=104.8e12),
            32 * _GB, _PCIE_5, _NET_100, _PCIE_5, "[RTX-B]; PCIe 5.0, a network of 100 Gb/s",
        ),
        "RTX-4090": Accelerator(
            Roofline(82.6e12, 1.008e12, half_flops=165.2e12, tensor_float_flops=82.6e12),
            24 * _GB, _PCIE_4, _NET_100, _PCIE_4, "[Ada]; PCIe 4.0, a network of 100 Gb/s",
        ),
        "RTX-3090": Accelerator(
            Roofline(35.6e12, 0.936e12, half_flops=71e12, tensor_float_flops=35.6e12),
            24 * _GB, _PCIE_4, _NET_100, _PCIE_4, "[GA102]; PCIe 4.0, a network of 100 Gb/s",
        ),
    }
)  # fmt: skip
