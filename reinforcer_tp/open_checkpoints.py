"""The checkpoints of a run: which one it goes on from, and what writes the next ones."""

import dataclasses
import os
import time
from pathlib import Path

from reinforcer_tp.checkpoint_folder import (
    CheckpointError,
    SaveError,
    check_writable,
    prune_checkpoints,
    remove_left_overs,
    set_aside,
)
from reinforcer_tp.config import Config, fingerprint
from reinforcer_tp.inputs import Inputs
from reinforcer_tp.mcore.checkpoint import CheckpointWriter, together
from reinforcer_tp.mcore.restore import first_undamaged
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.resume import ResumePoint, branch_name, open_point

_APPEARS_S = 60.0  # in which a network file system shows what another node has written


def settle_resume(config: Config, inputs: Inputs, topology: Topology) -> Inputs:
    """`inputs` with the one checkpoint to go on from, every byte of it verified. Collective.

    Raises CheckpointError on every rank.
    """
    section, directory = config.checkpointing, Path(config.checkpoint_dir)
    passed_over = list(inputs.passed_over)
    # A network file system may show a rank an old list of folders: rank 0's counts.
    folders = together(lambda: [p.folder for p in inputs.resume_points], CheckpointError)[0]
    points = together(lambda: tuple(map(_open_when_there, folders)), CheckpointError)[topology.rank]
    if points:
        index, errors = first_undamaged(
            [point.folder for point in points],
            topology,
            may_fall_back=section.on_damaged == "previous",
        )
        passed_over += errors
        points = points[index : index + 1]
    notes = [f"passed over a damaged checkpoint: {text.split('; ')[0]}" for text in passed_over]
    start_step = points[0].step if points else 0

    def clean_up() -> None:
        if topology.is_rank_zero and section.enabled:
            check_writable(directory)
            remove_left_overs(directory)
            if passed_over or branch_name(config) is not None:
                aside = set_aside(directory, start_step)
                notes.extend(f"renamed a checkpoint past step {start_step}: {p}" for p in aside)

    together(clean_up, SaveError)
    return dataclasses.replace(inputs, resume_points=points, passed_over=tuple(notes))


def _open_when_there(folder: Path) -> ResumePoint:
    deadline = time.monotonic() + _APPEARS_S
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.5)
    return open_point(folder)


def open_writer(
    config: Config, inputs: Inputs, topology: Topology, reference: str | None
) -> CheckpointWriter | None:
    """What writes the run's checkpoints, None where it writes none. Collective.

    `reference` is the digest of the reference's weights.
    """
    section, directory = config.checkpointing, Path(config.checkpoint_dir)
    if not section.enabled:
        return None
    run = inputs.resumed.manifest["run"] if inputs.resumed else os.urandom(8).hex()

    def prune(step: int) -> None:
        prune_checkpoints(
            directory,
            section.keep_top_k,
            section.metric_key,
            section.higher_is_better,
            written=step,
        )

    return CheckpointWriter(
        directory,
        topology,
        described={
            "run": together(lambda: run, RuntimeError)[0],
            "branch": branch_name(config),
            "layout": topology.layout(),
            "fingerprint": fingerprint(config),
            "data_fingerprint": inputs.data.fingerprint,
            "reference": reference,
        },
        is_async=section.async_save,
        after=prune,
    )
