"""GGUF files: what is in them, and their tensors as float32. Little-endian versions 2 and 3.

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    each key:     name, type u32, value        (a text: length u64, UTF-8)
    each tensor:  name, number of dimensions u32, dimensions u64 (fastest first), type u32,
                  offset u64
    padding to general.alignment; then the tensors' data, each at its offset from there

Blocks of 32 weights: Q8_0 is a scale d (float16) and 32 int8 q, w = d q. Q4_1 is d, m (float16) and
16 bytes, w = d q + m, where byte i has q of weight i in its low and of weight i + 16 in its high
four bits. Source: ggml's docs/gguf.md. A file is not trusted: each length is held against what is
left of it before anything is read, and every error is a ValueError in one line.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSIONS = (2, 3)  # 1 had 32-bit lengths
SCALARS = {  # number of a value's type -> struct's letter
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, LIST = 8, 9
MAX_DIMENSIONS = 4
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("q", "i1", 32)])
# Number of a tensor's type -> its name, weights in a block, layout of a block.
TENSOR_TYPES = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    3: ("Q4_1", 32, Q4_1),
    8: ("Q8_0", 32, Q8_0),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]  # slowest first, as in torch
    kind: str  # F32, F16, Q4_1 or Q8_0
    blocks: np.ndarray  # of the kind's layout, a view of the file's content


@dataclass(frozen=True, kw_only=True)
class Gguf:
    metadata: dict[str, Any]  # numbers, truth values, texts and lists of one of them
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads on from a place in `content`, and never past its end."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0

    def take(self, size: int, what: str) -> bytes:
        left = len(self.content) - self.position
        if size > left:
            raise ValueError(
                f"GGUF: {what} takes {size:,} bytes at byte {self.position:,}, where {left:,} are "
                "left; expected a whole file; get it again"
            )
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, letter: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))
        return value

    def text(self, what: str) -> str:
        content = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"GGUF: {what} is no text ({error.reason}); expected UTF-8") from None


def parse_gguf(content: bytes) -> Gguf:
    """Metadata and tensors (not decoded yet) of a file's content.

    Raises ValueError: no GGUF file, another version or byte order, a length or offset past the end,
    a name twice, tensors on top of each other, a type that is not built.
    """
    cursor = _Cursor(content)
    if cursor.take(4, "the magic") != b"GGUF":
        raise ValueError(f"GGUF: the file begins with {content[:4]!r}; expected b'GGUF'")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = " (its bytes are big-endian)" if swapped in VERSIONS else ""
        raise ValueError(f"GGUF: version {version}{order}; expected 2 or 3, little-endian")
    num_tensors = cursor.number("Q", "the number of tensors")
    num_keys = cursor.number("Q", "the number of keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):  # each takes 13 bytes at least: the file's end ends it
        key = cursor.text("a key")
        _check_new(key, metadata, "key")
        metadata[key] = _value(cursor, f"the value of {key[:80]!r}")
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.text("a tensor's name")
        _check_new(name, infos, "tensor")
        infos[name] = _tensor_info(cursor, name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"GGUF: general.alignment={alignment!r}; expected a power of 2 from 8 on")
    start = math.ceil(cursor.position / alignment) * alignment
    return Gguf(metadata=metadata, tensors=_tensors(content, infos, start, alignment))


def _check_new(name: str, known: dict, what: str) -> None:
    if name in known:
        raise ValueError(f"GGUF: the {what} {name[:80]!r} occurs twice; expected once")


def _value(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number("I", what)
    if kind != LIST:
        return _item(cursor, kind, what)
    item_kind, length = cursor.number("I", what), cursor.number("Q", what)
    if item_kind in SCALARS:
        letter = SCALARS[item_kind]
        size = struct.calcsize(f"<{letter}")
        return list(struct.unpack(f"<{length}{letter}", cursor.take(length * size, what)))
    return [_item(cursor, item_kind, what) for _ in range(length)]


def _item(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], what)
    if kind == TEXT:
        return cursor.text(what)
    raise ValueError(
        f"GGUF: {what} is of type {kind}; expected a number, a truth value, a text, or "
        "a list of one of them"
    )


def _tensor_info(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """(shape, number of the type, offset)."""
    what = f"the description of the tensor {name[:80]!r}"
    num_dimensions = cursor.number("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"GGUF: {what} has {num_dimensions} dimensions; expected 1 to 4")
    shape = tuple(cursor.number("Q", what) for _ in range(num_dimensions))[::-1]
    kind = cursor.number("I", what)
    if kind not in TENSOR_TYPES:
        names = ", ".join(f"{name} ({number})" for number, (name, *_) in TENSOR_TYPES.items())
        raise ValueError(f"GGUF: {what} has type {kind}, which is not built; expected {names}")
    _, block_size, _ = TENSOR_TYPES[kind]
    if 0 in shape or shape[-1] % block_size:
        raise ValueError(
            f"GGUF: {what} has shape {shape}; expected rows of a multiple of {block_size} weights"
        )
    return shape, kind, cursor.number("Q", what)


def _tensors(content: bytes, infos: dict, start: int, alignment: int) -> dict[str, GgufTensor]:
    tensors, free = {}, 0
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        type_name, block_size, layout = TENSOR_TYPES[kind]
        num_blocks = math.prod(shape) // block_size
        end = offset + num_blocks * layout.itemsize
        if offset % alignment or offset < free or start + end > len(content):
            raise ValueError(
                f"GGUF: the tensor {name[:80]!r} takes bytes {offset:,} to {end:,} of the data; "
                f"expected a multiple of {alignment} from {free:,} on, and an end of at most "
                f"{max(0, len(content) - start):,}; get the file again"
            )
        blocks = np.frombuffer(content, layout, num_blocks, start + offset)
        tensors[name] = GgufTensor(shape=shape, kind=type_name, blocks=blocks)
        free = end
    return {name: tensors[name] for name in infos}


def decode(tensor: GgufTensor) -> np.ndarray:
    """The weights of a tensor, float32, in its shape."""
    blocks = tensor.blocks
    if tensor.kind in ("F32", "F16"):
        return blocks.astype(np.float32).reshape(tensor.shape)
    scale = blocks["d"].astype(np.float32)[:, None]
    if tensor.kind == "Q8_0":
        return (scale * blocks["q"]).reshape(tensor.shape)
    low, high = blocks["q"] & 15, blocks["q"] >> 4
    weights = scale * np.concatenate((low, high), axis=1)
    return (weights + blocks["m"].astype(np.float32)[:, None]).reshape(tensor.shape)
