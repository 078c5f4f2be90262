"""Where a run goes on from, and whether it is still the same run. Imports no torch."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcer_tp.checkpoint_folder import (
    CheckpointError,
    check_file,
    is_checkpoint_name,
    list_checkpoints,
    read_json,
    read_manifest,
)
from reinforcer_tp.config import Config, ConfigError, decisive
from reinforcer_tp.config_check import shown


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """A checkpoint with a valid manifest; its large files are not read yet."""

    folder: Path
    manifest: dict[str, Any]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]


def identity(
    config: Config, report: Mapping[str, Any], tokenizer_digests: Mapping[str, str]
) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint: name -> value."""
    rows = {
        f"data.{name}": report[name]["rows_digest"]
        for name in ("train", "validation")
        if report[name] is not None
    }
    return decisive(config) | rows | dict(tokenizer_digests)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]
) -> list[str]:
    """`key: value there, value here` of each difference whose key, or a part of it, is not allowed.

    An allowed `data` covers `data.train`; a key that only one of both has is null in the other.
    """
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    covered = tuple(f"{name}." for name in allowed)
    return [
        f"{key}: {shown(before.get(key))} there, {shown(now.get(key))} here"
        for key in keys
        if not f"{key}.".startswith(covered)
    ]


def check_same_run(
    where: str, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str]
) -> None:
    """Raises ConfigError with every difference that is not allowed."""
    found = differences(before, now, allowed)
    if not found:
        return
    names = ",".join(text.split(":")[0] for text in found)
    raise ConfigError(
        f"{where} is of another run ({'; '.join(found)}); set it back, choose another "
        f"logger.log_dir, or go on all the same with checkpointing.allow_changed=[{names}]"
    )


def find_resume_points(config: Config, now: Mapping[str, Any]) -> tuple[list[ResumePoint], list]:
    """(checkpoints to go on from, the best first; what was wrong with those passed over).

    Every rank finds the same. Raises ConfigError (another run, or resume=never) and
    CheckpointError (damaged, unless checkpointing.on_damaged=previous finds another one).
    """
    section = config.checkpointing
    folders = _folders(config)
    if not section.enabled or not folders:
        return [], []
    if section.resume == "never":
        raise ConfigError(
            f"{folders[0]} exists and checkpointing.resume=never; "
            "choose another checkpointing.checkpoint_dir, or use checkpointing.resume=auto"
        )
    points: list[ResumePoint] = []
    errors: list[CheckpointError] = []
    for folder in folders:
        try:
            points.append(open_point(folder))
        except CheckpointError as error:
            if section.on_damaged == "stop":
                raise
            errors.append(error)
        if section.on_damaged == "stop":
            break  # nobody needs an older one
    if not points:
        raise errors[0]
    first = points[0]
    saved = first.state.get("identity")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{first.folder / 'state.json'} does not say of which run it is")
    check_same_run(str(first.folder), saved, now, section.allow_changed)
    others = [
        point
        for point in points[1:]
        if not differences(point.state.get("identity", {}), now, section.allow_changed)
    ]
    return [first, *others], errors


def open_point(folder: Path) -> ResumePoint:
    """Raises CheckpointError."""
    manifest = read_manifest(folder)
    check_file(folder, "state.json", manifest)
    return ResumePoint(folder=folder, manifest=manifest, state=read_json(folder / "state.json"))


def _folders(config: Config) -> list[Path]:
    """Folders to look at, the best first."""
    own = list(list_checkpoints(Path(config.checkpoint_dir)).values())[::-1]
    wanted = config.checkpointing.resume
    if wanted in ("auto", "never"):
        return own
    named = Path(wanted).expanduser()
    # Started again, the same command goes on from what it has saved since; the named one may be
    # gone by then.
    branch = [folder for folder in own if branch_of(folder) == branch_name(config)]
    if not branch and not (named.is_dir() and is_checkpoint_name(named.resolve().name)):
        raise ConfigError(
            f"checkpointing.resume={wanted} is no checkpoint; expected auto, never or a "
            "step_N folder"
        )
    return [*branch, named] if named.is_dir() else branch


def branch_name(config: Config) -> str | None:
    """The checkpoint that checkpointing.resume names, as manifests do."""
    wanted = config.checkpointing.resume
    return None if wanted in ("auto", "never") else str(Path(wanted).expanduser().resolve())


def branch_of(folder: Path) -> str | None:
    """The checkpoint by whose path (checkpointing.resume) the run was started that wrote this."""
    try:
        return read_manifest(folder).get("branch")
    except CheckpointError:
        return None


def check_allowed_names(config: Config) -> None:
    """Raises ConfigError for a name in checkpointing.allow_changed that allows nothing."""
    names = [*decisive(config), "data.train", "data.validation", *("tokenizer", "chat_template")]
    for wanted in config.checkpointing.allow_changed:
        if wanted != "reference" and not any(f"{n}.".startswith(f"{wanted}.") for n in names):
            near = difflib.get_close_matches(wanted, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"checkpointing.allow_changed has {shown(wanted)}, which is not compared; expected "
                f"keys that decide the run's numbers, data, tokenizer, chat_template or reference"
                f"{hint}"
            )
