"""The policy's stage, and where its reference log-probs come from (`reference.mode`)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reinforcer_tp.batches import micro_batching, train_rows, validation_batches
from reinforcer_tp.config import Config, ConfigError
from reinforcer_tp.data.prepare import TokenizedSet
from reinforcer_tp.inputs import Inputs
from reinforcer_tp.loop import PairSet
from reinforcer_tp.mcore.schedule import Stage, load_stage
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.metrics import Progress
from reinforcer_tp.reference.fill import (
    Filled,
    Wanted,
    digest_reference,
    fill,
    open_store,
    store_root,
)
from reinforcer_tp.reference.keys import ReferenceKey, numerics
from reinforcer_tp.reference.store import ReferenceStore
from reinforcer_tp.resume import ResumePoint


@dataclass(frozen=True, kw_only=True)
class References:
    """What the loop needs of policy and reference."""

    stage: Stage  # of the policy, with the weights of policy.model_name
    resident: Stage | None  # of the reference, where it runs each step
    train_set: PairSet
    validation_set: PairSet | None
    digest: str | None  # of the reference's weights; None = no model of ours is read
    seconds: float  # of hashing, reading and sweeping; building models is not in it
    num_tokens: int  # that the reference computed
    is_policy: bool  # the reference is the policy as it is now


class _Models:
    """Policy and reference, built when first asked for: what is in the store needs no reference."""

    def __init__(self, config: Config, inputs: Inputs, topology: Topology) -> None:
        self._config, self._inputs, self._topology = config, inputs, topology
        self._policy: Stage | None = None
        self._reference: Stage | None = None
        self.build_s = 0.0

    def policy(self) -> Stage:
        self._reference = None  # two models are held by reference.mode=resident alone
        if self._policy is None:
            self._policy = self.build(self._inputs.files)
        return self._policy

    def reference(self) -> Stage:
        if self._inputs.reference_files is None:
            return self.policy()
        if self._reference is None:
            self._reference = self.build(self._inputs.reference_files)
        return self._reference

    def build(self, files: Any) -> Stage:
        begin = time.perf_counter()
        stage = load_stage(files.hf_config, files.reader, self._config.policy, self._topology)
        self.build_s += time.perf_counter() - begin
        return stage


def open_references(
    config: Config, inputs: Inputs, topology: Topology, progress: Progress
) -> References:
    """Reads, sweeps or loads the reference. Collective; no checkpoint is loaded yet.

    Raises, alike on every rank:
        ConfigError: the checkpoint to go on from was trained against another reference, or the
            store is none.
        NonFiniteError, StoreError: as `reference.fill.fill`.
    """
    begin, mode = time.perf_counter(), config.reference_mode
    models = _Models(config, inputs, topology)
    files = inputs.reference_files or inputs.files
    train, validation = inputs.data.train, inputs.data.validation
    sets = {"training": train} | ({} if validation is None else {"validation": validation})
    digest, num_tokens = None, 0
    if mode != "none" and not train.has_reference:
        digest = digest_reference(files, topology)
        _check_resumed(config, inputs.resumed, digest)
    opened = {name: PairSet(pairs=pairs, reference=None) for name, pairs in sets.items()}
    if mode == "none":
        losses = ", ".join(name for name, _ in config.dpo.loss_options["losses"])
        progress.message(f"reference: {losses} reads none")
    elif train.has_reference:
        opened = {
            name: PairSet(pairs=pairs, reference=pairs.reference_logps, token_reference=False)
            for name, pairs in sets.items()
        }
        progress.message("reference: its log-probs come with the rows")
    elif mode == "store":
        key = ReferenceKey(digest, numerics(config.policy.precision, config.policy.fp8))
        store = open_store(store_root(config.reference), key, str(files.folder), topology)
        progress.message(f"reference store: {store.folder}")
        for name, pairs in sets.items():
            wanted = _wanted(config, inputs, name, pairs, topology)
            filled = _fill(config, store, wanted, models.reference, topology, progress)
            opened[name] = PairSet(pairs=pairs, reference=filled.values.__getitem__)
            num_tokens += filled.num_tokens
    seconds = time.perf_counter() - begin - models.build_s
    return References(
        stage=models.policy(),
        resident=models.build(files) if mode == "resident" else None,
        train_set=opened["training"],
        validation_set=opened.get("validation"),
        digest=digest,
        seconds=seconds,
        num_tokens=num_tokens,
        is_policy=digest is not None and inputs.reference_files is None,
    )


def _check_resumed(config: Config, resumed: ResumePoint | None, digest: str | None) -> None:
    """A model folder that was written over would become the reference of a resumed run."""
    if resumed is None or "reference" in config.checkpointing.allow_changed:
        return
    before = resumed.manifest.get("reference")
    if before is not None and digest is not None and before != digest:
        raise ConfigError(
            f"the reference's weights have changed since {resumed.folder} was written (digest "
            f"{before[:12]} there, {digest[:12]} now): was the folder of policy.model_name or "
            "reference.model_name written over? Put it back, choose another logger.log_dir, or go "
            "on all the same with checkpointing.allow_changed=[reference]"
        )


def _wanted(
    config: Config, inputs: Inputs, name: str, pairs: TokenizedSet, topology: Topology
) -> Wanted:
    """The pairs that this run will read, each once."""
    if name == "training":
        steps = range(inputs.start_step + 1, inputs.total_steps + 1)
        batches = (train_rows(config, len(pairs), step) for step in steps)
    else:
        batches = validation_batches(config, len(pairs))
    rows = sorted({row for batch in batches for row in batch})
    cut = micro_batching(config, inputs.files.shape, topology, is_validation=name == "validation")
    return Wanted(name=name, pairs=pairs, rows=tuple(rows), cut=cut)


def _fill(
    config: Config,
    store: ReferenceStore,
    wanted: Wanted,
    open_reference: Callable[[], Stage],
    topology: Topology,
    progress: Progress,
) -> Filled:
    filled = fill(
        store,
        wanted,
        open_reference,
        topology,
        progress,
        max_tokens=config.reference.micro_batch_tokens,
        pairs_a_call=config.policy.train_global_batch_size,
    )
    total = filled.num_read + filled.num_swept
    progress.message(
        f"reference, {wanted.name}: {filled.num_read:,} of {total:,} pairs were in the store, "
        f"{filled.num_tokens:,} tokens computed"
    )
    return filled
