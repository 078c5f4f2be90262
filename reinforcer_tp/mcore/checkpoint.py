"""Saving a run in a form that any layout can read: masters, moments, counters; no pickle.

A rank writes what it owns, as flat pieces of Megatron's local parameters; tensors.json says where
each piece lies. A reader with the same tensor-parallel size takes the ranges it needs; with another
it puts each parameter together as Hugging Face has it and cuts that anew (restore.py). Every number
is float32 as the optimizer has it: the model's own weights are its masters, rounded.

The data position is the step itself: global batches are a pure function of seed and step.
"""

import datetime
import json
import os
import shutil
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reinforcer_tp.checkpoint_folder import (
    SaveError,
    begin_checkpoint,
    disk_errors,
    json_bytes,
    publish_checkpoint,
    rank_file,
    write_synced,
)
from reinforcer_tp.faultpoints import fault_point
from reinforcer_tp.mcore import random_state
from reinforcer_tp.mcore.model import PolicyModel
from reinforcer_tp.mcore.optim import Training
from reinforcer_tp.mcore.optimizer_state import (
    MOMENTS,
    num_updates,
    owned_parts,
    scaler_state,
)
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.mcore.weights import weight_table

_TIMEOUT = datetime.timedelta(days=1)  # a slow disk is not a dead peer
_WRITE_BYTES = 16 << 20
_ALIGNED = 64  # bytes
_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint on its way to the disk: what this rank writes and what rank 0 says of it."""

    step: int
    begin: float  # time.perf_counter() of the call
    tensors: dict[str, Tensor]  # contiguous; of this rank's file
    pieces: dict[str, tuple[int, int, int]]  # parameter -> (tensor-parallel rank, start, stop)
    state: bytes  # of state.json: the run's own goes on changing
    metrics: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is on the disk."""

    step: int
    folder: Path
    seconds: float  # from the call of `save`
    warning: str | None  # what `after` could not do


class CheckpointWriter:
    """Writes checkpoints into one directory, at once or beside the training. Rank by rank alike.

    `described` goes into every manifest: run, layout and fingerprints. `after(step)` runs on rank 0
    once a checkpoint is durable. Making one is collective.
    """

    def __init__(
        self,
        directory: Path,
        topology: Topology,
        *,
        described: Mapping[str, Any],
        is_async: bool = False,
        after: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._directory, self._topology = directory, topology
        self._described, self._is_async, self._after = described, is_async, after
        # Of its own: a save beside the training must not take its turns in the run's collectives.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._finished: deque[Saved] = deque()
        self._host = torch.empty(0, dtype=torch.uint8)  # copies of an asynchronous save

    def save(
        self,
        step: int,
        model: PolicyModel,
        training: Training,
        *,
        state: Mapping[str, Any],
        metrics: Mapping[str, float | None],
    ) -> float:
        """Writes `step_N`; asynchronously, only copies it and returns. Collective.

        `state` (JSON) comes back from load_checkpoint. Returns seconds that training waited for.
        Raises SaveError, on every rank; of an asynchronous save at the next call or in `wait`.
        """
        begin = time.perf_counter()
        self.wait()
        save = _collect(step, model, training, self._topology, state, metrics)
        if self._is_async:
            save = replace(save, begin=begin, tensors=self._copied(save.tensors))
            self._thread = threading.Thread(target=self._write_beside, args=(save,), daemon=True)
            self._thread.start()
        else:
            self._write(save)
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Until nothing is being written. Raises SaveError where that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def has_failed(self) -> bool:
        """An asynchronous save on this rank did not succeed; `wait` raises its error."""
        return self._error is not None

    def finished(self) -> list[Saved]:
        """Checkpoints that became durable since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in one buffer on the host, pinned and kept: the device is waited for once."""
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors.values()]
        if len(self._host) < sum(sizes):
            self._host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_cuda)
        copies, end = {}, 0
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            part, end = self._host[end : end + tensor.nbytes], end + size
            copy = part.view(tensor.dtype).view(tensor.shape)
            copies[name] = copy.copy_(tensor, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize()
        return copies

    def _write_beside(self, save: Save) -> None:
        try:
            self._write(save)
        except Exception as error:  # raised where the training waits for this save
            self._error = error

    def _write(self, save: Save) -> None:
        """Each part on all ranks before the next; what fails on one raises on all."""
        rank = self._topology.rank
        sizes = self._gather(lambda: sum(t.nbytes for t in save.tensors.values()))

        def begin() -> Path | None:
            if rank == 0:
                attempt = os.urandom(8).hex()
                return begin_checkpoint(self._directory, save.step, attempt, sum(sizes))
            return None

        building = self._gather(begin)[0]
        assert building is not None
        try:
            written = self._gather(lambda: _write_shard(building, rank, save))
            self._gather(lambda: self._publish(building, save, written))
        except BaseException:
            if rank == 0:
                shutil.rmtree(building, ignore_errors=True)
            raise
        warning = None
        if rank == 0:
            try:
                self._after(save.step)
            except SaveError as error:  # the checkpoint itself is there
                warning = str(error)
        seconds = time.perf_counter() - save.begin
        folder = self._directory / f"step_{save.step}"
        self._finished.append(
            Saved(step=save.step, folder=folder, seconds=seconds, warning=warning)
        )

    def _publish(self, building: Path, save: Save, written: list[Any]) -> Path | None:
        if self._topology.rank != 0:
            return None
        files = {rank_file(rank): record for rank, (record, _) in enumerate(written) if record}
        tensors: dict[str, list[list[int]]] = {}
        for rank, (_, pieces) in enumerate(written):
            for name, (tp_rank, start, stop) in pieces.items():
                tensors.setdefault(name, []).append([tp_rank, start, stop, rank])
        fault_point("ckpt.state")
        with disk_errors(f"writing {building}"):
            for name, content in (
                ("state.json", save.state),
                ("tensors.json", json_bytes(tensors)),
            ):
                files[name] = write_synced(building / name, [content])
        attempt = building.name.split(".")[1]
        described = {"step": save.step, "attempt": attempt, **self._described}
        return publish_checkpoint(building, files, described | {"metrics": save.metrics})

    def _gather(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all ranks, or its first error on every one of them."""
        return together(work, SaveError, self._group)


def together(work: Callable[[], T], raised: type[Exception], group: Any = None) -> list[T]:
    """Results of `work` by rank; an error on any rank raises `raised` on all. Collective."""
    outcome: tuple[Any, str | None]
    try:
        outcome = work(), None
    except Exception as error:  # whatever it is, the others must not wait for this rank
        text = str(error) if isinstance(error, raised) else f"{type(error).__name__}: {error}"
        outcome = None, f"{text} (rank {dist.get_rank()})"
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, outcome, group=group)
    errors = [error for _, error in everyone if error is not None]
    if errors:
        raise raised(errors[0])
    return [result for result, _ in everyone]


def _collect(
    step: int,
    model: PolicyModel,
    training: Training,
    topology: Topology,
    state: Mapping[str, Any],
    metrics: Mapping[str, float | None],
) -> Save:
    """What this rank writes; its tensors are the optimizer's own."""
    tensors: dict[str, Tensor] = {}
    pieces = {}
    owned_by = owned_parts(training)
    for parameter, entry in weight_table(model):
        owned = owned_by.get(parameter)
        if owned is None or getattr(parameter, "shared", False):
            continue  # the last stage's copy of the tied weight is the first stage's
        if entry.kind == "replicated" and topology.tp_rank > 0:
            continue
        start, stop = owned.start, owned.stop
        if owned.is_replicated:  # a share for each peer
            start, stop = _share(stop, topology.dp_rank, topology.dp_size)
        if start == stop:
            continue
        of_main = slice(start - owned.start, stop - owned.start)
        pieces[entry.name] = (topology.tp_rank, start, stop)
        tensors[f"{entry.name}.parameter"] = owned.main.detach().view(-1)[of_main]
        for name in MOMENTS:
            if name in owned.state:
                tensors[f"{entry.name}.{name}"] = owned.state[name].view(-1)[of_main]
    tensors |= random_state.get()
    return Save(
        step=step,
        begin=time.perf_counter(),
        tensors=tensors,
        pieces=pieces,
        state=json_bytes(
            {
                **state,
                "scheduler_steps": training.scheduler.num_steps,
                "updates": num_updates(training),
                "grad_scaler": scaler_state(training),
            }
        ),
        metrics=dict(metrics),
    )


def _share(size: int, rank: int, count: int) -> tuple[int, int]:
    return size * rank // count, size * (rank + 1) // count


def _write_shard(building: Path, rank: int, save: Save) -> tuple[dict[str, Any] | None, dict]:
    with disk_errors(f"writing {building}"):
        fault_point("ckpt.shard.open")
        record = write_synced(building / rank_file(rank), _safetensors_chunks(save.tensors))
        fault_point("ckpt.shard.close")
    return record, save.pieces


def _safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, tensor by tensor, so that one at a time is on the host."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    written, is_past_half = 0, False
    for tensor in tensors.values():
        content = memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        for begin in range(0, len(content), _WRITE_BYTES):
            if not is_past_half and written >= offset // 2:
                is_past_half = True
                fault_point("ckpt.shard.mid")
            part = content[begin : begin + _WRITE_BYTES]
            yield part
            written += len(part)
