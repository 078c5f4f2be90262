"""The folder of a checkpoint: what is accepted, what is refused by name, and what is kept."""

import errno
import hashlib
import json
import os
import shutil
import time
from unittest import mock

import pytest

from reinforcer_tp import checkpoint_folder
from reinforcer_tp.checkpoint_folder import (
    CheckpointError,
    SaveError,
    check_file,
    json_bytes,
    list_checkpoints,
    prune_checkpoints,
    read_manifest,
    remove_left_overs,
    set_aside,
    write_synced,
)
from reinforcer_tp.config import ConfigError, load_config
from reinforcer_tp.resume import check_allowed_names, differences, find_resume_points

IDENTITY = {"dpo.seed": 42, "data.train": "abc", "chat_template": "t", "policy.model_name": "m"}
HERE = {"run": "r", "branch": None, "layout": {"world_size": 1}}


def write(directory, step, metrics=None, identity=IDENTITY, **described):
    """A checkpoint with one large file of arbitrary bytes."""
    attempt = os.urandom(8).hex()
    building = checkpoint_folder.begin_checkpoint(directory, step, attempt, 100)
    chunks = {
        "rank_00000.safetensors": [b"some", f"bytes of {step}".encode()],
        "state.json": [json_bytes({"identity": identity})],
        "tensors.json": [json_bytes({})],
    }
    files = {name: write_synced(building / name, parts) for name, parts in chunks.items()}
    described = HERE | described | {"step": step, "attempt": attempt, "metrics": metrics or {}}
    return checkpoint_folder.publish_checkpoint(building, files, described)


def config_for(directory, *overrides):
    keys = ["policy.model_name=m", f"checkpointing.checkpoint_dir={directory}", *overrides]
    return load_config(None, keys)


def test_the_digest_is_of_the_bytes_in_memory(tmp_path):
    content = os.urandom(100_000)
    parts = [content[i : i + 777] for i in range(0, len(content), 777)]
    record = write_synced(tmp_path / "file", iter(parts))
    assert (tmp_path / "file").read_bytes() == content
    assert record == {"bytes": 100_000, "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(FileExistsError):
        write_synced(tmp_path / "file", [b""])


def test_a_disk_error_that_is_told_once_early_on_is_not_lost(tmp_path, monkeypatch):
    """Linux reports a failed write to the first sync only: the last one says that all is well."""
    calls = []

    def fails_first(file):
        calls.append(file)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails_first)
    monkeypatch.setattr(checkpoint_folder, "_FLUSH_BYTES", 10)
    chunks = (time.sleep(0.02) or bytes(20) for _ in range(10))
    with pytest.raises(OSError, match="Input/output error"):
        write_synced(tmp_path / "file", chunks)


def test_a_written_checkpoint_is_accepted(tmp_path):
    folder = write(tmp_path, 7, {"validation/loss": 0.5})
    manifest = read_manifest(folder)
    assert folder.name == "step_7" and manifest["step"] == 7 and manifest["run"] == "r"
    for name in manifest["files"]:
        check_file(folder, name, manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing.*format"),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json cannot be read as JSON"),
        (lambda f: (f / "manifest.json").write_text("[" * 200_000), r"manifest\.json cannot be"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json holds no JSON object"),
        (lambda f: edit(f, step=8), r"manifest\.json is not as it was written"),
        (lambda f: edit(f, sign=True, step=8), r"manifest\.json is of step 8.*step_7"),
        (lambda f: edit(f, sign=True, format=3), r"format 3, this version reads 2"),
        (lambda f: edit(f, sign=True, files={"../x": {}}), "lists no files"),
        (lambda f: add_file(f, "../x"), r"names '\.\./x', which is no file of ours"),
        (lambda f: add_file(f, "gone.bin"), r"gone\.bin is missing"),
        (lambda f: (f / "state.json").unlink(), r"state\.json is missing"),
        (lambda f: (f / "state.json").write_text("{}"), r"state\.json has 2 bytes; expected"),
        (lambda f: (f / "notes.txt").touch(), r"notes\.txt is no file of this checkpoint"),
        (lambda f: f.rename(f.with_name("step_8")), r"of step 7, its folder is .*step_8"),
    ],
)
def test_what_is_damaged_is_refused_by_name(tmp_path, damage, says):
    folder = write(tmp_path, 7)
    damage(folder)
    [folder] = list_checkpoints(tmp_path).values()
    with pytest.raises(CheckpointError, match=says):
        read_manifest(folder)


def edit(folder, sign=False, **changes):
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    if sign:
        del manifest["sha256"]
        manifest["sha256"] = checkpoint_folder._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def add_file(folder, name):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder, sign=True, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})


def test_a_file_behind_a_link_is_refused(tmp_path):
    folder = write(tmp_path, 7)
    (folder / "state.json").rename(tmp_path / "elsewhere")
    (folder / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        read_manifest(folder)


def test_changed_bytes_are_found(tmp_path):
    folder = write(tmp_path, 7)
    manifest = read_manifest(folder)
    (folder / "rank_00000.safetensors").write_bytes(b"somebytes Of 7")
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is not as it was written"):
        check_file(folder, "rank_00000.safetensors", read_manifest(folder))
    assert read_manifest(folder) == manifest


def test_a_checkpoint_written_again_replaces_the_other(tmp_path):
    first = read_manifest(write(tmp_path, 7))
    second = read_manifest(write(tmp_path, 7))
    assert first["attempt"] != second["attempt"]
    assert read_manifest(tmp_path / "step_7") == second
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"]


def test_there_must_be_room(tmp_path):
    with (
        mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=2**30)),
        pytest.raises(SaveError, match=r"needs 972\.8 MiB and a tenth more.* 1,024\.0 MiB free"),
    ):
        checkpoint_folder.begin_checkpoint(tmp_path, 3, "0" * 16, int(0.95 * 2**30))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_says_what_was_being_done(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"making the folder.*file.* untouched"):
        checkpoint_folder.begin_checkpoint(tmp_path / "file" / "checkpoints", 3, "0" * 16, 1)


@pytest.mark.parametrize(
    ("keep", "higher_is_better", "kept"),
    [(2, False, {20, 30, 50}), (2, True, {10, 40, 50}), (1, False, {30, 50}), (None, False, None)],
)
def test_the_best_and_the_newest_checkpoint_stay(tmp_path, keep, higher_is_better, kept):
    for step, value in {10: 0.9, 20: 0.3, 30: 0.1, 40: 0.5}.items():
        write(tmp_path, step, {"validation/loss": value})
    write(tmp_path, 50)  # the metric is missing: worst, but newest
    (tmp_path / "step_60.0123456789abcdef.partial").mkdir()
    prune_checkpoints(tmp_path, keep, "validation/loss", higher_is_better, written=50)
    assert set(list_checkpoints(tmp_path)) == (kept or {10, 20, 30, 40, 50})


def test_without_a_metric_the_newest_stay(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, 2, None, False, written=100)
    assert list(list_checkpoints(tmp_path)) == [15, 100]


def test_the_one_just_written_stays_though_it_is_neither_newest_nor_best(tmp_path):
    for step, value in {10: 0.1, 20: 0.9, 30: 0.2}.items():
        write(tmp_path, step, {"validation/loss": value})
    prune_checkpoints(tmp_path, 1, "validation/loss", False, written=20)
    assert list(list_checkpoints(tmp_path)) == [10, 20, 30]


def test_left_overs_go_and_nothing_else(tmp_path):
    left = ["step_3.0123456789abcdef.partial", "trash_step_3.0123456789abcdef"]
    others = ["step_3.partial", "trash_notes", "mine", "aside_step_9.01234567"]
    for name in [*left, *others]:
        (tmp_path / name).mkdir()
    write(tmp_path, 4)
    remove_left_overs(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_4", *others}
    remove_left_overs(tmp_path / "missing")


def test_later_checkpoints_are_set_aside_not_lost(tmp_path):
    for step in (4, 8, 12):
        write(tmp_path, step)
    aside = set_aside(tmp_path, after=4)
    assert list(list_checkpoints(tmp_path)) == [4]
    assert sorted(path.name.split(".")[0] for path in aside) == ["aside_step_12", "aside_step_8"]
    assert all((path / "manifest.json").is_file() for path in aside)


def test_the_newest_checkpoint_is_taken(tmp_path):
    assert find_resume_points(config_for(tmp_path / "missing"), IDENTITY) == ([], [])
    for step in (4, 12, 8):
        write(tmp_path, step)
    points, errors = find_resume_points(config_for(tmp_path), IDENTITY)
    assert [point.step for point in points] == [12] and not errors
    with pytest.raises(ConfigError, match=r"step_12 exists and checkpointing\.resume=never"):
        find_resume_points(config_for(tmp_path, "checkpointing.resume=never"), IDENTITY)
    assert find_resume_points(config_for(tmp_path, "checkpointing.enabled=false"), {}) == ([], [])


def test_a_damaged_newest_one_stops_or_is_passed_over(tmp_path):
    for step in (4, 8):
        write(tmp_path, step)
    (tmp_path / "step_8" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_8/state\.json is missing"):
        find_resume_points(config_for(tmp_path), IDENTITY)
    previous = config_for(tmp_path, "checkpointing.on_damaged=previous")
    points, errors = find_resume_points(previous, IDENTITY)
    assert [point.step for point in points] == [4]
    assert "step_8/state.json is missing" in str(errors[0])
    (tmp_path / "step_4" / "tensors.json").unlink()
    with pytest.raises(CheckpointError, match="step_8"):  # never silently from the start
        find_resume_points(previous, IDENTITY)


def test_a_named_checkpoint_and_what_was_saved_since(tmp_path):
    for step in (4, 8):
        write(tmp_path, step)
    named = config_for(tmp_path, f"checkpointing.resume={tmp_path}/step_4")
    points, _ = find_resume_points(named, IDENTITY)
    assert [point.step for point in points] == [4]
    set_aside(tmp_path, after=4)
    write(tmp_path, 6, branch=str((tmp_path / "step_4").resolve()))
    points, _ = find_resume_points(named, IDENTITY)  # the same command again
    assert [point.step for point in points] == [6]
    shutil.rmtree(tmp_path / "step_4")  # retention may delete what the run began from
    points, _ = find_resume_points(named, IDENTITY)
    assert [point.step for point in points] == [6]
    for wrong in (tmp_path / "step_5", "newest"):
        with pytest.raises(ConfigError, match="expected auto, never or a step_N folder"):
            find_resume_points(config_for(tmp_path, f"checkpointing.resume={wrong}"), IDENTITY)


def test_another_run_is_refused_field_by_field(tmp_path):
    write(tmp_path, 4)
    now = IDENTITY | {"dpo.seed": 43, "data.train": "xyz", "new": 1}
    with pytest.raises(ConfigError) as refusal:
        find_resume_points(config_for(tmp_path), now)
    for part in ("dpo.seed: 42 there, 43 here", "data.train: abc there, xyz here", "new: null"):
        assert part in str(refusal.value)
    assert "chat_template" not in str(refusal.value)
    allowed = "checkpointing.allow_changed=[dpo.seed,data,new]"
    points, _ = find_resume_points(config_for(tmp_path, allowed), now)
    assert points[0].step == 4
    with pytest.raises(ConfigError, match=r"dpo\.seed"):  # a part of a name is no name
        find_resume_points(
            config_for(tmp_path, "checkpointing.allow_changed=[dpo.s,data,new]"), now
        )


def test_a_state_without_identity_is_no_checkpoint_of_a_run(tmp_path):
    write(tmp_path, 4, identity=None)
    with pytest.raises(CheckpointError, match=r"state\.json does not say of which run"):
        find_resume_points(config_for(tmp_path), IDENTITY)


def test_an_older_checkpoint_of_another_run_is_no_way_back(tmp_path):
    """A run that changed its seed, by name, does not fall back to before the change."""
    write(tmp_path, 4, identity=IDENTITY | {"dpo.seed": 1})
    write(tmp_path, 8)
    points, _ = find_resume_points(
        config_for(tmp_path, "checkpointing.on_damaged=previous"), IDENTITY
    )
    assert [point.step for point in points] == [8]


def test_names_that_allow_nothing_are_refused(tmp_path):
    for name in ("dpo.sed", "dpo.s", "logger.log_dir", "checkpointing"):
        config = config_for(tmp_path, f"checkpointing.allow_changed=[{name}]")
        with pytest.raises(ConfigError, match=f"allow_changed has {name}, which is not compared"):
            check_allowed_names(config)
    names = "dpo.seed,dpo,data,data.train,tokenizer,chat_template,reference,policy.megatron_cfg"
    check_allowed_names(config_for(tmp_path, f"checkpointing.allow_changed=[{names}]"))


def test_a_named_checkpoint_needs_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match=r"resume=.* needs checkpointing\.enabled=true"):
        config_for(tmp_path, "checkpointing.enabled=false", f"checkpointing.resume={tmp_path}")


def test_differences_of_missing_keys():
    assert differences({"a": 1}, {"a": 1}, []) == []
    assert differences({"a": 1}, {}, []) == ["a: 1 there, null here"]
    assert differences({"a.b": 1}, {"a.b": 2}, ["a"]) == []
