"""What others wrote: names that stay in their folder, JSON that is strict and bounded.

Imports neither torch nor transformers.
"""

from pathlib import Path
from typing import Any

from reinforcer_tp.strict_json import parse_json

CONFIG_BYTES = 1 << 20  # of a config.json and its like
INDEX_BYTES = 64 << 20  # of an index of weights, a tokenizer's settings
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
_CODE_PREFIXES = ("_attn_implementation", "_experts_implementation")


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which need not exist. For names that come from a file.

    A symbolic link may lead within the folder, and, as in the hub's cache, from
    `snapshots/REVISION/` to `blobs/` beside `snapshots`.

    Raises ValueError: the name is no plain file name, or a link leads out of the folder.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or any(sign in name for sign in "/\\\0")
        or len(name.encode("utf-8", "surrogatepass")) > 255
    ):
        shown = repr(name)[:80]
        raise ValueError(f"{folder} names the file {shown}; expected the name of a file in it")
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{path} cannot be followed: {error}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path} is a link that leads out of its folder, to {target}; put the file itself there"
        )
    return path


def read_json(path: Path, max_bytes: int = CONFIG_BYTES, integer_bits: int = 64) -> dict[str, Any]:
    """The object in a JSON file: UTF-8, no key twice, only finite numbers, not too deep.

    Raises ValueError in one line that names the file.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise ValueError(f"{path} cannot be read: it is no file; expected a JSON object")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > max_bytes:
        raise ValueError(f"{path} is larger than {max_bytes:,} bytes; expected a JSON object")
    try:
        value = parse_json(content, integer_bits)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object, but {type(value).__name__}")
    return value


def refuse_code(content: Any, path: Path) -> None:
    """Raises ValueError for keys by which a Hugging Face folder asks for code, at any depth."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if value and _asks_for_code(key, value):
                raise ValueError(
                    f"{path} has {key[:80]}, which asks for code that is not transformers' own; "
                    "such code is never run here: use a model without it, or remove the key where "
                    "the model does not need it"
                )
        waiting += part.values()


def _asks_for_code(key: str, value: Any) -> bool:
    if key in ("attn_implementation", "experts_implementation", "use_kernels"):
        return not isinstance(value, str) or "/" in value  # owner/name = a kernel of the hub
    return key in _CODE_KEYS or key.startswith(_CODE_PREFIXES)
