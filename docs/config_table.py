"""Writes README.md's table of configuration keys from the comments in reinforcer_tp/config.py.

python docs/config_table.py          prints the table
python docs/config_table.py --write  puts it between README.md's markers
"""

import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from reinforcer_tp.config import Config

_README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- config table: begin -->", "<!-- config table: end -->"


def rows(section: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key below `section`."""
    comments = field_comments(section)
    found = []
    for field in dataclasses.fields(section):
        hint = typing.get_type_hints(section)[field.name]
        key = prefix + field.name
        if dataclasses.is_dataclass(hint):
            found += rows(hint, key + ".")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "required" if default is dataclasses.MISSING else yaml_text(default)
        found.append((key, type_text(hint), shown, comments.get(field.name, "")))
    return found


def field_comments(section: type) -> dict[str, str]:
    """The comment at the end of each field's lines."""
    found: dict[str, str] = {}
    name = None
    for line in inspect.getsource(section).splitlines():
        start = re.match(r"    (\w+): ", line)
        name = start[1] if start else name
        comment = re.search(r"  # (.*)$", line)
        if name and comment and line.startswith("    ") and name not in found:
            found[name] = comment[1]
    return found


def yaml_text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def type_text(hint: object) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        parts = [h for h in typing.get_args(hint) if h is not type(None)]
        return " or ".join([*map(type_text, parts), "null"])
    if origin is list:
        return f"list of {type_text(typing.get_args(hint)[0])}"
    names = {"str": "text", "bool": "true/false", "dict": "mapping", "Any": "text or list of text"}
    return names.get(hint.__name__, hint.__name__)


def table() -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for cells in rows(Config):
        key, kind, default, meaning = (cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| `{key}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """`readme` with the table between the markers brought up to date."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        _README.write_text(with_table(_README.read_text()))
    else:
        print(table())
