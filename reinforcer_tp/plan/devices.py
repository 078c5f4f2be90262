"""What a card and its links can do. Datasheet numbers; the share of them that is reached is stated
by the plan as an assumption. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.peak_rates import peak_tflops


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

    def rate(self, precision: str) -> float:
        """TFLOP/s in `policy.precision`."""
        return self.tflops_float32 if precision == "float32" else self.tflops


def _gpu(name: str, memory_gib: float, **rates: float) -> Device:
    half, single = (peak_tflops(name, precision) for precision in ("bfloat16", "float32"))
    assert half is not None and single is not None, name
    return Device(name=name, tflops=half, tflops_float32=single, memory_gib=memory_gib, **rates)


# Datasheets: nvidia.com/en-us/data-center/{a100,h100,h200,hgx,l40s}; memory as nvidia-smi shows it.
_KNOWN = {
    "a100": _gpu("A100 SXM 80GB", 79.2, memory_gb_s=2039, link_gb_s=300, network_gb_s=25),
    "a100-40gb": _gpu("A100 SXM 40GB", 39.4, memory_gb_s=1555, link_gb_s=300, network_gb_s=25),
    "h100": _gpu("H100 SXM 80GB", 79.2, memory_gb_s=3350, link_gb_s=450),
    "h100-pcie": _gpu("H100 PCIe 80GB", 79.2, memory_gb_s=2000, link_gb_s=64),
    "h200": _gpu("H200 SXM 141GB", 139.8, memory_gb_s=4800, link_gb_s=450),
    "b200": _gpu("B200 180GB", 178.0, memory_gb_s=7700, link_gb_s=900),
    "l40s": _gpu("L40S 48GB", 44.5, memory_gb_s=864, link_gb_s=32, network_gb_s=25),
    "rtx4090": _gpu("RTX 4090 24GB", 23.5, memory_gb_s=1008, link_gb_s=32, network_gb_s=12.5),
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
