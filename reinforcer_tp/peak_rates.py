"""Peak rates of GPUs: what MFU and plans are read against. Imports no torch."""

import re

# Dense TFLOP/s from NVIDIA's datasheets: tensor cores in 16 bits (float32 accumulate), and float32
# without TF32. None: a slower device whose name has that of a faster one in it.
_PEAK_TFLOPS: dict[str, tuple[float, float] | None] = {
    "A10": (125, 31.2),
    "A100": (312, 19.5),
    "H100": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "GH200": (989, 67),
    "H200": (989, 67),
    "H200 NVL": (835, 60),
    "B200": (2250, 75),
    "GB200": (2500, 80),
    "L40S": (362, 91.6),
    "RTX 4090": (165, 82.6),
    "RTX 4090 D": None,
    "RTX 4090 Laptop": None,
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The device's dense rate in float32, bfloat16 or float16, None when it is not in the table.

    `device_name` as torch.cuda.get_device_name gives it: of the names in the table that occur in it
    as whole words, the longest counts. None too for a part of a device (MIG). FP8 matrices are
    judged by the 16-bit rate as well.
    """
    found = [name for name in _PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    is_part = re.search(r"\bMIG\b", device_name)
    rates = None if is_part else _PEAK_TFLOPS.get(max(found, key=len, default=""))
    if rates is None:
        return None
    half, single = rates
    return {"float32": single, "bfloat16": half, "float16": half}[precision]
