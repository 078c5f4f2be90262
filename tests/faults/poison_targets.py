"""What a run reads, as good files in a folder, and the function of the run that reads them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reinforcer_tp.checkpoint_folder import (
    CheckpointError,
    begin_checkpoint,
    check_file,
    json_bytes,
    publish_checkpoint,
    rank_file,
    read_json,
    read_manifest,
    write_synced,
)
from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.data.chat import encode_pair
from reinforcer_tp.data.pairs import PreferencePair, TaskDataSpec
from reinforcer_tp.data.sources import Source, load_rows
from reinforcer_tp.data.templates import stop_rendering
from reinforcer_tp.data.tokenize_set import EncodeOptions, SetOptions, tokenize_set
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.data.tokenizer import load_tokenizer, read_chat_template
from reinforcer_tp.hf_files import open_model, write_companions
from reinforcer_tp.mcore.restore import SavedTensors
from reinforcer_tp.reference.keys import ReferenceKey
from reinforcer_tp.reference.store import ReferenceStore, StoreError, reference_folders
from reinforcer_tp.run_directory import check_run_directory, finished_steps
from reinforcer_tp.untrusted import read_json as read_bounded
from tests.integration.random_model import make_random_llama, make_rows, make_tokenizer, write_jsonl

DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "dpo.yaml"
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TALK = PreferencePair(
    prompt=[{"role": "user", "content": "the cat"}],
    chosen=[{"role": "assistant", "content": "sings slowly"}],
    rejected=[{"role": "assistant", "content": "runs"}],
    shape="messages",
)
KEY = ReferenceKey("5a" * 32, "float32-v1")
PAIRS = [TokenizedPair(prompt=[1], chosen=[2, n], rejected=[3], row=n) for n in range(4)]
ARROW = "data-00000-of-00001.arrow"


def leave(place: Path, file: str) -> None:
    """Nothing has to be made to fit."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder of good files and the function that reads it."""

    name: str
    folder: str  # below the good files
    files: tuple[str, ...]  # that are read
    load: Callable[[Path], object]
    extra: tuple[str, ...] = ()  # that no run reads, whatever is in them
    refusals: tuple[type[Exception], ...] = (ValueError,)  # ConfigError, CheckpointError are
    seal: Callable[[Path, str], None] = leave  # makes names and digests fit the poison


def make_good(folder: Path) -> None:
    """The good files of every target."""
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "run.yaml").write_text(DEFAULT.read_text())
    _make_data(folder / "data")
    make_random_llama(folder / "model", num_hidden_layers=1)
    generation = {"do_sample": True, "temperature": 0.6}
    (folder / "model" / "generation_config.json").write_text(json.dumps(generation))
    _make_sharded(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, content in (("special_tokens_map.json", {"eos_token": "</s>"}), ("config.json", {})):
        (folder / "tokenizer" / name).write_text(json.dumps(content))
    (folder / "template").mkdir()
    (folder / "template" / "mine.jinja").write_text(CHATML)
    tokenizer.save_pretrained(folder / "template" / "tokenizer")
    (folder / "store").mkdir()
    with _open_store(folder / "store").writer() as writer:
        for pair in PAIRS:
            writer.add(pair, np.zeros(len(pair.chosen) + len(pair.rejected), np.float32))
    _make_checkpoint(folder / "checkpoint")
    _make_cached(folder / "cache")
    _make_run(folder / "run")


def _make_data(folder: Path) -> None:
    rows = make_rows(4)
    for name in ("rows.jsonl", "rows.ndjson"):
        write_jsonl(folder / name, rows)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl.gz").write_bytes(b"")
    plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    pq.write_table(pa.Table.from_pylist(plain), folder / "rows.parquet")
    datasets.Dataset.from_list(plain).save_to_disk(folder / "saved")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(plain)})
    both.save_to_disk(folder / "splits")


def _make_sharded(folder: Path) -> None:
    import shutil

    shutil.copytree(folder / "model", folder / "sharded")
    from safetensors.torch import load_file

    names = load_file(folder / "sharded" / "model.safetensors")
    file = folder / "sharded" / "model-00001-of-00001.safetensors"
    (folder / "sharded" / "model.safetensors").rename(file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file.name)}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_checkpoint(folder: Path) -> None:
    import torch
    from safetensors.torch import save

    building = begin_checkpoint(folder, 1, "0" * 16, 1000)
    tensors = save({"w.master": torch.zeros(4)})
    files = {
        rank_file(0): write_synced(building / rank_file(0), [tensors]),
        "state.json": write_synced(building / "state.json", [json_bytes({"step": 1})]),
        "tensors.json": write_synced(
            building / "tensors.json", [json_bytes({"w.master": [[0, 0, 4, 0]]})]
        ),
    }
    layout = {"tensor_model_parallel_size": 1}
    publish_checkpoint(building, files, {"step": 1, "attempt": "0" * 16, "layout": layout})


def _make_cached(folder: Path) -> None:
    found, _ = tokenize_set(
        make_rows(4),
        "rows",
        spec=TaskDataSpec(),
        tokenizer=make_tokenizer(),
        options=SetOptions(encode=EncodeOptions(max_total_sequence_length=64)),
        cache_dir=folder,
    )
    found.rename(folder / "set")


def _load_cached(place: Path) -> object:
    pairs = TokenizedSet.open(place / "set")
    return [pairs[i] for i in range(len(pairs))], read_bounded(place / "set" / "counts.json")


def _make_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(DEFAULT.read_text())
    (folder / "finished.json").write_text('{"steps": 3}')


def _load_config(place: Path) -> Config:
    return load_config(str(place / "run.yaml"), [])


def _load_file(name: str) -> Callable[[Path], object]:
    return lambda place: list(load_rows(Source(path=str(place / name), key="data.train_data_path")))


def _load_folder(place: Path) -> object:
    return list(load_rows(Source(path=str(place), key="data.train_data_path")))


def _load_model(place: Path) -> object:
    config = load_config(str(DEFAULT), ["policy.max_total_sequence_length=64"])
    files = open_model(config, str(place), None)
    tokenizer = make_tokenizer()
    write_companions(files, tokenizer, "float32", place)
    return [files.reader.read(name) for name in files.reader.files]


def _load_tokenizer(place: Path) -> object:
    tokenizer = load_tokenizer(str(place))
    return _encode(tokenizer)


def _load_template(place: Path) -> object:
    read_chat_template(str(place / "mine.jinja"))
    return _encode(load_tokenizer(str(place / "tokenizer"), str(place / "mine.jinja")))


def _encode(tokenizer) -> object:
    try:
        found = encode_pair(TALK, tokenizer)
    finally:
        stop_rendering()
    if found.mistake:  # which ends a run
        raise ValueError(found.mistake)
    return found


def _open_store(folder: Path) -> ReferenceStore:
    return ReferenceStore(folder, KEY, model="/models/m")


def _load_store(place: Path) -> object:
    assert len(reference_folders(place)) == 1
    pairs = TokenizedSet.from_pairs(PAIRS)
    values, damaged = _open_store(place).read(pairs, range(len(PAIRS)))
    if damaged:  # a run says so and computes them again
        raise StoreError(damaged[0])
    return values


def _seal_store(place: Path, file: str) -> None:
    """A shard's name is the digest of its bytes."""
    path = place / file
    if path.suffix == ".parquet":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        path.rename(path.with_name(f"{'9' * 20}-{digest}.parquet"))
        for other in path.parent.glob("0*.parquet"):
            other.unlink()


def _load_checkpoint(place: Path) -> object:
    folder = place / "step_1"
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_file(folder, name, manifest)
    state = read_json(folder / "state.json")
    saved = SavedTensors(folder, manifest, None)
    return state, saved._slice(0, "w.master", 4)[:]


def _seal_checkpoint(place: Path, file: str) -> None:
    """As somebody would who wants it to be read: every digest is right."""
    from reinforcer_tp.checkpoint_folder import _digest

    path, manifest = place / file, place / "step_1" / "manifest.json"
    if path == manifest or not path.name.endswith((".json", ".safetensors")):
        return
    content = json.loads(manifest.read_text())
    content.pop("sha256")
    data = path.read_bytes()
    content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps({**content, "sha256": _digest(content)}))


def _load_run(place: Path) -> object:
    config = load_config(str(DEFAULT), [])
    logger = dataclasses.replace(config.logger, log_dir=str(place))
    config = dataclasses.replace(config, logger=logger)
    check_run_directory(config)
    return finished_steps(config)


CHECKPOINT = ("manifest.json", "state.json", "tensors.json", rank_file(0))
NEVER = ("pytorch_model.bin", "training_args.bin", "modeling_evil.py", "adapter_model.pt")
CODE = ("tokenization_evil.py", "__init__.py", "vocab.pkl")
ARRAYS = ("tokens", "lengths", "weights", "rows", "margins", "reference_sums")

TARGETS = (
    Target(name="configuration", folder="config", files=("run.yaml",), load=_load_config,
           extra=("sitecustomize.py",)),
    *(Target(name=name, folder="data", files=(name,), load=_load_file(name))
      for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.ndjson")),
    Target(name="saved rows", folder="data/saved", load=_load_folder,
           files=("state.json", "dataset_info.json", ARROW), extra=("saved.py", "cache.pkl")),
    Target(name="saved splits", folder="data/splits", load=_load_folder,
           files=("dataset_dict.json", "train/state.json", f"train/{ARROW}")),
    Target(name="model", folder="model", load=_load_model, extra=NEVER,
           files=("config.json", "generation_config.json", "model.safetensors")),
    Target(name="sharded model", folder="sharded", load=_load_model, extra=NEVER[:1],
           files=("model.safetensors.index.json", "model-00001-of-00001.safetensors")),
    Target(name="tokenizer", folder="tokenizer", load=_load_tokenizer, extra=CODE,
           files=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                  "config.json", "chat_template.jinja", "added_tokens.json")),
    Target(name="template", folder="template", files=("mine.jinja",), load=_load_template),
    Target(name="cached rows", folder="cache", load=_load_cached, extra=("set/dataset.pkl",),
           files=tuple(f"set/{name}" for name in (*(f"{n}.npy" for n in ARRAYS), "counts.json"))),
    Target(name="reference store", folder="store", load=_load_store, seal=_seal_store,
           refusals=(ValueError, StoreError), extra=(f"{KEY.name}/shard.pkl",),
           files=(f"{KEY.name}/reference.json", f"{KEY.name}/poison.parquet")),
    Target(name="checkpoint", folder="checkpoint", load=_load_checkpoint,
           files=tuple(f"step_1/{name}" for name in (*CHECKPOINT, "rng_state.pth"))),
    Target(name="sealed checkpoint", folder="checkpoint", load=_load_checkpoint,
           seal=_seal_checkpoint, files=tuple(f"step_1/{name}" for name in CHECKPOINT[1:])),
    Target(name="run folder", folder="run", load=_load_run, extra=("state.pkl",),
           files=("config.yaml", "finished.json")),
)  # fmt: skip

__all__ = ["TARGETS", "CheckpointError", "ConfigError", "Target", "make_good"]
