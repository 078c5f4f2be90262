"""Writes docs/configuration.md, and README.md's few keys, from reinforcer_tp/config.py.

python docs/config_table.py          prints the page
python docs/config_table.py --write  brings both files up to date
python docs/config_table.py --check  exit status 1 where one of them is not
"""

import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from pathlib import Path

from reinforcer_tp.config import Config, load_config
from reinforcer_tp.config_keys import flatten

_DOCS = Path(__file__).resolve().parent
PAGE, README = _DOCS / "configuration.md", _DOCS.parent / "README.md"
_DEMO = _DOCS.parent / "configs" / "dpo.yaml"  # what train.py takes without --config
_COLUMNS = "| key | type | default | meaning |"
BEGIN, END = "<!-- config keys: begin -->", "<!-- config keys: end -->"
TITLES = {  # section -> what its keys decide, in the order of the page
    "dpo": "The loss, the length of the run, validation",
    "policy": "The model, its precision, batch sizes",
    "policy.tokenizer": "Tokenizer and chat template",
    "policy.megatron_cfg": "The layout, and what is recomputed",
    "policy.megatron_cfg.optimizer": "The optimizer",
    "policy.megatron_cfg.scheduler": "The learning rate over the steps",
    "policy.megatron_cfg.distributed_data_parallel_config": "Gradients between processes",
    "data": "The preference pairs",
    "reference": "The reference's log-probs",
    "checkpointing": "Checkpoints, resuming, the exported model",
    "logger": "The run folder and the trackers",
    "cluster": "How many processes, and when they count as hung",
}
FIRST_KEYS = (  # of the README
    *("policy.model_name", "data.dataset_name", "data.train_data_path", "data.val_data_path"),
    *("logger.log_dir", "dpo.max_num_epochs", "dpo.max_num_steps"),
    "policy.megatron_cfg.optimizer.lr",
    *("dpo.reference_policy_kl_penalty", "dpo.preference_loss", "dpo.sft_loss_weight"),
    *("policy.train_global_batch_size", "policy.micro_batch_tokens"),
    *("policy.max_total_sequence_length", "policy.precision"),
    "policy.megatron_cfg.tensor_model_parallel_size",
)
HEAD = """# Every configuration key

Made from `reinforcer_tp/config.py` by `python docs/config_table.py --write`; do not edit it here.

The default is what holds where neither a YAML file nor the command line says anything.
`configs/dpo.yaml`, which `train.py` takes without `--config`, sets others for its tiny model.
Batch sizes count pairs. Names are NeMo-RL's where it has the key; "ours" marks the others.

Values are merged in this order: defaults, then the YAML file, then `key=value` on the command line.
A key that does not exist, a value of the wrong type and a combination that is not built stop every
rank before any process group exists, and the message names key, value and fix. `${section.key}` in
a value stands for another key's value. Quotes around a text on the command line are taken off,
and `null` is null.

```bash
# validates, prints every key with its value, and trains nothing
python reinforcer_tp/train.py --config configs/dpo.yaml --check dpo.seed=1
```
"""


@functools.cache
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


def section_of(key: str) -> str:
    """The section under whose title a key stands: the longest that it begins with."""
    return max((name for name in TITLES if key.startswith(f"{name}.")), key=len)


def table(head: str, found: list[tuple[str, ...]]) -> str:
    """A Markdown table; `head` names its columns, the first of which holds keys."""
    lines = [head, re.sub(r"[^|]+", "---", head)]
    for cells in found:
        key, *others = (cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join([f'`{key}`', *others])} |")
    return "\n".join(lines)


def page() -> str:
    """docs/configuration.md in full."""
    found = rows(Config)
    parts = [HEAD]
    for name, title in TITLES.items():
        own = [cells for cells in found if section_of(cells[0]) == name]
        parts.append(f"## {name}\n\n{title}.\n\n{table(_COLUMNS, own)}\n")
    return "\n".join(parts)


def with_first_keys(readme: str) -> str:
    """`readme` with its few keys between the markers brought up to date."""
    demo = flatten(dataclasses.asdict(load_config(str(_DEMO), [])))
    found = {
        key: (key, meaning, default, yaml_text(demo[key]))
        for key, _, default, meaning in rows(Config)
        if key in FIRST_KEYS
    }
    head, rest = readme.split(BEGIN)
    shown = table(
        "| key | meaning | default | `configs/dpo.yaml` |", [found[key] for key in FIRST_KEYS]
    )
    return f"{head}{BEGIN}\n{shown}\n{END}{rest.split(END)[1]}"


def stale() -> dict[Path, str]:
    """The files that are not up to date, with what they should be."""
    wanted = {PAGE: page(), README: with_first_keys(README.read_text())}
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text
    }


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        for path, text in stale().items():
            path.write_text(text)
            print(f"wrote {path}")
        return 0
    if arguments == ["--check"]:
        found = stale()
        for path in found:
            print(f"{path} is out of date: run python docs/config_table.py --write")
        return 1 if found else 0
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
