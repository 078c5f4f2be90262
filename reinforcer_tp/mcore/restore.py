"""Restoring a run from a checkpoint of any layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reinforcer_tp.checkpoint_folder import (
    CheckpointError,
    check_file,
    rank_file,
    read_json,
    read_manifest,
)
from reinforcer_tp.faultpoints import fault_point
from reinforcer_tp.mcore import random_state
from reinforcer_tp.mcore.checkpoint import together
from reinforcer_tp.mcore.model import PolicyModel
from reinforcer_tp.mcore.optim import Training
from reinforcer_tp.mcore.optimizer_state import (
    MOMENTS,
    owned_parts,
    set_moments,
    set_scaler_state,
    set_updates,
)
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.mcore.weights import Entry, reshard, shard_shape, weight_table


class SavedTensors:
    """The pieces of one checkpoint whose files are verified. Every read raises CheckpointError."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], shape: ModelShape) -> None:
        self.layout = manifest["layout"]
        self._folder, self._shape = folder, shape
        self._tp_size = int(self.layout["tensor_model_parallel_size"])
        self._pieces = read_json(folder / "tensors.json")
        self._handles: dict[int, Any] = {}
        self._shards: tuple[str, list[Tensor]] = ("", [])  # of the parameter read last

    def shard(self, entry: Entry, kind: str, topology: Topology) -> Tensor:
        """This rank's local parameter, or one of its moments, float32 in its shape."""
        if self._tp_size == topology.tp_size or entry.kind == "replicated":
            size = shard_shape(entry, self._shape, topology.tp_size)
            return self._read_shard(entry, kind, topology.tp_rank, size)
        key = f"{entry.name}.{kind}"
        if self._shards[0] != key:
            size = shard_shape(entry, self._shape, self._tp_size)
            shards = [self._read_shard(entry, kind, r, size) for r in range(self._tp_size)]
            self._shards = key, shards
        return reshard(entry, self._shards[1], self._shape, topology.tp_rank, topology.tp_size)

    def flat(self, entry: Entry, kind: str, topology: Topology, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of what `shard` gives, flattened."""
        if self._tp_size == topology.tp_size or entry.kind == "replicated":
            return self._read_flat(entry, kind, topology.tp_rank, start, stop)
        return self.shard(entry, kind, topology).reshape(-1)[start:stop].clone()

    def random_state(self, rank: int) -> dict[str, Tensor]:
        """What random_state.get gave on that rank."""
        handle = self._open(rank)
        return {n: handle.get_tensor(n) for n in handle.keys() if n.startswith(random_state.PREFIX)}  # noqa: SIM118

    def _read_shard(self, entry: Entry, kind: str, tp_rank: int, size: tuple[int, ...]) -> Tensor:
        numel = int(torch.Size(size).numel())
        return self._read_flat(entry, kind, tp_rank, 0, numel, whole=True).view(size)

    def _read_flat(
        self,
        entry: Entry,
        kind: str,
        tp_rank: int,
        start: int,
        stop: int,
        *,
        whole: bool = False,
    ) -> Tensor:
        wanted_rank = 0 if entry.kind == "replicated" else tp_rank
        found = torch.empty(stop - start, dtype=torch.float32)
        position = 0
        for _, begin, end, rank in sorted(
            piece for piece in self._pieces.get(entry.name, []) if piece[0] == wanted_rank
        ):
            if begin != position or end <= begin:
                break
            position = end
            first, last = max(begin, start), min(end, stop)
            if first < last:
                part = self._slice(rank, f"{entry.name}.{kind}", end - begin)
                found[first - start : last - start] = part[first - begin : last - begin]
        if position < stop or (whole and position != stop):
            raise CheckpointError(
                f"{self._folder / 'tensors.json'}: {entry.name} of tensor-parallel rank "
                f"{wanted_rank} has {position} elements in order, expected {stop}; the checkpoint "
                "is of another model"
            )
        return found

    def _slice(self, rank: int, key: str, size: int) -> Any:
        handle = self._open(rank)
        try:
            part = handle.get_slice(key)
            dtype, shape = part.get_dtype(), part.get_shape()
        except SafetensorError as error:
            file = self._folder / rank_file(rank)
            raise CheckpointError(f"{file} has no tensor {key} ({error})") from error
        if dtype != "F32" or shape != [size]:
            raise CheckpointError(
                f"{self._folder / rank_file(rank)}: {key} is {dtype} of shape {shape}, expected "
                f"F32 of shape [{size}]"
            )
        return part

    def _open(self, rank: int) -> Any:
        if rank not in self._handles:
            path = self._folder / rank_file(rank)
            try:
                self._handles[rank] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is no safetensors file ({error})") from error
        return self._handles[rank]


def first_undamaged(
    folders: Sequence[Path], topology: Topology, *, may_fall_back: bool
) -> tuple[int, list[str]]:
    """(index of the first checkpoint that is as it was written, what is wrong with those before).

    Every file is read once, ranks side by side. Raises CheckpointError, on all ranks, for the first
    one, unless a later one `may_fall_back` to is whole. Collective.
    """
    errors: list[CheckpointError] = []
    for index, folder in enumerate(folders):
        try:
            _verify(folder, topology)
        except CheckpointError as error:
            if not may_fall_back:
                raise
            errors.append(error)
        else:
            return index, [str(error) for error in errors]
    raise errors[0]


def _verify(folder: Path, topology: Topology) -> None:
    def check() -> None:
        manifest = read_manifest(folder)
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        names = sorted(sizes, key=lambda name: (-sizes[name], name))
        for name in names[topology.rank :: topology.world_size]:
            fault_point("load.shard")
            check_file(folder, name, manifest)

    fault_point("load.begin")
    together(check, CheckpointError)


@torch.no_grad()
def load_checkpoint(
    folder: Path,
    model: PolicyModel,
    training: Training,
    topology: Topology,
    *,
    is_verified: bool = False,
) -> dict[str, Any]:
    """Restores weights, optimizer, scheduler and loss scale of a checkpoint of any layout.

    Returns the `state` that was given to `CheckpointWriter.save`, and what it added. Raises
    CheckpointError on all ranks; unless it `is_verified`, every byte is looked at before a weight
    changes. Collective.
    """
    if not is_verified:
        first_undamaged([folder], topology, may_fall_back=False)

    def restore() -> dict[str, Any]:
        state = read_json(folder / "state.json")
        for name in ("updates", "scheduler_steps"):
            if not isinstance(state.get(name), int) or state[name] < 0:
                raise CheckpointError(f"{folder / 'state.json'} has no number of {name}")
        try:
            saved = SavedTensors(folder, read_manifest(folder), model.shape)
            _restore(saved, model, training, topology, state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            kind = type(error).__name__
            raise CheckpointError(f"{folder} is no checkpoint of ours: {kind}: {error}") from error
        return state

    state = together(restore, CheckpointError)[topology.rank]
    fault_point("load.end")
    return state


def _restore(
    saved: SavedTensors,
    model: PolicyModel,
    training: Training,
    topology: Topology,
    state: Mapping[str, Any],
) -> None:
    owned_by, updates = owned_parts(training), int(state["updates"])
    for parameter, entry in weight_table(model):
        shard = saved.shard(entry, "parameter", topology)
        parameter.copy_(shard)
        owned = owned_by.get(parameter)
        if owned is None:
            continue
        owned.main.view(-1).copy_(shard.reshape(-1)[owned.start : owned.stop])
        if updates:
            ranges = owned.start, owned.stop
            moments = {name: saved.flat(entry, name, topology, *ranges) for name in MOMENTS}
            set_moments(owned, moments, updates)
    set_updates(training, updates)
    training.scheduler.num_steps = 0
    training.scheduler.step(increment=int(state["scheduler_steps"]))
    set_scaler_state(training, state["grad_scaler"])
    if saved.layout == topology.layout():
        random_state.set(saved.random_state(topology.rank))
