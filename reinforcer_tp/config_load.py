"""A YAML file and `key=value` overrides, merged strictly into a tree of dataclasses.

Merge order: dataclass defaults < YAML < overrides. Nothing is ignored: an unknown or duplicate
key, a wrong type, a bad choice or a resolver such as `${oc.env:...}` raises `ConfigError` with the
full dotted key.
"""

import dataclasses
import difflib
import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from reinforcer_tp.config_check import ConfigError, require, shown
from reinforcer_tp.config_keys import (
    describe,
    field_type,
    fields_of,
    is_list,
    is_text,
    suggest,
)

_REFERENCE = re.compile(r"\$\{\.*\w+(\.\w+)*\}", re.ASCII)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 5e-7 is a number, 010 is not eight, 1:30, a date and off are text."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""


def _set_resolvers(cls: type) -> None:
    replaced = ("float", "int", "timestamp", "bool")
    cls.yaml_implicit_resolvers = {
        first: [(tag, regex) for tag, regex in pairs if tag.rpartition(":")[2] not in replaced]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits, power = r"\d[\d_]*", r"[eE][-+]?\d+"
    plain = rf"[-+]?(?:{digits}\.[\d_]*(?:{power})?|{digits}{power}|\.{digits}(?:{power})?)"
    special = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    patterns = {
        "float": (rf"^(?:{plain}|{special})$", "-+0123456789."),
        "int": (r"^[-+]?(?:0|[1-9][\d_]*)$", "-+0123456789"),
        "null": (r"^None$", "N"),
        "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    }
    for tag, (pattern, first) in patterns.items():
        regex = re.compile(pattern, re.ASCII)
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", regex, list(first))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unless escaped, these line ends are read back as spaces.
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_set_resolvers(_Loader)
_set_resolvers(_Dumper)
_Dumper.add_representer(str, _represent_text)


def dump(tree: dict) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def load(schema: type, path: str | None, overrides: list[str]) -> object:
    """Merge defaults of `schema` (a dataclass), the file at `path` (None = none) and `overrides`.

    Returns an instance of schema. Raises ConfigError, whose message is one line.
    """
    sources = [] if path is None else [(str(path), read_yaml(path))]
    sources += [("the command line", parse_override(schema, text)) for text in overrides]
    for origin, tree in sources:
        check_tree(schema, schema, tree, "", origin)
    merged = _merge(schema, sources)
    try:
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = _first_required(schema, error.full_key)
        raise ConfigError(f"{key} is not set; give it in the YAML or as {key}=...") from None
    except OmegaConfBaseException as error:
        raise _explain(error, schema, {}, "the merged configuration") from None


def _merge(schema: type, sources: list[tuple[str, dict]]) -> DictConfig:
    try:  # all at once: each merge copies the whole tree
        return OmegaConf.merge(OmegaConf.structured(schema), *(tree for _, tree in sources))
    except OmegaConfBaseException as error:
        merged, first = OmegaConf.structured(schema), error
    for origin, tree in sources:  # which one it was
        try:
            merged = OmegaConf.merge(merged, tree)
        except OmegaConfBaseException as error:
            raise _explain(error, schema, tree, origin) from None
    raise first


def _explain(error: OmegaConfBaseException, schema: type, tree: dict, origin: str) -> ConfigError:
    """One line of ours for an error of OmegaConf's: key, value, source, expected type."""
    key = error.full_key or "the configuration"
    hint = field_type(schema, key)
    expected = f"; expected {describe(hint)}" if hint is not None else ""
    got = _lookup(tree, key)
    if got is _ABSENT or hint is None:
        return ConfigError(f"{key} (from {origin}): {str(error).splitlines()[0]}{expected}")
    return ConfigError(f"{key}={shown(got)} (from {origin}) is not valid{expected}")


def _first_required(section: type, key: str) -> str:
    """The first field without a default at or below a dotted key."""
    hint = field_type(section, key)
    if not dataclasses.is_dataclass(hint):
        return key
    needed = (f for f in dataclasses.fields(hint) if f.default is f.default_factory)
    return _first_required(section, f"{key}.{next(needed).name}")


_ABSENT = object()


def _lookup(tree: object, key: str) -> object:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file. ConfigError names file and line of what is wrong with it."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*.y*ml")], n=1
        )
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"--config {path}: there is no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path} cannot be read: {error}; expected a YAML file"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = "nothing" if node is None else f"a {node.id}"
            raise ConfigError(
                f"{origin}: expected a mapping of sections (dpo:, policy:), got {kind}"
            )
        _check_nodes(node, "", origin, ())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{origin}{where}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, prefix: str, origin: str, parents: tuple) -> None:
    """Refuse duplicate keys, keys that are not text, and anchors that contain themselves."""
    line = node.start_mark.line + 1
    require(node not in parents, f"{origin} line {line}: {prefix} contains itself (a YAML alias)")
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    seen: dict[str, int] = {}
    for child in children:
        if not isinstance(node, yaml.MappingNode):
            _check_nodes(child, prefix, origin, (*parents, node))
            continue
        key, value = child
        line = key.start_mark.line + 1
        require(
            isinstance(key, yaml.ScalarNode) and key.tag.endswith((":str", ":merge")),
            f"{origin} line {line}: a key of {prefix or 'the file'} is not text; put it in quotes",
        )
        full = f"{prefix}.{key.value}" if prefix else key.value
        require(
            key.value not in seen,
            f"{origin} line {line}: duplicate key {full}, first given in line "
            f"{seen.get(key.value)}; keep one of the two",
        )
        seen[key.value] = line
        _check_nodes(value, full, origin, (*parents, node))


def parse_override(schema: type, text: str) -> dict:
    """One `a.b.c=value` argument as a nested dict.

    A text field takes the value as it stands (quotes around it are taken off, `null` is null);
    any other field takes it as YAML.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    require(
        key[:1] not in ("+", "~", "-"),
        f"override {text!r}: '{key[:1]}' in front of a key is not supported; every key has a "
        f"default that can be set: write {key.lstrip('+~-') or 'key'}={value or 'value'}",
    )
    require(
        bool(equals) and bool(key),
        f"override {text!r} is not key=value; expected for example dpo.seed=42",
    )
    require(
        value.strip() != "",
        f"override {text!r} has no value; write {key}=value, or =null where the key may be empty",
    )
    parsed = _parse_value(value.strip(), key, as_text=is_text(field_type(schema, key)))
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _parse_value(text: str, key: str, as_text: bool) -> object:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if as_text:
            return _text_value(node, text)
        _check_nodes(node, key, "the command line", ())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        if as_text:
            return text
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}={text} cannot be read: {problem}") from None
    finally:
        loader.dispose()


def _text_value(node: yaml.Node | None, text: str) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        return text
    if node.style in ("'", '"'):
        return node.value
    return None if node.tag.endswith(":null") else text


def check_tree(schema: type, section: type, tree: object, prefix: str, origin: str) -> None:
    """Refuse keys that do not exist, sections that are no mappings, text that is not text."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix}={shown(tree)} (from {origin}): expected keys under it: "
            f"{', '.join(fields_of(section))}"
        )
    for name, value in tree.items():
        full = f"{prefix}.{name}" if prefix else name
        hint = fields_of(section).get(name)
        if hint is None:
            full = _deepest(full, value)
            raise ConfigError(f"unknown key {full} (from {origin}): {suggest(schema, full)}")
        if dataclasses.is_dataclass(hint):
            check_tree(schema, hint, value, full, origin)
            continue
        _check_references(value, full, origin)
        _check_value(value, hint, full, origin)


def _deepest(key: str, value: object) -> str:
    """The key itself, or what it leads to as long as there is just one way down."""
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        key = f"{key}.{name}"
    return key


def _check_value(value: object, hint: object, key: str, origin: str) -> None:
    """Refuse what OmegaConf would let pass: numbers as text or as true, and its mark "???"."""
    where = f"{key}={shown(value)} (from {origin}): expected {describe(hint)}"
    text_ok = not is_text(hint) or value is None or isinstance(value, str)
    require(text_ok, f"{where}; put it in quotes")
    require(not is_list(hint) or value is None or isinstance(value, list), where)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(hint is not bool or not number, where)
    require(value != "???", where)


def _check_references(value: object, key: str, origin: str) -> None:
    """Only `${section.key}` may stand in a value: a resolver could read the environment."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            _check_references(child, key, origin)
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise ConfigError(
            f"{key}={shown(value)} (from {origin}): only references such as ${{dpo.seed}} are "
            f"allowed after a dollar sign, no resolvers (oc.env could put a secret into the "
            f"saved configuration); write the value itself"
        )
