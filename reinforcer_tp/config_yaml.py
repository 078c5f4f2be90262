"""YAML for configurations: safe, strict, bounded; and back."""

import difflib
import re
from pathlib import Path

import yaml

from reinforcer_tp.config_check import ConfigError, require

_MAX_BYTES = 1 << 20  # of a YAML file
_MAX_NODES = 10_000  # of a tree with its aliases written out
_MAX_DEPTH = 32


class Loader(yaml.SafeLoader):
    """Safe YAML in which 5e-7 is a number, 010 is not eight, 1:30, a date and off are text.

    Without tags, and not deep.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None and not isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"it has the tag {tag[:80]!r}; tags are not allowed", event.start_mark
            )
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_MAX_DEPTH} levels", event.start_mark
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back unchanged."""


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


_set_resolvers(Loader)
_set_resolvers(_Dumper)
_Dumper.add_representer(str, _represent_text)


def dump(tree: dict) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file. ConfigError names file and line of what is wrong with it."""
    file = Path(path)
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(_MAX_BYTES + 1)
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
    if len(text) > _MAX_BYTES:
        raise ConfigError(
            f"--config {path} has more than {_MAX_BYTES:,} characters; expected a run's sections"
        )
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict:
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = "nothing" if node is None else f"a {node.id}"
            raise ConfigError(
                f"{origin}: expected a mapping of sections (dpo:, policy:), got {kind}"
            )
        check_nodes(node, "", origin, ())
        return loader.construct_document(node)
    except UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{origin}{where}: not valid YAML: {problem[:200]}") from None


# A number of 5,000 digits is a ValueError, "\\UFFFFFFFF" an OverflowError.
UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


def check_nodes(
    node: yaml.Node, prefix: str, origin: str, parents: tuple, seen_nodes: list | None = None
) -> None:
    """Refuse duplicate keys, keys that are not text, and anchors that contain themselves or grow
    into very many values."""
    seen_nodes = [0] if seen_nodes is None else seen_nodes
    seen_nodes[0] += 1
    line = node.start_mark.line + 1
    require(
        seen_nodes[0] <= _MAX_NODES,
        f"{origin} line {line}: more than {_MAX_NODES:,} values, aliases counted as often as used",
    )
    require(node not in parents, f"{origin} line {line}: {prefix} contains itself (a YAML alias)")
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    seen: dict[str, int] = {}
    for child in children:
        if not isinstance(node, yaml.MappingNode):
            check_nodes(child, prefix, origin, (*parents, node), seen_nodes)
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
        check_nodes(value, full, origin, (*parents, node), seen_nodes)
