"""Recomputes some of the pairs of a stored reference, with its model on one process."""

import dataclasses
import hashlib
import heapq
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reinforcer_tp.config import Config, load_config
from reinforcer_tp.data.micro_batches import MicroBatching, check_token_ids
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.hf_files import ModelFiles, open_model
from reinforcer_tp.mcore.schedule import load_stage
from reinforcer_tp.mcore.topology import Topology, destroy_topology, init_topology
from reinforcer_tp.reference.fill import digest_reference
from reinforcer_tp.reference.keys import numerics
from reinforcer_tp.reference.shards import DamagedShard, Shard
from reinforcer_tp.reference.store import Description, read_folder
from reinforcer_tp.reference.sweep import sweep_reference

# (largest, mean) absolute difference of a token's log-prob. Layouts in float32 differ by 2e-5 at
# most. 16 bits resolve a hidden state to one part in 256 or 2048; two packings of a small model in
# bfloat16 differ by 4e-2 and 3e-4, larger models by more.
_BOUNDS = {"float32": (1e-4, 1e-4), "bfloat16": (0.2, 0.02), "float16": (0.2, 0.02)}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One pair of a store."""

    shard: Path
    tokens: np.ndarray  # (P + C + R,) int32
    lengths: np.ndarray  # (3,) int32
    logps: np.ndarray  # (C + R,) float32


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far the stored log-probs are from those of today."""

    agrees: bool
    text: str  # two lines
    damaged: tuple[str, ...]  # a line on each shard that could not be looked at


def verify(
    folder: Path, description: Description, *, model: str | None, num_pairs: int, seed: int
) -> Verdict:
    """Recomputes `num_pairs` random pairs of the reference in `folder`.

    `model` is a folder or hub id; None = the one that reference.json names.

    Raises:
        ValueError: the model's weights are not the reference's, or there is nothing to compare.
        ConfigError: there is no such model.
    """
    stored, damaged = sample(folder, description, num_pairs, seed)
    if not stored:
        raise ValueError(f"{folder} holds no pair that could be recomputed")
    precision = description.key.numerics.split("-")[0]
    if "_fp8_" in description.key.numerics:
        raise ValueError(
            f"{folder} was computed in FP8 ({description.key.numerics}), where a log-prob depends "
            "on the micro-batch around it: there is nothing to compare with"
        )
    if precision not in _BOUNDS or description.key.numerics != numerics(precision):
        raise ValueError(
            f"{folder} was computed as {description.key.numerics}, this version computes "
            f"{numerics('<precision>')}; nothing reads it any more, remove it with prune"
        )
    length = max(int(s.lengths[0] + s.lengths[1:].max()) for s in stored)
    config = _config(model or description.model, precision, length)
    files = open_model(config, config.policy.model_name, None)
    pairs = TokenizedSet.from_pairs(_pair(s, row) for row, s in enumerate(stored))
    check_token_ids(pairs, files.shape.vocab_size)
    topology = init_topology(1, 1, seed=config.dpo.seed)
    try:
        _check_digest(files, topology, description)
        computed = _compute(config, files, pairs, topology)
    finally:
        destroy_topology()
    agrees, text = judge(stored, [computed[i] for i in range(len(stored))], precision)
    return Verdict(agrees=agrees, text=text, damaged=damaged)


def sample(
    folder: Path, description: Description, num_pairs: int, seed: int
) -> tuple[list[Stored], tuple[str, ...]]:
    """Random pairs, a function of seed and content alone, and a line on each damaged shard.

    Those whose hash with the seed is smallest: one pass, and little of it in memory.
    """
    best: dict[int, Stored] = {}  # hash -> pair
    damaged = []
    for path, shard in read_folder(folder, description.key):
        if isinstance(shard, DamagedShard):
            damaged.append(f"{path}: {shard}")
            continue
        scores = [_score(key, seed) for key in shard.keys]
        for row in heapq.nsmallest(num_pairs, range(len(scores)), key=scores.__getitem__):
            # The oldest shard with a pair counts, as for readers.
            best.setdefault(scores[row], _stored(path, shard, row))
        best = dict(heapq.nsmallest(num_pairs, best.items(), key=lambda item: item[0]))
    return list(best.values()), tuple(damaged)


def _score(key: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(b"%d:%b" % (seed, key)).digest()[:16], "big")


def _stored(path: Path, shard: Shard, row: int) -> Stored:
    begin, first = int(shard.lengths[:row].sum()), int(shard.num_responses[:row].sum())
    lengths = shard.lengths[row]
    return Stored(
        shard=path,
        tokens=shard.tokens[begin : begin + int(lengths.sum())].copy(),
        lengths=lengths.copy(),
        logps=shard.logps[first : first + int(lengths[1:].sum())].copy(),
    )


def _pair(stored: Stored, row: int) -> TokenizedPair:
    ids, (prompt, chosen, _) = stored.tokens.tolist(), stored.lengths.tolist()
    response = prompt + chosen
    return TokenizedPair(
        prompt=ids[:prompt], chosen=ids[prompt:response], rejected=ids[response:], row=row
    )


def _config(model: str, precision: str, length: int) -> Config:
    config = load_config(None, ["policy.model_name=reference"])
    policy = dataclasses.replace(  # not as overrides: a path may hold what they would interpret
        config.policy, model_name=model, precision=precision, max_total_sequence_length=length
    )
    return dataclasses.replace(config, policy=policy)


def _check_digest(files: ModelFiles, topology: Topology, description: Description) -> None:
    digest = digest_reference(files, topology)
    if digest != description.key.digest:
        raise ValueError(
            f"the weights in {files.folder} are not those of this reference: their digest is "
            f"{digest[:32]}, expected {description.key.digest[:32]}; name the folder that holds "
            "its weights with --model"
        )


def _compute(
    config: Config, files: ModelFiles, pairs: TokenizedSet, topology: Topology
) -> dict[int, np.ndarray]:
    """Each pair alone and nothing shared: not as a run would pack them."""
    cut = MicroBatching(
        max_tokens=None,
        max_pairs=1,
        dp_rank=0,
        dp_size=1,
        divisible_by=1,
        equal_rows=False,
        share="nothing",
    )
    stage = load_stage(files.hf_config, files.reader, config.policy, topology)
    return sweep_reference(stage, pairs, range(len(pairs)), cut)


def judge(stored: list[Stored], computed: list[np.ndarray], precision: str) -> tuple[bool, str]:
    """Whether they agree, and what to print of it."""
    gaps = [np.abs(s.logps.astype(np.float64) - c) for s, c in zip(stored, computed, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: gaps[i].max())
    largest, mean = float(gaps[worst].max()), float(np.concatenate(gaps).mean())
    bound, mean_bound = _BOUNDS[precision]
    agrees = largest <= bound and mean <= mean_bound
    token, pair = int(gaps[worst].argmax()), stored[worst]
    num_chosen = int(pair.lengths[1])
    side = f"chosen token {token}" if token < num_chosen else f"rejected token {token - num_chosen}"
    return agrees, (
        f"{'agrees' if agrees else 'DIFFERS'}: {len(stored)} pairs, per response token at most "
        f"{largest:.1e} and {mean:.1e} in the mean (allowed in {precision}: {bound:.0e} and "
        f"{mean_bound:.0e})\n"
        f"worst: {side} of a pair of {pair.lengths.tolist()} tokens in {pair.shard.name}: "
        f"{pair.logps[token]:.6f} stored, {computed[worst][token]:.6f} now"
    )
