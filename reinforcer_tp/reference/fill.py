"""What a run reads of the store, and the sweep of what is not there yet."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from reinforcer_tp.config_check import ConfigError
from reinforcer_tp.data.micro_batches import MicroBatching
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.embedded import default_cache_root
from reinforcer_tp.mcore.schedule import Stage
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.mcore.weights import hf_tensors
from reinforcer_tp.nonfinite import NonFiniteError
from reinforcer_tp.reference.keys import ReferenceKey, reference_digest, tensor_digests
from reinforcer_tp.reference.store import ReferenceStore, StoreError
from reinforcer_tp.reference.sweep import sweep, sweep_batching

PATIENCE_S = 60.0  # for what another node has just written


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Pairs whose log-probs a run reads."""

    name: str  # training | validation
    pairs: TokenizedSet
    rows: tuple[int, ...]  # indices into `pairs`, none twice
    cut: MicroBatching  # as training or validation packs them


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Log-probs on the last stage, {} elsewhere, and what they cost."""

    values: dict[int, np.ndarray]  # index -> (C + R,) float32, chosen then rejected
    num_read: int  # pairs found in the store
    num_swept: int  # pairs that were not there
    num_tokens: int  # that the reference computed, laid out as they were packed


def digest_reference(files: Any, topology: Topology) -> str:
    """Hash (64 hex digits) of what decides the reference's log-probs but its dtype. Collective.

    `files` are hf_files.ModelFiles. Each rank reads its share of the tensors.
    """
    names = sorted(hf_tensors(files.shape))
    parts: list = [None] * topology.world_size
    own = tensor_digests(files.reader, names[topology.rank :: topology.world_size])
    dist.all_gather_object(parts, own)
    return reference_digest({k: v for part in parts for k, v in part.items()}, maths_of(files))


def maths_of(files: Any) -> dict[str, Any]:
    """What besides its tensors decides the numbers of a model's forward pass, as JSON."""
    shape = dataclasses.asdict(files.shape)
    del shape["initializer_range"]  # of random weights, which are hashed themselves
    return shape | {"rope": dict(files.hf_config.rope_parameters)}


def open_store(root: Path, key: ReferenceKey, model: str, topology: Topology) -> ReferenceStore:
    """The store of this reference, created where it is not there yet. Collective.

    Raises, alike on every rank:
        ConfigError: the folder holds something else under its name.
        StoreError: the folder cannot be written.
    """

    def open_it() -> ReferenceStore:
        try:
            return ReferenceStore(root, key, model=model)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    return _together(open_it, topology)


def fill(
    store: ReferenceStore,
    wanted: Wanted,
    open_reference: Callable[[], Stage],
    topology: Topology,
    progress: Any,  # progress.Progress
    *,
    max_tokens: int | None,  # of a row of the sweep; None = 4 times training's
    pairs_a_call: int,
) -> Filled:
    """The log-probs of `wanted`, swept first where the store lacks them. Collective.

    `open_reference` gives the stage that holds the reference's weights; it is called on every rank,
    and only when there is something to sweep.

    Raises, alike on every rank:
        NonFiniteError: a log-prob is not finite.
        StoreError: the store cannot be written, or is not the same folder on every node.
    """
    missing, found = _missing(store, wanted, topology, progress)
    num_tokens = 0
    if len(missing):
        lengths = wanted.pairs.lengths()[missing]
        _together(lambda: store.check_space(int(lengths[:, 1:].sum(dtype=np.int64))), topology)
        longest = int((lengths[:, 0] * 2 + lengths[:, 1] + lengths[:, 2]).max())
        cut = sweep_batching(wanted.cut, max_tokens, longest)
        lacking = dataclasses.replace(wanted, rows=tuple(missing.tolist()), cut=cut)
        num_tokens = _sweep(store, lacking, open_reference(), progress, pairs_a_call)

    def read() -> dict[int, np.ndarray]:
        if not topology.is_last_stage:
            return {}
        if len(found) == len(wanted.rows):
            return found
        return _read(store, wanted, topology.rank, PATIENCE_S if len(missing) else 0.0)

    return Filled(
        values=_together(read, topology),
        num_read=len(wanted.rows) - len(missing),
        num_swept=len(missing),
        num_tokens=num_tokens,
    )


def _missing(
    store: ReferenceStore, wanted: Wanted, topology: Topology, progress: Any
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """(rows that the store lacks as rank 0 sees it, what rank 0 has read): all sweep alike."""

    def look() -> tuple[list[int], dict[int, np.ndarray]]:
        found, damaged = store.read(wanted.pairs, wanted.rows)
        for line in damaged:
            progress.message(f"reference, {wanted.name}: {line}")
        return [row for row in wanted.rows if row not in found], found

    missing, found = _together(look if topology.is_rank_zero else lambda: ([], {}), topology)
    answer = [missing]
    dist.broadcast_object_list(answer, src=0)
    return np.asarray(answer[0], np.int64), found


def _read(
    store: ReferenceStore, wanted: Wanted, rank: int, patience_s: float
) -> dict[int, np.ndarray]:
    """Everything that is wanted; other nodes' new files may take a while to show."""
    begin = time.monotonic()
    while True:
        values, _ = store.read(wanted.pairs, wanted.rows)
        if len(values) == len(wanted.rows):
            return values
        if time.monotonic() - begin >= patience_s:
            raise StoreError(
                f"rank {rank} finds {len(values)} of {len(wanted.rows)} pairs in {store.folder}, "
                "where all should be now; reference.store_dir must be one folder that every node "
                "sees"
            )
        time.sleep(1.0)


def _sweep(
    store: ReferenceStore, wanted: Wanted, stage: Stage, progress: Any, pairs_a_call: int
) -> int:
    """Writes what is swept, each data-parallel rank its own shards; returns the tokens."""
    topology = stage.topology
    writes = topology.is_last_stage and topology.tp_rank == 0
    done, num_tokens, begin = 0, 0, time.perf_counter()
    with (
        store.writer() if writes else nullcontext() as writer,
        progress.track(f"reference, {wanted.name}", len(wanted.rows)) as bar,
    ):
        passes = sweep(stage, wanted.pairs, wanted.rows, wanted.cut, pairs_a_call=pairs_a_call)
        for num_pairs, tokens, found in passes:

            def keep(found: Mapping[int, np.ndarray] = found) -> None:
                for index, logps in found.items():
                    pair = wanted.pairs[index]
                    _check_finite(pair, logps, wanted.name, topology.rank)
                    if writes:
                        writer.add(pair, logps)

            _together(keep, topology)
            done, num_tokens = done + num_pairs, num_tokens + tokens
            bar.advance(done, f"{num_tokens / (time.perf_counter() - begin):,.0f} tokens/s")
        _together(writer.flush if writes else lambda: None, topology)
    return num_tokens


def _check_finite(pair: Any, logps: np.ndarray, name: str, rank: int) -> None:
    if np.isfinite(logps).all():
        return
    side = "rejected" if np.isfinite(logps[: len(pair.chosen)]).all() else "chosen"
    raise NonFiniteError(
        f"the reference's log-probs of the {name} pair of source row {pair.row}, {side} side, are "
        f"not finite (rank {rank}); look at the weights of the reference model, at the row, or use "
        "policy.precision=bfloat16 where float16 overflows"
    )


def _together(action: Callable[[], Any], topology: Topology) -> Any:
    """Runs `action`; an error of one rank is raised on all: the others would wait for it."""
    result, mine = None, None
    try:
        result = action()
    except (NonFiniteError, StoreError, ConfigError) as error:
        mine = error
    errors: list = [None] * topology.world_size
    dist.all_gather_object(errors, mine)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first from mine
    return result


def store_root(section: Any) -> Path:
    """`reference.store_dir`, or its place in the cache."""
    return Path(section.store_dir or default_cache_root() / "reference").expanduser()
