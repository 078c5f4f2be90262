"""Writes small GGUF files byte by byte, and decodes a weight at a time: what tests compare with."""

import math
import struct
from typing import Any

NUMBERS = {
    "B": 0,
    "b": 1,
    "H": 2,
    "h": 3,
    "I": 4,
    "i": 5,
    "f": 6,
    "?": 7,
    "Q": 10,
    "q": 11,
    "d": 12,
}
TEXT, LIST = 8, 9
KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_1": (3, 32, 20), "Q8_0": (8, 32, 34)}


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def value(kind: str, content: Any) -> bytes:
    """`kind`: a letter of struct, "text", or "list of " one of them."""
    if kind.startswith("list of "):
        kind = kind.removeprefix("list of ")
        number = TEXT if kind == "text" else NUMBERS[kind]
        items = [
            text(item) if kind == "text" else struct.pack(f"<{kind}", item) for item in content
        ]
        return struct.pack("<IIQ", LIST, number, len(items)) + b"".join(items)
    if kind == "text":
        return struct.pack("<I", TEXT) + text(content)
    return struct.pack(f"<I{kind}", NUMBERS[kind], content)


def num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    _, block, size = KINDS[kind]
    return math.prod(shape) // block * size


def gguf_file(
    metadata: dict[str, tuple[str, Any]], tensors: dict[str, tuple], alignment=32
) -> bytes:
    """`metadata`: key -> (kind, value). `tensors`: name -> (kind, shape slowest first, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, (kind, content) in metadata.items():
        head += text(key) + value(kind, content)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        data += bytes(-len(data) % alignment)
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + sizes
        head += struct.pack("<IQ", KINDS[kind][0], len(data))
        data += content
    return head + bytes(-len(head) % alignment) + data


def weight(kind: str, content: bytes, index: int) -> float:
    """One weight of a tensor's bytes, rounded to float32 after each step."""
    _, block, size = KINDS[kind]
    start, i = index // block * size, index % block
    if kind in ("F32", "F16"):
        return struct.unpack_from("<f" if kind == "F32" else "<e", content, start)[0]
    if kind == "Q8_0":
        (scale,) = struct.unpack_from("<e", content, start)
        return float32(scale * struct.unpack_from("<b", content, start + 2 + i)[0])
    scale, least = struct.unpack_from("<ee", content, start)
    byte = content[start + 4 + i % 16]
    return float32(float32(scale * (byte % 16 if i < 16 else byte // 16)) + least)


def float32(number: float) -> float:
    return struct.unpack("<f", struct.pack("<f", number))[0]
