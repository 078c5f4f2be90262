"""Tiny models and pairs for the tests of reference log-probs, what transformers says of them, and
a process of one rank that starts in a moment.
"""

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.distributed.judge import sequence_logps

VOCAB = 131  # prime: padded under tp=2
BROKEN_TOKEN = 129  # in no pair but the broken one
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LAYOUTS = {  # name -> (tp, pp, sequence parallel); dp is what is left of the world
    "tp2_sp": (2, 1, True),
    "pp2": (1, 2, False),
    "dp2": (1, 1, False),
}
ALONE = (1, 1, False)
SIZES = [  # tokens of prompt, chosen, rejected, and of how both responses begin
    (5, 9, 4, 0),
    (30, 20, 28, 0),
    (1, 1, 2, 0),
    (7, 1, 1, 0),
    (6, 4, 3, 5),
    (9, 0, 6, 4),
    (9, 5, 0, 4),
    (3, 12, 2, 8),
    (11, 3, 8, 0),
    (4, 6, 6, 0),
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "reinforcer_tp.loop", "reinforcer_tp.mcore.optim"]
)


def make_pairs() -> list:
    """Weights from 0 to 2, margins, and rows that are not indices."""
    from reinforcer_tp.data.tokenized import TokenizedPair

    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(3, BROKEN_TOKEN, (count,), generator=generator).tolist()

    pairs = []
    for index, (prompt, chosen, rejected, common) in enumerate(SIZES):
        begin = ids(common)
        pair = TokenizedPair(
            prompt=ids(prompt), chosen=begin + ids(chosen), rejected=begin + ids(rejected),
            weight=(1.0, 0.5, 2.0, 1.0, 0.0)[index % 5], row=3 * index + 5, margin=0.2 * index,
        )  # fmt: skip
        pairs.append(pair)
    return pairs


def write_model(folder: Path, seed: int = 3, dtype: torch.dtype = torch.float32) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def write_variant(
    folder: Path,
    source: str,
    *,
    weights: Callable[[dict], None] = lambda tensors: None,
    config: Callable[[dict], None] = lambda content: None,
    num_files: int = 1,
) -> str:
    """`source` with changed weights or config.json, perhaps in several files."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    content = json.loads((Path(source) / "config.json").read_text())
    config(content)
    (folder / "config.json").write_text(json.dumps(content))
    tensors = load_file(Path(source) / "model.safetensors")
    weights(tensors)
    names = sorted(tensors)
    for i in range(num_files):
        part = {name: tensors[name] for name in names[i::num_files]}
        save_file(part, folder / f"part{i}.safetensors", metadata={"format": "pt"})
    return str(folder)


def judge(folder: str, pairs: list) -> list[np.ndarray]:
    """(C + R,) float64 log-probs of each pair's response tokens, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double()
    with torch.no_grad():
        return [
            torch.cat([sequence_logps(model, p.prompt, r) for r in (p.chosen, p.rejected)]).numpy()
            for p in pairs
        ]


@cache
def config_of(layout: tuple[int, int, bool], *overrides: str):
    from reinforcer_tp.config import load_config

    tp, pp, sequence_parallel = layout
    return load_config(
        None,
        [
            "policy.model_name=unused",
            "policy.precision=float32",
            "policy.micro_batch_tokens=100",
            f"policy.megatron_cfg.tensor_model_parallel_size={tp}",
            f"policy.megatron_cfg.pipeline_model_parallel_size={pp}",
            f"policy.megatron_cfg.sequence_parallel={sequence_parallel}",
            *overrides,
        ],
    )


def open_layout(layout: tuple[int, int, bool]):
    """The topology, in place of the one that was there before."""
    from megatron.core import parallel_state

    from reinforcer_tp.mcore.topology import init_topology

    parallel_state.destroy_model_parallel()
    return init_topology(*layout[:2], seed=0)


def model_files(folder: str):
    from transformers import AutoConfig

    from reinforcer_tp.hf_files import ModelFiles
    from reinforcer_tp.mcore.shape import model_shape
    from reinforcer_tp.mcore.weights import SafetensorsReader

    config = AutoConfig.from_pretrained(folder)
    return ModelFiles(
        folder=Path(folder), hf_config=config, shape=model_shape(config),
        reader=SafetensorsReader(folder),
    )  # fmt: skip


def open_model(config, folder: str, topology):
    """The stage with the folder's weights, without DDP."""
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.schedule import open_stage
    from reinforcer_tp.mcore.weights import load_weights

    files = model_files(folder)
    model = build_model(files.hf_config, config.policy, topology)
    load_weights(model, files.reader, topology)
    return open_stage(model, config.policy, topology)


def fill_store(
    root: str,
    folder: str,
    topology,
    layout: tuple[int, int, bool] = ALONE,
    *,
    pairs: list | None = None,
    precision: str = "float32",
    max_pairs: int | None = None,  # in place of a budget of tokens
) -> dict[str, Any]:
    """What `fill` gives this rank for all pairs, as any run calls it."""
    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.tokenized import TokenizedSet
    from reinforcer_tp.progress import Progress
    from reinforcer_tp.reference.fill import Wanted, digest_reference, fill, open_store
    from reinforcer_tp.reference.keys import ReferenceKey, numerics

    files = model_files(folder)
    config = config_of(layout, f"policy.precision={precision}")
    key = ReferenceKey(digest_reference(files, topology), numerics(precision))
    store = open_store(Path(root), key, folder, topology)
    cut = micro_batching(config, files.shape, topology)
    if max_pairs is not None:
        cut = replace(cut, max_tokens=None, max_pairs=max_pairs)
    pairs = TokenizedSet.from_pairs(make_pairs() if pairs is None else pairs)
    wanted = Wanted(name="training", pairs=pairs, rows=tuple(range(len(pairs))), cut=cut)
    progress, messages, built = Progress(1, 0, topology.is_rank_zero), [], []
    progress.message = messages.append

    def reference():
        built.append(True)
        return open_model(config, folder, topology)

    filled = fill(
        store, wanted, reference, topology, progress, max_tokens=None, pairs_a_call=max_pairs or 4
    )
    return {
        "digest": key.digest,
        "values": filled.values,
        "read": filled.num_read,
        "swept": filled.num_swept,
        "tokens": filled.num_tokens,
        "built": bool(built),
        "messages": [line for line in messages if " | ETA " not in line],
        "shards": sorted(path.name for path in store.folder.glob("*.parquet")),
    }


def fill_alone(topology, root: str, folder: str, options: dict | None = None) -> dict:
    """`fill_store` for `alone`."""
    return fill_store(root, folder, topology, **(options or {}))


def attempt(action: Callable[[], Any]) -> Any:
    """What `action` gives, or `Type: message` of the error it raises."""
    try:
        return action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def alone(fn: Callable[..., Any], folder: Path, *args: Any, exit_code: int = 0) -> Any:
    """`fn(*args)` in a process of one rank that ends with `exit_code`; None if it is not 0.

    It is forked from one that has the heavy modules already. Its output passes through `folder`.
    """
    result = folder / "result"
    process = _forks.Process(target=_run_alone, args=(fn, args, str(result)), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == exit_code, f"exit {process.exitcode}, expected {exit_code}"
    return pickle.loads(result.read_bytes()) if exit_code == 0 else None


def _run_alone(fn: Callable[..., Any], args: tuple, result: str) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from reinforcer_tp.mcore.topology import init_topology

    found = fn(init_topology(1, 1, seed=0), *args)
    Path(result).write_bytes(pickle.dumps(found))


def packed_tokens(pairs: list) -> int:
    """Tokens laid out when each pair has its prompt once."""
    return sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def assert_values(values: dict[int, np.ndarray], expected: list[np.ndarray]) -> None:
    assert sorted(values) == list(range(len(expected)))
    for index, logps in values.items():
        assert logps.dtype == np.float32
        np.testing.assert_allclose(logps, expected[index], rtol=0, atol=2e-5)
