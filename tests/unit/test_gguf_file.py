"""The reader of GGUF files, against files made byte by byte and weights decoded one at a time."""

import math
import random
import struct

import numpy as np
import pytest

from benchmarks.gguf_file import decode, parse_gguf
from tests.unit.gguf_writer import KINDS, gguf_file, num_bytes, text, value, weight

METADATA = {
    "small": ("B", 255), "signed": ("b", -128), "short": ("H", 65535), "minus": ("h", -2),
    "count": ("I", 2**32 - 1), "whole": ("i", -(2**31)), "real": ("f", 0.5), "yes": ("?", True),
    "large": ("Q", 2**64 - 1), "least": ("q", -(2**63)), "double": ("d", 1 / 3),
    "name": ("text", "gr\u00f6\u00dfer \u6578\u5b57"), "nothing": ("text", ""),
    "numbers": ("list of i", [3, -4, 5]), "words": ("list of text", ["a", "", "\u00df"]),
    "none": ("list of d", []), "flags": ("list of ?", [True, False]),
}  # fmt: skip


def random_tensor(kind: str, shape: tuple[int, ...], seed: int) -> tuple:
    """Any bits, but for scales that are no numbers."""
    rng, (_, _, size) = random.Random(seed), KINDS[kind]
    content = bytearray(rng.randbytes(num_bytes(kind, shape)))
    for start in range(0, len(content), size):
        if kind == "F32":
            struct.pack_into("<f", content, start, rng.uniform(-2, 2))
        else:
            scales = [rng.uniform(-2, 2) for _ in range(2 if kind == "Q4_1" else 1)]
            struct.pack_into(f"<{len(scales)}e", content, start, *scales)
    return kind, shape, bytes(content)


def test_metadata_of_every_type():
    found = parse_gguf(gguf_file(METADATA, {})).metadata
    assert found == {key: content for key, (_, content) in METADATA.items()}
    assert all(type(found[key]) is type(METADATA[key][1]) for key in METADATA)


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_every_weight_is_what_its_bytes_say(alignment):
    shapes = {"F32": (3, 5), "F16": (7,), "Q4_1": (3, 64), "Q8_0": (2, 2, 32)}
    tensors = {
        f"t{i}": random_tensor(kind, shapes[kind], i) for i, kind in enumerate([*KINDS, *KINDS])
    }
    keys = {} if alignment is None else {"general.alignment": ("I", alignment)}
    found = parse_gguf(gguf_file(keys, tensors, alignment or 32)).tensors
    assert list(found) == list(tensors)
    for name, (kind, shape, content) in tensors.items():
        weights = decode(found[name])
        assert (weights.shape, weights.dtype, found[name].kind) == (shape, np.float32, kind)
        expected = [weight(kind, content, i) for i in range(math.prod(shape))]
        assert weights.ravel().tolist() == expected


def test_a_block_by_hand():
    """d = 0.5, m = -1; byte i is 0x21 + i: weight i has 1 + i in four bits, weight i + 16 has 2."""
    content = struct.pack("<ee", 0.5, -1.0) + bytes(0x21 + i for i in range(15)) + b"\xf0"
    (tensor,) = parse_gguf(gguf_file({}, {"t": ("Q4_1", (32,), content)})).tensors.values()
    low = [-0.5 + 0.5 * i for i in range(15)] + [-1.0]
    assert decode(tensor).tolist() == low + [0.0] * 15 + [6.5]
    content = struct.pack("<e", -0.25) + bytes([128, 127, *range(30)])
    (tensor,) = parse_gguf(gguf_file({}, {"t": ("Q8_0", (32,), content)})).tensors.values()
    assert decode(tensor).tolist() == [32.0, -31.75, *(-0.25 * i for i in range(30))]


def header(num_tensors=0, num_keys=0, version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def described(shape=(32,), kind=3, offset=0, name="t") -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def padded(head: bytes, data: bytes) -> bytes:
    return head + bytes(-len(head) % 32) + data


HUGE = 2**63
HOSTILE = {
    "empty": (b"", "the magic takes 4 bytes at byte 0, where 0 are left"),
    "another magic": (b"GGML" + bytes(60), "begins with b'GGML'; expected b'GGUF'"),
    "version 1": (header(version=1), "version 1; expected 2 or 3"),
    "big-endian": (header(version=0x03000000), r"\(its bytes are big-endian\)"),
    "no end": (header()[:20], "the number of keys takes 8 bytes at byte 16, where 4 are left"),
    "many keys": (header(num_keys=HUGE), "the length of a key"),
    "many tensors": (header(num_tensors=HUGE), "the length of a tensor's name"),
    "long key": (header(num_keys=1) + struct.pack("<Q", HUGE), "a key takes 9,223,372,036,854"),
    "key of bytes": (header(num_keys=1) + text(b"\xff"), "a key is no text .*expected UTF-8"),
    "key twice": (header(num_keys=2) + 2 * (text("k") + value("B", 1)), "the key 'k' occurs twice"),
    "unknown type": (header(num_keys=1) + text("k") + struct.pack("<I", 13), "is of type 13"),
    "list of lists": (
        header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "is of type 9"),
    "long list": (
        header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 4, HUGE),
        "value of 'k' takes 36,893,488,147,419,103,232 bytes"),
    "long list of texts": (
        header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 8, HUGE), "the length of"),
    "alignment 0": (
        header(num_keys=1) + text("general.alignment") + value("I", 0), "general.alignment=0; exp"),
    "alignment of 48": (
        header(num_keys=1) + text("general.alignment") + value("I", 48), "alignment=48; expected"),
    "alignment in words": (
        header(num_keys=1) + text("general.alignment") + value("text", "32"), "alignment='32'"),
    "no dimension": (header(1) + described(()), "has 0 dimensions; expected 1 to 4"),
    "five dimensions": (header(1) + described((1,) * 5, kind=0), "has 5 dimensions"),
    "many dimensions": (
        header(1) + text("t") + struct.pack("<I", 2**32 - 1), "has 4294967295 dimensions"),
    "unknown tensor type": (
        header(1) + described(kind=12), r"has type 12, which is not built; expected F32 \(0\)"),
    "empty tensor": (header(1) + described((32, 0)), r"has shape \(0, 32\)"),
    "half a block": (header(1) + described((48,)), "expected rows of a multiple of 32 weights"),
    "tensor twice": (header(2) + 2 * described(), "the tensor 't' occurs twice"),
    "tensor past the end": (padded(header(1) + described((64,)), bytes(39)), "takes bytes 0 to 40"),
    "huge tensor": (padded(header(1) + described((HUGE, HUGE)), bytes(40)), "an end of at most 4"),
    "offset past the end": (padded(header(1) + described(offset=HUGE), bytes(40)), "takes bytes 9"),
    "offset not aligned": (
        padded(header(1) + described(offset=8), bytes(40)), "expected a multiple of 32 from 0 on"),
    "tensors on top of each other": (
        padded(header(2) + described() + described(name="u"), bytes(80)),
        "'u' takes bytes 0 to 20 of the data; expected a multiple of 32 from 20 on"),
    "no data": (header(1) + described(), "an end of at most 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name):
    content, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said) as caught:
        parse_gguf(content)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_cut_and_no_flipped_byte_does_more_than_that():
    tensors = {kind: random_tensor(kind, (2, 32), 1) for kind in KINDS}
    content = gguf_file(METADATA, tensors)
    for end in range(len(content)):
        with pytest.raises(ValueError):
            parse_gguf(content[:end])
    head = len(content) - sum(num_bytes(kind, (2, 32)) for kind in KINDS)
    for place in range(head):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            try:
                for tensor in parse_gguf(bytes(flipped)).tensors.values():
                    decode(tensor)
            except ValueError:
                pass
