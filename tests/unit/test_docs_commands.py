"""Every command of the README and the docs is tried, or stands in one table with the reason.

In this process, without training: configurations are checked as `--check` does, and arguments of
`python -m` are parsed by the command's own parser.
"""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

from reinforcer_tp import model_shape, train
from reinforcer_tp.config import load_config
from tests.unit.docs_pages import PAGES, ROOT, all_commands, name_of, page, rows, section

NOT_RUN = {
    row[0].strip("`"): row[1]
    for row in rows(section("docs/README.md", "Commands that no test runs"))
}


def check_make(words: list[str]) -> None:
    result = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_training(words: list[str]) -> None:
    """`--check`, with as many processes as torchrun would start, without asking the hub."""
    script = words.index("reinforcer_tp/train.py")
    with pytest.MonkeyPatch.context() as patch:
        if "--nproc-per-node" in words[:script]:
            patch.setenv("WORLD_SIZE", words[words.index("--nproc-per-node") + 1])
        check_configuration(words[script + 1 :], patch)


def check_configuration(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.chdir(ROOT)
    patch.setattr(model_shape, "_ask_hub", lambda *_: (None, "the hub was not asked"))
    # a model that is here in place of one of the hub's, of `make model`, or of the reader's
    arguments = [a for a in arguments if not a.startswith("policy.model_name=")]
    if "configs/dpo_smollm2.yaml" in arguments:
        arguments.append("policy.model_name=embedded")
    parsed = train.parse_arguments(arguments)
    assert train.check(load_config(parsed.config, parsed.overrides)) == 0


def check_slurm(words: list[str]) -> None:
    [script] = [word for word in words if word.endswith(".sh")]
    assert (ROOT / script).is_file()
    with pytest.MonkeyPatch.context() as patch:
        name = script.removeprefix("slurm/").removesuffix(".sh")
        given = words[words.index(script) + 1 :]
        check_configuration(["--config", f"configs/{name}.yaml", *given], patch)


class Parsed(BaseException):
    """The arguments were taken; nothing more is run."""


def check_module(words: list[str]) -> None:
    """`python -m NAME ...`: its own parser takes the arguments."""
    name, arguments = words[2], words[3:]
    if importlib.util.find_spec(name).submodule_search_locations:
        name += ".__main__"
    main = importlib.import_module(name).main
    umask = os.umask(0)
    os.umask(umask)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, then_stop(method))
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            main(arguments) if inspect.signature(main).parameters else main()
        except SystemExit as ended:
            pytest.fail(f"the parser of {name} does not take {shlex.join(arguments)} ({ended})")
        finally:
            os.umask(umask)
        pytest.fail(f"{name} parses no arguments")


def then_stop(method: str) -> Callable:
    original = getattr(argparse.ArgumentParser, method)

    def parse(*args, **kwargs):
        original(*args, **kwargs)
        raise Parsed

    return parse


def check_extra(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.search(r"\[([\w,]+)\]$", words[-1])[1].split(","):
        assert extra in project["optional-dependencies"]


RUNNERS: list[tuple[str, Callable[[list[str]], None]]] = [
    (r"make [\w-]+", check_make),
    (r"(\.venv/bin/)?(python|torchrun) (.* )?reinforcer_tp/train\.py( |$)", check_training),
    (r"(DPO_\w+=\S+ )*(sbatch|bash) (--\S+ )*slurm/\w+\.sh( |$)", check_slurm),
    (r"(\.venv/bin/)?python -m [\w.]+( |$)", check_module),
    (r"pip install (-e )?'(reinforcer-tp|\.)\[", check_extra),
]


def runner_of(command: str) -> Callable[[list[str]], None] | None:
    return next((run for pattern, run in RUNNERS if re.match(pattern, command)), None)


TRIED = sorted({c for _, c in all_commands() if c not in NOT_RUN and runner_of(c)})


@pytest.mark.parametrize("command", TRIED, ids=range(len(TRIED)))
def test_a_command_of_the_docs_works(command):
    runner_of(command)(shlex.split(command))


def test_no_command_is_left_out():
    lost = [f"{name}: {c}" for name, c in all_commands() if not runner_of(c) and c not in NOT_RUN]
    assert not lost, "neither tried nor in the table of docs/README.md"


def test_the_table_of_what_is_not_run_holds_what_there_is():
    known = {command for _, command in all_commands()}
    assert set(NOT_RUN) <= known, "stale entries in the table of docs/README.md"
    assert all(len(reason) > 10 for reason in NOT_RUN.values())


@pytest.mark.parametrize(
    "command",
    [
        "python reinforcer_tp/train.py dpo.betta=1",
        "torchrun --nproc-per-node 3 reinforcer_tp/train.py "
        "policy.megatron_cfg.tensor_model_parallel_size=2",
        "sbatch slurm/dpo_llama8b.sh logger.logdir=x",
        "python -m reinforcer_tp.plan --gpuss 8",
        "make no-such-target",
        "pip install 'reinforcer-tp[nothing]'",
    ],
)
def test_a_wrong_command_would_be_found(command):
    with pytest.raises((Exception, pytest.fail.Exception)):
        runner_of(command)(shlex.split(command))


def test_every_module_that_is_named_exists():
    for path in PAGES:
        for name in set(re.findall(r"python -m ([\w.]+\w)", page(name_of(path)))):
            assert importlib.util.find_spec(name), f"{name_of(path)} names {name}"
