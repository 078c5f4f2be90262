"""The choice of a dataset class, and its construction from the `data` section."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from reinforcer_tp.data.dataset_classes import (
    BinaryPreferenceDataset,
    DPODataset,
    FileDataset,
    HelpSteer3Dataset,
    PreferenceDataset,
    Tulu3PreferenceDataset,
)
from reinforcer_tp.data.hub import one_line
from reinforcer_tp.data.pairs import TaskDataSpec

# data.* keys that say what to load: one that is set must reach the dataset class.
LOADING_KEYS = (
    "train_data_path",
    "val_data_path",
    "prompt_key",
    "chosen_key",
    "rejected_key",
    "subset",
    "split",
    "val_split",
)


CLASSES: dict[str, type] = {
    "auto": FileDataset,
    "DPODataset": DPODataset,
    "BinaryPreferenceDataset": BinaryPreferenceDataset,
    "PreferenceDataset": PreferenceDataset,
    "HelpSteer3": HelpSteer3Dataset,
    "Tulu3Preference": Tulu3PreferenceDataset,
}


def load_preference_dataset(data_config: Any) -> Any:
    """The dataset that the `data` section (an object or a mapping) asks for, checked.

    `dataset_name` is a key of CLASSES or the import path of a class, found on sys.path or in the
    working directory; its constructor gets the `data.*` keys that it names, or all for **kwargs.
    ValueError for a class that is not there, that cannot take a key that is set, or that has no
    `formatted_ds` with a "train".
    """
    config = as_dict(data_config)
    name = config.get("dataset_name") or "auto"
    if name in CLASSES:
        dataset = CLASSES[name](**_arguments(CLASSES[name], name, config))
    else:
        users_class = _import_class(name)
        arguments = _arguments(users_class, name, config)
        try:
            dataset = users_class(**arguments)
        except Exception as error:  # the edge to code of the user's
            raise ValueError(
                f"data.dataset_name={name}: its constructor failed with {type(error).__name__}: "
                f"{one_line(error.__cause__ or error)}"
            ) from error
    _check_formatted(dataset, name)
    return dataset


def task_spec_of(dataset: Any, data_config: Any) -> TaskDataSpec:
    """The dataset's TaskDataSpec, with the configuration's files where it names none."""
    config = as_dict(data_config)
    spec = getattr(dataset, "task_spec", None) or TaskDataSpec()
    return TaskDataSpec(
        dataset_name=getattr(spec, "dataset_name", None) or type(dataset).__name__,
        prompt_file=getattr(spec, "prompt_file", None) or config.get("prompt_file"),
        system_prompt_file=getattr(spec, "system_prompt_file", None)
        or config.get("system_prompt_file"),
    )


def as_dict(config: Any) -> dict[str, Any]:
    """The fields of a configuration section, an object or a mapping."""
    if isinstance(config, Mapping):
        return dict(config)
    return asdict(config) if is_dataclass(config) else dict(vars(config))


def _import_class(name: str) -> type:
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"data.dataset_name={name} is unknown; expected one of {', '.join(CLASSES)} or the "
            "import path of a class, like my.module.CustomDPODataset"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # likewise
        raise ValueError(
            f"data.dataset_name={name}: cannot import {module_name} ({error}); expected a module "
            f"on sys.path or in {os.getcwd()}; set PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(
            f"data.dataset_name={name}: {module_name} has no class {class_name}; it has "
            f"{', '.join(public) or 'none'}"
        )
    return found


def _arguments(dataset_class: type, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of `config` that the constructor takes; a key that is null leaves its default."""
    parameters = inspect.signature(dataset_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return config
    arguments = {}
    for parameter in parameters:
        has_default = parameter.default is not parameter.empty
        if config.get(parameter.name) is not None:
            arguments[parameter.name] = config[parameter.name]
        elif not has_default and parameter.kind is not parameter.VAR_POSITIONAL:
            if parameter.name not in (*config, *LOADING_KEYS):
                raise ValueError(
                    f"data.dataset_name={name} needs {parameter.name!r}, which is no key of data; "
                    "give it a default"
                )
            arguments[parameter.name] = None
    unused = [key for key in LOADING_KEYS if config.get(key) is not None and key not in arguments]
    if unused:
        raise ValueError(
            f"data.{unused[0]}={config[unused[0]]} is set, but data.dataset_name={name} takes "
            f"{', '.join(p.name for p in parameters) or 'none of these keys'}; set it to null or "
            "choose another data.dataset_name"
        )
    return arguments


def _check_formatted(dataset: Any, name: str) -> None:
    splits = getattr(dataset, "formatted_ds", None)
    if not isinstance(splits, Mapping) or splits.get("train") is None:
        got = "no formatted_ds" if splits is None else f"formatted_ds = {_brief(splits)}"
        raise ValueError(
            f"data.dataset_name={name}: its object has {got}; expected "
            'self.formatted_ds = {"train": rows, "validation": rows or None}'
        )
    if getattr(dataset, "on_bad_row", "error") not in ("error", "drop"):
        raise ValueError(f"{name}.on_bad_row={dataset.on_bad_row!r}; expected error or drop")


def _brief(splits: Any) -> str:
    if isinstance(splits, Mapping):
        return f"a mapping with {', '.join(map(str, splits)) or 'no keys'}"
    return f"a {type(splits).__name__}"
