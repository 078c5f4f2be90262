"""A YAML file and `key=value` overrides, merged strictly into a tree of dataclasses.

Merge order: dataclass defaults < YAML < overrides. Nothing is ignored: an unknown or duplicate
key, a wrong type, a bad choice or a resolver such as `${oc.env:...}` raises `ConfigError` with the
full dotted key.
"""

import dataclasses
import re

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
from reinforcer_tp.config_yaml import UNREADABLE, Loader, check_nodes, read_yaml
from reinforcer_tp.secrecy import holds_secret, redact

_REFERENCE = re.compile(r"\$\{\.*\w+(\.\w+)*\}", re.ASCII)


def load(schema: type, path: str | None, overrides: list[str]) -> object:
    """Merge defaults of `schema` (a dataclass), the file at `path` (None = none) and `overrides`.

    Returns an instance of schema. Raises ConfigError, whose message is one line.
    """
    sources = [] if path is None else [(str(path), read_yaml(path))]
    sources += [("the command line", parse_override(schema, text)) for text in overrides]
    for origin, tree in sources:
        _check_secrets(tree, "", origin)
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
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if as_text:
            return _text_value(node, text)
        check_nodes(node, key, "the command line", ())
        return loader.construct_document(node)
    except UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        if as_text:
            return text
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}={shown(redact(text))} cannot be read: {problem[:200]}") from None


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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_list(hint) and value is not None:
        require(isinstance(value, list), where)
        allowed = str if hint == list[str] else int | float
        require(all(isinstance(v, allowed) and not isinstance(v, bool) for v in value), where)
    require(hint is not bool or not number, where)
    require(value != "???", where)


def _check_secrets(value: object, key: str, origin: str) -> None:
    """Refuse credentials: the configuration is written to the run's folder and to trackers."""
    children = value.items() if isinstance(value, dict) else []
    for name, child in enumerate(value) if isinstance(value, list) else children:
        _check_secrets(name, key, origin)
        _check_secrets(child, f"{key}.{redact(str(name))}" if key else redact(str(name)), origin)
    if isinstance(value, str) and holds_secret(value):
        raise ConfigError(
            f"{key} (from {origin}) holds a credential: {shown(redact(value))}; it would be "
            "written to config.yaml and to the trackers; put it into the environment (HF_TOKEN, "
            "WANDB_API_KEY, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, ...) and leave "
            "it out here"
        )


def _check_references(value: object, key: str, origin: str) -> None:
    """Only `${section.key}` may stand in a value: a resolver could read the environment."""
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            _check_references(child, key, origin)
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(
            f"{key}={shown(value)} (from {origin}) holds a NUL or half of a character; expected "
            f"Unicode text"
        )
    if isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise ConfigError(
            f"{key}={shown(value)} (from {origin}): only references such as ${{dpo.seed}} are "
            f"allowed after a dollar sign, no resolvers (oc.env could put a secret into the "
            f"saved configuration); write the value itself"
        )
