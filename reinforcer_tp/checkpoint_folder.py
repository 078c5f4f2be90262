"""The folder of one checkpoint: written once, whole or not there, every byte of it accounted for.

    step_N/manifest.json   run, step, attempt, layout, fingerprints, metrics, files; its own SHA-256
    step_N/state.json      what is not a tensor
    step_N/tensors.json    tensor -> pieces: (tensor-parallel rank, start, stop, file)
    step_N/rank_RRRRR.safetensors

It is built as `step_N.<attempt>.partial`, gets its name by a rename when all is on the disk, and
loses it by a rename (`trash_...`) before anything in it is deleted. The newest checkpoint is the
one with the highest step: there is no pointer that could lag behind. Imports no torch.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reinforcer_tp import untrusted
from reinforcer_tp.faultpoints import fault_point
from reinforcer_tp.whole_files import sync_folder

FORMAT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{1,12})")
_LEFT_OVER = re.compile(r"step_\d{1,12}\.[0-9a-f]{16}\.partial|trash_step_\d{1,12}\.[0-9a-f]{16}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_JSON_BYTES = 1 << 30
_READ_BYTES = 16 << 20
_FLUSH_BYTES = 64 << 20
_SPARE = 1.1  # times what a checkpoint needs must be free


class CheckpointError(ValueError):
    """A checkpoint that must not be used; one line that names the file."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are as they were. One line."""


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def list_checkpoints(directory: Path) -> dict[int, Path]:
    """step -> folder of every checkpoint, ascending; whether one is whole, read_manifest says."""
    found = {}
    for path in directory.glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, with the right sizes.

    Raises CheckpointError. The files' digests are compared by `check_file`.
    """
    path = folder / MANIFEST
    if not path.is_file() and (folder / "state.json").is_file():
        raise CheckpointError(
            f"{path} is missing: {folder} is damaged, or its format is older than {FORMAT}, which "
            "this version does not read; choose another logger.log_dir"
        )
    manifest = read_json(path)
    said = manifest.pop("sha256", None)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}; use the "
            "version that wrote it, or choose another logger.log_dir"
        )
    if said != _digest(manifest):
        raise CheckpointError(f"{path} is not as it was written: its own SHA-256 is another")
    match = _NAME.fullmatch(folder.resolve().name)
    if match is None or int(match[1]) != manifest.get("step"):
        raise CheckpointError(f"{path} is of step {manifest.get('step')!r}, its folder is {folder}")
    _check_names(folder, manifest)
    return manifest


def _check_names(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"state.json", "tensors.json"} <= set(files):
        raise CheckpointError(f"{folder / MANIFEST} lists no files of a checkpoint")
    for name, entry in files.items():
        path = folder / name
        if not _FILE.fullmatch(name) or not isinstance(entry, dict):
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is no file of ours")
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing; expected {entry.get('bytes')} bytes")
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(f"{path} has {size} bytes; expected {entry.get('bytes')}")
    strange = sorted(set(os.listdir(folder)) - set(files) - {MANIFEST})
    if strange:
        raise CheckpointError(f"{folder / strange[0]} is no file of this checkpoint; remove it")


def check_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Reads a whole file and compares its SHA-256. Raises CheckpointError."""
    digest = hashlib.sha256()
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
    expected = manifest["files"][name]["sha256"]
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{folder / name} is not as it was written: SHA-256 {digest.hexdigest()[:16]}..., "
            f"expected {str(expected)[:16]}...; restore it, remove {folder} to go on from the "
            "checkpoint before it, or set checkpointing.on_damaged=previous"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        return untrusted.read_json(path, _MAX_JSON_BYTES)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def told_as_damage(what: str) -> Iterator[None]:
    """An error of reading `what` of a state.json whose digest is right -> CheckpointError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        kind = type(error).__name__
        raise CheckpointError(
            f"the checkpoint's state.json holds no {what} of ours ({kind}: {error}); it was not "
            "written by this program"
        ) from error


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_writable(directory: Path) -> None:
    """Raises SaveError where no checkpoint could be written, before the first is due."""
    with disk_errors(f"making checkpointing.checkpoint_dir={directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()  # without a name where Linux can


def begin_checkpoint(directory: Path, step: int, attempt: str, num_bytes: int) -> Path:
    """The new folder to write into, when there is room for `num_bytes`. Raises SaveError."""
    fault_point("ckpt.begin")
    with disk_errors(f"making the folder of a checkpoint in {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        sync_folder(directory.parent)
        free = shutil.disk_usage(directory).free
        if free < _SPARE * num_bytes:
            raise SaveError(
                f"a checkpoint of step {step} needs {num_bytes / 2**20:,.1f} MiB and a tenth more, "
                f"but the disk of {directory} has {free / 2**20:,.1f} MiB free; free space, lower "
                "checkpointing.keep_top_k, or choose another checkpointing.checkpoint_dir"
            )
        building = directory / f"step_{step}.{attempt}.partial"
        building.mkdir()
    fault_point("ckpt.folder")
    return building


def write_synced(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Writes a new file and waits for the disk; {"bytes", "sha256"} of what was to be written.

    The digest is of the chunks in memory; it is computed, and the disk set to work, beside the
    writing. Raises OSError.
    """
    digest, size, flushed = hashlib.sha256(), 0, 0
    hashing: Future | None = None
    flushing: Future | None = None
    with open(path, "xb") as file, ThreadPoolExecutor(2) as beside:
        for chunk in chunks:
            if hashing is not None:
                hashing.result()  # no more than one chunk waits in memory
            hashing = beside.submit(digest.update, chunk)
            file.write(chunk)
            size += len(chunk)
            if size - flushed >= _FLUSH_BYTES and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()  # Linux tells of a failed write once
                flushing, flushed = beside.submit(os.fdatasync, file.fileno()), size
        file.flush()
        if flushing is not None:
            flushing.result()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def publish_checkpoint(building: Path, files: dict[str, Any], described: Mapping[str, Any]) -> Path:
    """Writes the manifest over `files` and gives the folder its name. Raises SaveError."""
    step, attempt = described["step"], described["attempt"]
    folder = building.with_name(f"step_{step}")
    manifest = {"format": FORMAT, **described, "files": dict(sorted(files.items()))}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1, allow_nan=False)
    with disk_errors(f"writing {building}"):
        fault_point("ckpt.manifest.open")
        write_synced(building / MANIFEST, _manifest_chunks(text.encode() + b"\n"))
        fault_point("ckpt.manifest.close")
        sync_folder(building)
        replaced = None
        if folder.exists():  # damaged, or of a run that went back to an earlier step
            replaced = _trash(folder, attempt)
        fault_point("ckpt.rename.before")
        building.rename(folder)
        fault_point("ckpt.rename.after")
        sync_folder(folder.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return folder


def _manifest_chunks(content: bytes) -> Iterator[bytes]:
    yield content[: len(content) // 2]
    fault_point("ckpt.manifest.mid")
    yield content[len(content) // 2 :]


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file; what changes afterwards in `content` is not in it."""
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def prune_checkpoints(
    directory: Path,
    keep_top_k: int | None,
    metric_name: str | None,
    higher_is_better: bool,
    *,
    written: int,
) -> None:
    """Keeps the newest, the one just `written` and the `keep_top_k` best by `metric_name`.

    `metric_name=None` means that newer is better, `keep_top_k=None` keeps all. A checkpoint without
    the metric counts as the worst. Raises SaveError.
    """
    found = list_checkpoints(directory)
    if keep_top_k is None or not found:
        return

    def badness(step: int) -> tuple[float, int]:
        if metric_name is None:
            return 0.0, -step
        try:
            value = read_manifest(found[step])["metrics"].get(metric_name)
        except CheckpointError:
            value = None
        if value is None:
            return float("inf"), -step
        return (-value if higher_is_better else value), -step

    kept = {max(found), written, *sorted(found, key=badness)[:keep_top_k]}
    with disk_errors(f"deleting old checkpoints in {directory}"):
        for step in found.keys() - kept:
            fault_point("ckpt.prune.rename")
            doomed = _trash(found[step], os.urandom(8).hex())
            fault_point("ckpt.prune.delete")
            shutil.rmtree(doomed, ignore_errors=True)


def _trash(folder: Path, attempt: str) -> Path:
    """A half-deleted folder must not look like a checkpoint."""
    return folder.rename(folder.with_name(f"trash_{folder.name}.{attempt}"))


def set_aside(directory: Path, after: int) -> list[Path]:
    """Renames checkpoints past step `after`, which the run goes on from, to `aside_...`.

    Rank 0 only. Raises SaveError.
    """
    later = [path for step, path in list_checkpoints(directory).items() if step > after]
    with disk_errors(f"renaming later checkpoints in {directory}"):
        return [p.rename(p.with_name(f"aside_{p.name}.{os.urandom(4).hex()}")) for p in later]


def remove_left_overs(directory: Path) -> None:
    """What killed runs were building or deleting. Rank 0 only, while nothing is written."""
    if directory.is_dir():
        for path in directory.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """OSError -> SaveError, which says what was being done and what it needs."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"{doing} failed: {error.strerror or error}; the earlier checkpoints are untouched; "
            "free space or mend the permissions, or choose another checkpointing.checkpoint_dir"
        ) from error
