"""The self-test: it passes as a user runs it, and fails when a layout is wrong, slow or dead."""

import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reinforcer_tp.config import ConfigError
from reinforcer_tp.selftest import __main__ as command
from reinforcer_tp.selftest.__main__ import report, run_cases
from reinforcer_tp.selftest.batch import Case, fit, own_making
from reinforcer_tp.selftest.compare import Measured, compare
from reinforcer_tp.selftest.layouts import choose, layouts
from reinforcer_tp.selftest.processes import RankError, Ranks, Task
from tests.integration.harness import REPOSITORY, marked_processes, run_environment

WRONG = "tests.integration.wrong_layouts"
ROW = re.compile(r"^ +(\w+) +(agrees|baseline|DEVIATES|FAILED) +(\d+) *(.*)$", re.MULTILINE)


def run_selftest(
    *arguments: str, timeout_s: float = 240, **env: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "reinforcer_tp.selftest", *arguments],
        cwd=REPOSITORY,
        env=run_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_layouts_agree_as_a_user_runs_it():
    wanted = "share_response,tp2_sp_share,pp2_vpp2_share,dp2_empty,tied_dp2_pp2"
    done = run_selftest("--layouts", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        name: (verdict, int(count), rest) for name, verdict, count, rest in ROW.findall(done.stdout)
    }
    processes = {name: count for name, (verdict, count, _) in rows.items() if verdict == "agrees"}
    expected = (1, 2, 2, 2, 4)
    assert processes == dict(zip(wanted.split(","), expected, strict=True))
    assert "1 empty" in rows["dp2_empty"][2]
    for name, (verdict, _, rest) in rows.items():
        _, _, baseline = rows["tied_baseline" if name.startswith("tied") else "baseline"]
        loss = float(rest.split()[-2 if verdict == "baseline" else -4])
        assert loss == pytest.approx(float(baseline.split()[-2]), rel=1e-5), name
        assert abs(loss - math.log(2)) > 0.1
    assert done.stdout.splitlines()[-1].startswith("all agree: 5 layouts"), done.stdout


def small_cases(folder: Path, names: str) -> tuple:
    batch = own_making(folder, [])
    return batch, [fit(layout, batch, 1 << 60) for layout in choose(batch.layouts, names)]


def test_a_wrong_layout_fails_the_run(tmp_path, monkeypatch, capfd):
    """A norm without some shards, a gradient off by 3e-4, an exception, a death; the rest runs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names = "pairs1,share_prompt,tp2,tp2_sp,pp2,dp2"
    batch, cases = small_cases(tmp_path, names)
    console = Console(width=120)
    rows = run_cases(
        cases,
        batch.pairs,
        tmp_path,
        timeout_s=120,
        console=console,
        measure=f"{WRONG}:measure",
    )
    problems = {row.layout.name: row.problems for row in rows}
    assert set(problems) == {"baseline", *names.split(",")}
    for name in ("baseline", "share_prompt", "dp2"):
        assert problems[name] == (), name
    [gradient] = problems["pairs1"]
    assert gradient.startswith("gradient of model.norm.weight off by 3.00e-04")
    [norm] = problems["tp2_sp"]
    assert norm.startswith("gradient norm off by")
    assert problems["tp2"] == ("process 1 of 2: ValueError: made up",)
    assert problems["pp2"] == ("process 1 of 2 died, exit code -9 (out of memory?)",)

    assert report(rows, [], len(cases), 1.0, console) == 1
    shown = capfd.readouterr().out
    verdicts = {name: verdict for name, verdict, *_ in ROW.findall(shown)}
    assert (verdicts["pairs1"], verdicts["tp2_sp"], verdicts["dp2"]) == (
        "DEVIATES",
        "DEVIATES",
        "agrees",
    )
    assert verdicts["tp2"] == verdicts["pp2"] == "FAILED"
    assert "NOT all agree: 2 layouts within the bounds" in shown
    good = [row for row in rows if not row.problems]
    assert report(good, [], len(good), 1.0, console) == 0
    assert report(good, [], len(good) + 1, 1.0, console) == 1  # one was not run


def test_a_process_that_hangs_ends_them_all_and_others_start(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    batch, [case, _] = small_cases(tmp_path, "tp2")
    task = Task(config=case.config, pairs=batch.pairs, gradients="", is_baseline=True)
    with Ranks(2, tmp_path, f"{WRONG}:hang") as ranks:
        with pytest.raises(RankError, match=r"no answer from process 0, 1 of 2 within 10 s"):
            ranks.run(task, world_size=2, timeout_s=10)
        assert ranks.run(task, world_size=1, timeout_s=120) == [0]


@pytest.fixture
def hears_ctrl_c():
    """A shell's background job, as these tests may be, ignores SIGINT, as would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_end_leaves_no_process(tmp_path, end, hears_ctrl_c):
    mark = f"REINFORCER_TP_TEST_RUN={uuid.uuid4()}"
    name, value = mark.split("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "reinforcer_tp.selftest", "--layouts", "tp2_sp_pp2"],
        cwd=REPOSITORY,
        env=run_environment({"TMPDIR": str(tmp_path)}) | {name: value},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: list(tmp_path.glob("*/rank3.log")), 120)
        assert len(marked_processes(mark)) >= 6  # the parent, the server of forks, four processes
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
            assert process.wait(30) == 130
            assert list(tmp_path.iterdir()) == []
        else:
            process.send_signal(end)
            process.wait(30)
        wait_until(lambda: not marked_processes(mark), 30)
    finally:
        for pid in marked_processes(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_until(is_true, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_a_configuration_of_the_users(assets, polite_rows, tmp_path):
    """Real weights and five layers, which no pipeline divides; the own layout beside the others."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    done = run_selftest(
        *("--config", "configs/dpo.yaml", "--pairs", "5", "--layouts"),
        "share_response_tokens,tp2_sp_share,pp2_vpp2_share,own",
        f"policy.model_name={assets / 'stories260k'}",
        f"policy.tokenizer.chat_template={template}",
        "data.dataset_name=auto",
        f"data.train_data_path={polite_rows}",
        "policy.train_global_batch_size=8",
        "policy.precision=bfloat16",  # forced to float32
        "policy.megatron_cfg.pipeline_model_parallel_size=2",
        "policy.megatron_cfg.num_layers_in_first_pipeline_stage=2",
        REINFORCER_TP_CACHE=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("5 of the 8 pairs of the first global batch")
    verdicts = {name: (verdict, count) for name, verdict, count, _ in ROW.findall(done.stdout)}
    assert verdicts == {
        "baseline": ("baseline", "1"),
        "share_response_tokens": ("agrees", "1"),
        "tp2_sp_share": ("agrees", "2"),
        "pp2_vpp2_share": ("agrees", "2"),
        "own": ("agrees", "2"),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layouts", "tp2,tp3"], ["tp3 is no layout", "tp2_sp_pp2", "tied_pp2"]),
        (["--layouts", "own"], ["own is no layout without --config"]),
        (["--config", "configs/none.yaml"], ["configs/none.yaml", "there is no such file"]),
        (["--config", "configs/dpo.yaml", "dpo.betta=1"], ["betta"]),
        (["policy.precision=float16"], ["policy.precision=float16", "--config"]),
        (
            ["--config", "configs/dpo.yaml", "policy.megatron_cfg.sequence_parallel=true"],
            ["sequence_parallel=true needs"],
        ),
    ],
    ids=["layout", "own", "no-file", "key", "without-config", "contradiction"],
)
def test_configuration_errors_are_one_line(arguments, says, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(command, "make_files_private", lambda: None)  # this process goes on
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    assert command.main(arguments) == 78
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    for part in says:
        assert part in line


def test_a_wrong_configuration_is_the_exit_status():
    done = run_selftest("--layouts", "tp2,tp3")
    assert done.returncode == 78 and done.stdout == "", done.stdout
    [line] = done.stderr.splitlines()
    assert "tp3 is no layout" in line


BASELINE = Measured(
    loss=2.0,
    grad_norm=10.0,
    logps={0: np.array([-1.0, -2.0], np.float32), 1: np.array([-50.0], np.float32)},
    gradients={"a": 10.0, "b": 1e-3, "negligible": 1e-6},
    num_micro_batches=1,
    num_empty=0,
)
EXACT = replace(BASELINE, gradients=dict.fromkeys(BASELINE.gradients, 0.0))


def shifted(pair: int, by: float) -> dict[int, np.ndarray]:
    logps = {i: values.astype(np.float64) for i, values in BASELINE.logps.items()}
    logps[pair][-1] += by
    return logps


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("loss", lambda x: {"loss": 2.0 * (1 + x * 1e-5)}),
        ("gradient norm", lambda x: {"grad_norm": 10.0 * (1 + x * 1e-5)}),
        ("gradient of a", lambda x: {"gradients": EXACT.gradients | {"a": abs(x) * 1e-3}}),
        ("gradient of b", lambda x: {"gradients": EXACT.gradients | {"b": abs(x) * 1e-7}}),
        # Below 1e-6 of the total of 10: 1e-7 of the total, that is as large as itself.
        (
            "gradient of negligible",
            lambda x: {"gradients": EXACT.gradients | {"negligible": abs(x) * 1e-6}},
        ),
        ("log-prob of a token", lambda x: {"logps": shifted(0, x * 2e-5)}),
        ("log-prob of a token", lambda x: {"logps": shifted(1, x * 2e-5 * 5)}),
    ],
    ids=["loss", "norm", "large", "small", "negligible", "logp", "large-logp"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_each_bound_holds_on_every_process(what, change, sign, rank):
    def problems(x: float) -> tuple[str, ...]:
        found = [EXACT, EXACT]
        found[rank] = replace(EXACT, **change(x * sign))
        return compare(found, BASELINE).problems()

    assert problems(0.98) == ()
    [message] = problems(1.02)
    assert message.startswith(f"{what} off by")
    if "gradient of" not in what or sign > 0:
        assert problems(math.nan) != (), "nan must not pass for agreement"


@pytest.mark.parametrize(
    "change",
    [
        {"gradients": {"a": 0.0, "b": 0.0}},
        {"gradients": EXACT.gradients | {"unknown": 0.0}},
        {"logps": {}},
        {"logps": {0: BASELINE.logps[0]}},
    ],
    ids=["gradient", "unknown-gradient", "no-logps", "pair"],
)
def test_what_is_missing_deviates(change):
    assert compare([EXACT], BASELINE).problems() == ()
    assert len(compare([replace(EXACT, **change)], BASELINE).problems()) == 1


def test_every_layout_fits_the_models_that_the_selftest_makes(tmp_path):
    batch = own_making(tmp_path, [])
    fitted = [fit(layout, batch, 1 << 60) for layout in batch.layouts]
    assert [case.layout.name for case in fitted] == [layout.name for layout in batch.layouts]
    assert len({layout.name for layout in batch.layouts}) == len(batch.layouts) > 30


def test_what_cannot_run_is_skipped_with_the_reason(tmp_path):
    batch = own_making(tmp_path, [])
    one_kv_head = replace(batch, shape=batch.shape | {"num_key_value_heads": 1})
    tp2 = choose(batch.layouts, "tp2")[-1]
    with pytest.raises(ConfigError, match="num_key_value_heads=1"):
        fit(tp2, one_kv_head, 1 << 60)
    users = replace(one_kv_head, may_refuse=True)
    assert "does not divide the model's num_key_value_heads=1" in fit(tp2, users, 1 << 60).skip
    small = fit(tp2, batch, 1 << 28).skip
    assert re.fullmatch(r"needs about 1\.\d GiB, 0\.2 GiB are free", small), small
    many = replace(tp2, name="own", processes=16)
    assert fit(many, users, 1 << 60).skip == "16 processes; at most 8 are started"


@pytest.mark.parametrize("num_layers", [3, 5, 30])
def test_a_pipeline_fits_a_model_of_any_depth(num_layers, tmp_path):
    """A user's model of any depth: pp=2, and two chunks on each rank from four layers on."""
    batch = own_making(tmp_path, [])
    shape = batch.shape | {"num_hidden_layers": num_layers}
    batch = replace(batch, shape=shape, may_refuse=True)
    fitted = [fit(layout, batch, 1 << 60) for layout in layouts(num_layers, batch.pairs.lengths())]
    names = {case.layout.name for case in fitted if isinstance(case, Case)}
    assert {"pairs1", "share_response", "tp2_sp", "pp2", "pp2_uneven", "dp2_empty"} <= names
    assert ("pp2_vpp2" in names) or num_layers < 4
