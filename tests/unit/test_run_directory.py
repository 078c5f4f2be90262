"""Who may write into a run directory."""

import pytest

from reinforcer_tp.config import ConfigError, load_config
from reinforcer_tp.run_directory import (
    check_run_directory,
    finished_steps,
    mark_finished,
    write_run_directory,
)
from reinforcer_tp.whole_files import building_name


def config_for(folder, *overrides):
    return load_config(None, ["policy.model_name=m", f"logger.log_dir={folder}", *overrides])


def write_run(folder, *overrides):
    write_run_directory(config_for(folder, *overrides), {"git": None}, {"train": {}})


def test_a_new_or_empty_folder_is_taken(tmp_path):
    assert check_run_directory(config_for(tmp_path)) is False
    assert check_run_directory(config_for(tmp_path / "missing")) is False


def test_what_a_run_leaves_that_is_killed_at_once_is_nothing(tmp_path):
    (tmp_path / "checkpoints" / "first").mkdir(parents=True)
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    (tmp_path / "heartbeat").touch()
    building_name(tmp_path).touch()
    building_name(tmp_path / "checkpoints").touch()
    assert check_run_directory(config_for(tmp_path)) is False
    (tmp_path / "checkpoints" / "first" / "manifest.json").touch()
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        check_run_directory(config_for(tmp_path))


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


def test_what_a_killed_start_leaves_is_no_run(tmp_path):
    (tmp_path / ".tmp-host-12-0123456789abcdef").write_text("half")
    (tmp_path / "attempts").mkdir()
    assert check_run_directory(config_for(tmp_path)) is False


def test_a_torn_end_is_an_error_that_names_the_file(tmp_path):
    write_run(tmp_path)
    for text in ('{"steps": 1', '{"steps": "9"}', "[]"):
        (tmp_path / "finished.json").write_text(text)
        with pytest.raises(ValueError, match=r"finished\.json"):
            finished_steps(config_for(tmp_path))


def test_changes_that_are_allowed_by_name(tmp_path):
    write_run(tmp_path)
    changes = ["dpo.seed=7", "policy.train_global_batch_size=4"]
    with pytest.raises(ConfigError, match=r"allow_changed=\[.*dpo\.seed"):
        check_run_directory(config_for(tmp_path, *changes))
    with pytest.raises(ConfigError, match="train_global_batch_size") as refusal:
        check_run_directory(
            config_for(tmp_path, *changes, "checkpointing.allow_changed=[dpo.seed]")
        )
    assert "seed" not in str(refusal.value)
    allowed = "checkpointing.allow_changed=[dpo.seed,policy.train_global_batch_size]"
    assert check_run_directory(config_for(tmp_path, *changes, allowed))
