"""JSON that others wrote: no NaN, no key twice, no half of a character, not endless."""

import functools
import json
import math
from typing import Any

DEPTH = 64  # lists and objects within each other; chat rows with tools need about ten


def parse_json(text: str | bytes, integer_bits: int = 64) -> Any:
    """The value in `text` (bytes: UTF-8). ValueError saying what is wrong with it."""
    if isinstance(text, bytes):
        text = text.decode()
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
        value = _decoder(integer_bits).decode(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


@functools.cache
def _decoder(integer_bits: int) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=lambda digits: _integer(digits, integer_bits),
        parse_float=_finite,
        parse_constant=_constant,
    )


def check_depth(value: Any, room: int = DEPTH) -> None:
    """ValueError where lists and mappings are nested more than `room` deep."""
    if isinstance(value, (dict, list)):
        if room == 0:
            raise ValueError(_too_deep())
        for item in value.values() if isinstance(value, dict) else value:
            check_depth(item, room - 1)


def _too_deep() -> str:
    return f"lists or objects nested more than {DEPTH} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)[:80]!r} occurs twice")
    return result


def _integer(digits: str, bits: int) -> int:
    end = 2 ** (bits - 1)
    value = int(digits) if len(digits) <= bits else end  # endless digits take quadratic time
    if not -end <= value < end:
        shown = digits[:24] + "..." * (len(digits) > 24)
        raise ValueError(f"the number {shown} has over {bits} bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
