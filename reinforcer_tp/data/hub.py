"""What the Hugging Face hub says, asked once and quickly."""

import re
from pathlib import Path

import datasets
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi

TIMEOUT_S = 10


def looks_like_path(name: str) -> bool:
    """Whether `name` can only mean a file or folder, as no hub id looks like it."""
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".")


def hub_problem(repo_id: str, repo_type: str) -> str | None:
    """Why the hub does not give `repo_id` ("model" or "dataset"), in one line; None if it does.

    The loaders of transformers and datasets retry for up to a minute before they say so.
    """
    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=TIMEOUT_S)
    except Exception as error:  # the network's edge: the HTTP library behind it changes
        return one_line(error)
    return None


def load_hub_dataset(
    name: str, subset: str | None = None, split: str | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """`datasets.load_dataset` (HF_HOME, login and cache as usual, no code from the hub).

    ValueError in one line where neither the hub nor the cache has it.
    """
    problem = hub_problem(name, "dataset")
    if problem is not None and not _is_cached(name):
        raise ValueError(
            f"{name} is no local file or folder, and the hub does not give it: {problem}; "
            "check the name, the connection, `hf auth login` and HF_HOME, or give a local path"
        )
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # as above
        raise ValueError(f"the hub dataset {name} cannot be loaded: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])
    return text or type(error).__name__


def _is_cached(name: str) -> bool:
    *namespace, last = name.split("/")
    folder = "___".join([*namespace, camelcase_to_snakecase(last)])
    return any(Path(datasets.config.HF_DATASETS_CACHE, folder).glob("*/*/*"))
