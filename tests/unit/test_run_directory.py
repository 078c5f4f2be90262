"""Who may write into a run directory, and which checkpoints stay."""

import json

import pytest

from reinforcer_tp.config import ConfigError, load_config
from reinforcer_tp.mcore.checkpoint import (
    check_resumable,
    list_checkpoints,
    prune_checkpoints,
    read_state,
)
from reinforcer_tp.run_directory import (
    check_run_directory,
    finished_steps,
    mark_finished,
    write_run_directory,
)


def config_for(folder, *overrides):
    return load_config(None, ["policy.model_name=m", f"logger.log_dir={folder}", *overrides])


def write_run(folder, *overrides):
    write_run_directory(config_for(folder, *overrides), {"git": None}, {"train": {}})


def test_a_new_or_empty_folder_is_taken(tmp_path):
    assert check_run_directory(config_for(tmp_path)) is False
    assert check_run_directory(config_for(tmp_path / "missing")) is False


def test_the_same_run_is_recognised_and_may_be_extended_or_moved(tmp_path):
    write_run(tmp_path)
    assert check_run_directory(config_for(tmp_path)) is True
    assert check_run_directory(
        config_for(
            tmp_path,
            "dpo.max_num_steps=900",
            "policy.megatron_cfg.tensor_model_parallel_size=2",
            "logger.wandb_enabled=true",
        )
    )


def test_another_configuration_is_refused_naming_the_keys(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ConfigError, match=r"dpo\.seed: 42 there, 7 here"):
        check_run_directory(config_for(tmp_path, "dpo.seed=7"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        check_run_directory(config_for(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        check_run_directory(config_for(tmp_path / "thesis.tex"))
    with pytest.raises(ConfigError, match="cannot be made"):
        check_run_directory(config_for(tmp_path / "thesis.tex" / "runs" / "first"))


def test_resume_never_refuses_an_existing_run(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ConfigError, match="resume=never"):
        check_run_directory(config_for(tmp_path, "checkpointing.resume=never"))


def test_finished_is_remembered(tmp_path):
    config = config_for(tmp_path)
    write_run(tmp_path)
    assert finished_steps(config) is None
    mark_finished(config, 12)
    assert finished_steps(config) == 12


def make_checkpoint(directory, step, metrics):
    folder = directory / f"step_{step}"
    folder.mkdir(parents=True)
    layout = {
        "world_size": 2,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
    }
    state = {"format": 1, "step": step, "metrics": metrics, "layout": layout}
    state |= {"fingerprint": "f", "data_fingerprint": "d"}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("keep", "higher_is_better", "kept"),
    [(2, False, {20, 30, 50}), (2, True, {10, 40, 50}), (1, False, {30, 50}), (None, False, None)],
)
def test_the_best_and_the_newest_checkpoint_stay(tmp_path, keep, higher_is_better, kept):
    values = {10: 0.9, 20: 0.3, 30: 0.1, 40: 0.5}
    for step, value in values.items():
        make_checkpoint(tmp_path, step, {"validation/loss": value})
    make_checkpoint(tmp_path, 50, {})  # the metric is missing: worst, but newest
    (tmp_path / "step_60.partial").mkdir()
    prune_checkpoints(tmp_path, keep, "validation/loss", higher_is_better)
    assert set(list_checkpoints(tmp_path)) == (kept or {10, 20, 30, 40, 50})


def test_without_a_metric_the_newest_stay(tmp_path):
    for step in (5, 10, 15, 100):
        make_checkpoint(tmp_path, step, {})
    prune_checkpoints(tmp_path, 2, None, False)
    assert list(list_checkpoints(tmp_path)) == [15, 100]


def test_a_torn_or_foreign_state_is_refused(tmp_path):
    make_checkpoint(tmp_path, 1, {})
    (tmp_path / "step_1" / "state.json").write_text('{"format": 1, "st')
    with pytest.raises(ValueError, match="is not JSON"):
        read_state(tmp_path / "step_1")
    (tmp_path / "step_1" / "state.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        read_state(tmp_path / "step_1")


def test_what_cannot_be_resumed_is_refused_by_name(tmp_path):
    make_checkpoint(tmp_path, 1, {})
    state = read_state(tmp_path / "step_1")
    here = {"fingerprint": "f", "data_fingerprint": "d", "layout": state["layout"]}
    check_resumable(tmp_path, state, **here)
    for change, says in (
        ({"fingerprint": "g"}, "another configuration"),
        ({"data_fingerprint": "e"}, "data has changed"),
        (
            {"layout": state["layout"] | {"tensor_model_parallel_size": 1}},
            "tensor_model_parallel_size=2 there, 1 here",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            check_resumable(tmp_path, state, **(here | change))
