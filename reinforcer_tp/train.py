"""DPO training from the command line.

    torchrun --nproc-per-node N reinforcer_tp/train.py --config configs/dpo.yaml key=value ...
    python reinforcer_tp/train.py --config configs/dpo.yaml --check

Exit status: see exits.MEANING; torchrun hides it, <log_dir>/attempts/NNNN/exit.json has it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# As a script this file's folder is first on sys.path, where `data` would shadow others.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# Only what is light: signals must be heard, and an error in the configuration must not wait for
# torch. The rest is imported where it is used.
from reinforcer_tp.lifecycle.ending import leave
from reinforcer_tp.lifecycle.stops import Stopped, Stops
from reinforcer_tp.secrecy import make_files_private

if TYPE_CHECKING:
    from reinforcer_tp.config import Config

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(argv: list[str]) -> int:
    with Stops() as stops:
        return exit_code(argv, stops)


def exit_code(argv: list[str], stops: Stops) -> int:
    try:
        return configure_and_train(argv, stops)
    except Stopped as stopped:
        if stopped.saved is not None:
            stops.position.saved_step = stopped.step
        return stops.ending.stopped(str(stopped))
    except Exception as error:
        return stops.ending.failed(error)


def draw_report(stops: Stops) -> None:
    """<log_dir>/report.html, once it is written how the run ended. Rank 0 only; never fails."""
    attempt = stops.ending.attempt
    if stops.ending.rank != 0 or attempt is None or stops.position.start_step is None:
        return  # no step was tried, so an earlier page is as good
    from reinforcer_tp.lifecycle.exits import describe

    try:
        from reinforcer_tp.report.page import write_report

        print(f"report:         {write_report([attempt.log_dir])}", flush=True)
    except Exception as error:
        with contextlib.suppress(OSError):
            print(f"warning: no report.html was drawn: {describe(error)}", flush=True)


def configure_and_train(argv: list[str], stops: Stops) -> int:
    from reinforcer_tp.config import load_config
    from reinforcer_tp.resume import check_allowed_names

    make_files_private()
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_allowed_names(config)
    if arguments.check:
        return check(config)
    config.validate(_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return prepare_and_train(config, stops)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from reinforcer_tp.config import ConfigError

        raise ConfigError(f"{message}; see {self.prog} --help")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="reinforcer_tp/train.py", description="DPO training")
    parser.add_argument("--config", default=str(_CONFIGS / "dpo.yaml"), help="YAML file")
    parser.add_argument(
        "--check", action="store_true", help="validate, print the resolved config, do not train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. dpo.seed=1")
    return parser.parse_intermixed_args(argv)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_speaker() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check(config: Config) -> int:
    """`--check`: everything that can be known without a GPU, weights or data."""
    from reinforcer_tp.config import find_model_shape, to_yaml, validate_model

    world_size = _world_size() if "WORLD_SIZE" in os.environ else config.planned_world_size
    config.validate(world_size)
    name = config.policy.model_name
    if name == "embedded":
        from reinforcer_tp.embedded import ensure_embedded

        name = ensure_embedded().model
    shape, source = find_model_shape(name, _CONFIGS / "models")
    validate_model(config, shape)
    megatron = config.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    print(to_yaml(config), end="")
    print(f"# model shape from {source}")
    vpp = f" vpp={megatron.virtual_stages}" if megatron.virtual_stages > 1 else ""
    print(f"# {world_size} processes: tp={tp} pp={pp}{vpp} dp={world_size // (tp * pp)}")
    print("# configuration is valid; nothing was trained")
    return 0


def prepare_and_train(config: Config, stops: Stops) -> int:
    """First what needs no process group, so that bad files end every rank alike; then the run."""
    from reinforcer_tp.config_check import duration_s
    from reinforcer_tp.lifecycle.run_lock import hold_run
    from reinforcer_tp.run_directory import check_run_directory

    holds_run = check_run_directory(config)
    limit_s = duration_s(config.checkpointing.checkpoint_must_save_by)
    if stops.ending.rank == 0:
        hold_run(Path(config.logger.log_dir))
    stops.open_run(Path(config.logger.log_dir), limit_s)
    quiet_libraries()
    with no_garbage():
        from reinforcer_tp.inputs import open_inputs
        from reinforcer_tp.run import how_to_go_on, run

    stops.phase("data")
    inputs = open_inputs(config, holds_run=holds_run)
    if inputs.finished_step == inputs.total_steps:
        if _is_speaker():
            print(f"{config.logger.log_dir} holds this run, finished: {inputs.total_steps} steps.")
            print(how_to_go_on(config, inputs))
    else:
        run(config, inputs, stops)
    return stops.ending.done()


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Within it nothing is collected, and what it leaves behind never will be.

    Imports make a million objects that stay; to go through them again and again is a sixth of the
    time that the imports take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Silences progress bars and advice of the libraries; ours say what matters."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told of in one line


if __name__ == "__main__":
    stops = Stops()
    code = exit_code(sys.argv[1:], stops)
    stops.ignore()
    draw_report(stops)
    if code == 0:
        sys.exit(0)
    leave(code)
