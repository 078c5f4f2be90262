"""What a card and its links can do. Datasheet numbers; the share of them that is reached is stated
by the plan as an assumption. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from reinforcer_tp.config_check import ConfigError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One card. Rates in their unit, to and from others in one direction."""

    name: str
    tflops: float  # dense, 16 bits with float32 accumulate
    tflops_float32: float  # without TF32
    memory_gib: float
    memory_gb_s: float
    link_gb_s: float  # to a card of the same node: NVLink, or PCIe
    network_gb_s: float = 50.0  # to a card of another node; one 400 Gb/s adapter each
    is_gpu: bool = True


# Datasheets: nvidia.com/en-us/data-center/{a100,h100,h200,hgx,l40s}; memory as nvidia-smi shows it.
_KNOWN = {
    "a100": Device(
        name="A100 SXM 80GB", tflops=312, tflops_float32=19.5, memory_gib=79.2, memory_gb_s=2039,
        link_gb_s=300, network_gb_s=25,
    ),
    "a100-40gb": Device(
        name="A100 SXM 40GB", tflops=312, tflops_float32=19.5, memory_gib=39.4, memory_gb_s=1555,
        link_gb_s=300, network_gb_s=25,
    ),
    "h100": Device(
        name="H100 SXM 80GB", tflops=989, tflops_float32=67, memory_gib=79.2, memory_gb_s=3350,
        link_gb_s=450,
    ),
    "h100-pcie": Device(
        name="H100 PCIe 80GB", tflops=756, tflops_float32=51, memory_gib=79.2, memory_gb_s=2000,
        link_gb_s=64,
    ),
    "h200": Device(
        name="H200 SXM 141GB", tflops=989, tflops_float32=67, memory_gib=139.8, memory_gb_s=4800,
        link_gb_s=450,
    ),
    "b200": Device(
        name="B200 180GB", tflops=2250, tflops_float32=75, memory_gib=178.0, memory_gb_s=7700,
        link_gb_s=900,
    ),
    "l40s": Device(
        name="L40S 48GB", tflops=362, tflops_float32=91.6, memory_gib=44.5, memory_gb_s=864,
        link_gb_s=32, network_gb_s=25,
    ),
    "rtx4090": Device(
        name="RTX 4090 24GB", tflops=165, tflops_float32=82.6, memory_gib=23.5, memory_gb_s=1008,
        link_gb_s=32, network_gb_s=12.5,
    ),
    # Rates of two cores of a server; --tflops and the others say what yours are.
    "cpu": Device(
        name="CPU", tflops=0.2, tflops_float32=0.1, memory_gib=16, memory_gb_s=15, link_gb_s=5,
        network_gb_s=1, is_gpu=False,
    ),
}  # fmt: skip
RATES = ("tflops", "memory_gib", "memory_gb_s", "link_gb_s", "network_gb_s")
NEEDED = ("tflops", "memory_gib", "memory_gb_s", "link_gb_s")  # of a card that is not known


def find_device(name: str, rates: dict[str, float | None]) -> Device:
    """The card `name`, with those of its `rates` (names in RATES) that are given.

    Raises ConfigError for an unknown name without rates of its own.
    """
    given = {key: value for key, value in rates.items() if value is not None}
    for key, value in given.items():
        if not 0 < value < math.inf:
            option = key.replace("_", "-")
            raise ConfigError(f"--{option}={value:g}: expected a finite number above 0")
    if "tflops" in given:
        given["tflops_float32"] = given["tflops"]
    known = _KNOWN.get(_plain(name))
    if known is not None:
        return dataclasses.replace(known, **given)
    missing = [f"--{key.replace('_', '-')}" for key in NEEDED if key not in given]
    if missing:
        raise ConfigError(
            f"--gpu={name} is not known; expected one of {', '.join(_KNOWN)}, or the rates of "
            f"yours: {' '.join(missing)} (TFLOP/s dense in the training precision, GiB, GB/s)"
        )
    return Device(name=name, **given)


def _plain(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` (torch.cuda.get_device_name) and `H100` are h100."""
    if "MIG" in name.split():
        return name  # a part of a card has a part of its rates
    words = name.lower().replace("nvidia", " ").replace("geforce", " ").replace("-", " ").split()
    text = " ".join(words)
    if text in ("rtx 4090", "4090"):
        return "rtx4090"
    for known in sorted(_KNOWN, key=len, reverse=True):
        parts = known.replace("-", " ").split()
        # A slower variant of a card that is known must not pass for it.
        if all(part in words for part in parts) and {"nvl", "pcie"} & set(words) <= set(parts):
            return known
    return text
