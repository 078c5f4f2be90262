"""The job scripts without a Slurm: what they ask for, what they would run, what they refuse.

tests/slurm/ runs them on a real one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from reinforcer_tp import run_directory
from reinforcer_tp.config import load_config
from reinforcer_tp.lifecycle.attempts import NAMES
from reinforcer_tp.lifecycle.exits import Exit
from reinforcer_tp.lifecycle.position import LIMITED
from reinforcer_tp.train import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "slurm"
SCRIPTS = {"dpo_llama70b": 8, "dpo_llama8b": 1}  # nodes
RUN = 'logger.log_dir=/shared/my runs/it\'s "here" $HOME *'
ARGUMENTS = [
    "dpo.seed=1",
    'logger.wandb.name="dpo-dev-8-gpu"',
    RUN,
    "policy.tokenizer.chat_template_kwargs={a: 'b  c'}",
]


def run_script(*arguments: str, script: str = "dpo_llama70b", **environment: str):
    """As on a login node with DPO_DRY_RUN=1."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DPO_"))}
    return subprocess.run(
        ["bash", f"slurm/{script}.sh", *arguments],
        env=variables | {"DPO_DRY_RUN": "1"} | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(*arguments: str, **options: str) -> list[str]:
    """The words of the srun line."""
    run = run_script(*arguments, **options)
    assert run.returncode == 0, run.stderr
    [line] = run.stdout.splitlines()
    return shlex.split(line)


def directives(script: str) -> dict[str, str]:
    """sbatch reads them up to the first command only."""
    found = {}
    for line in (FOLDER / f"{script}.sh").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if match := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_bash_can_read_it(path):
    run = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert path.read_text().isascii()
    if shutil.which("shellcheck"):
        # Variables of the other files that launch.sh sources are not seen.
        command = ["shellcheck", "--shell=bash", "--exclude=SC1091,SC2034,SC2153,SC2154", path]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_directives(script):
    asked = directives(script)
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(SCRIPTS[script]), "8")
    assert asked["ntasks-per-node"] == "1" and asked["open-mode"] == "append"
    assert {"requeue", "exclusive"} <= set(asked)
    assert asked["job-name"] == script and asked["output"] == "%x-%j.out"
    lead = re.search(r"DPO_SAVE_LEAD_S:=(\d+)", (FOLDER / "settings.sh").read_text())[1]
    assert asked["signal"] == f"B:USR1@{lead}"
    assert not {"partition", "account", "qos", "constraint"} & set(asked)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_trainer_takes_what_it_is_given(script):
    words = dry_run(*ARGUMENTS, script=script)
    assert words[0] == "srun" and f"--nodes={SCRIPTS[script]}" in words
    trainer = words[words.index("reinforcer_tp/train.py") + 1 :]
    assert trainer[:2] == ["--config", f"configs/{script}.yaml"]
    assert trainer[-len(ARGUMENTS) :] == ARGUMENTS
    config = load_config(str(REPOSITORY / trainer[1]), trainer[2:])
    config.validate(SCRIPTS[script] * 8, 8)
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (SCRIPTS[script], 8)
    assert config.logger.log_dir == RUN.split("=", 1)[1]
    assert words[words.index("slurm/node.sh") + 2] == config.logger.log_dir


def test_a_later_config_wins():
    words = dry_run(RUN, "--config", "configs/dpo_qwen3_32b.yaml", "dpo.seed=3")
    arguments = parse_arguments(words[words.index("reinforcer_tp/train.py") + 1 :])
    assert arguments.config == "configs/dpo_qwen3_32b.yaml"
    assert arguments.overrides[-1] == "dpo.seed=3"


@pytest.mark.parametrize(
    ("arguments", "environment", "folder"),
    [
        (["logger.log_dir=/a", "logger.log_dir=/b"], {"DPO_RUN_DIR": "/c"}, "/b"),
        ([], {"DPO_RUN_DIR": "/c"}, "/c"),
        (["logger.log_dir=logs/x"], {}, str(REPOSITORY / "logs/x")),
        (['logger.log_dir="/a b"'], {}, "/a b"),
    ],
)
def test_the_last_run_folder_counts(arguments, environment, folder):
    words = dry_run(*arguments, **environment)
    at = words.index("slurm/node.sh")
    assert words[at + 2] == folder
    config = load_config(str(REPOSITORY / words[at + 5]), words[at + 6 :])
    assert str(REPOSITORY / config.logger.log_dir) == folder


def test_a_percent_sign_is_no_pattern_of_sruns():
    words = dry_run("logger.log_dir=/runs/50%N")
    assert "--output=/runs/50%%N/slurm/0.0.%N.log" in words


def test_the_container_is_optional(tmp_path):
    assert not [word for word in dry_run(RUN) if "container" in word]
    image = tmp_path / "image.sqsh"
    image.touch()
    words = dry_run(
        "logger.log_dir=/runs/a",
        DPO_CONTAINER_IMAGE=str(image),
        DPO_CONTAINER_MOUNTS=f"{tmp_path}:/data:ro",
    )
    mounts = f"{REPOSITORY}:{REPOSITORY},/runs/a:/runs/a,{tmp_path}:/data:ro"
    assert f"--container-mounts={mounts}" in words and "--no-container-mount-home" in words
    words = dry_run(RUN, DPO_CONTAINER_IMAGE="nvcr.io#nvidia/pytorch:26.01-py3")
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in words


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no run folder: a requeued job would not find its run; give logger.log_dir="),
        ([RUN], {"DPO_DRY_RUN": "0"}, "not in a Slurm job; expected: sbatch slurm/dpo_llama70b.sh"),
        ([RUN], {"DPO_CONFIG": "configs/none.yaml"}, "no config "),
        ([RUN], {"DPO_HANG_S": "10m"}, "DPO_HANG_S=10m; expected a whole number"),
        ([RUN], {"DPO_SAVE_LEAD_S": "10"}, "DPO_SAVE_LEAD_S=10; expected at least 20"),
        ([RUN], {"DPO_PROCS_PER_NODE": "9"}, "DPO_PROCS_PER_NODE=9, but the job has 8 GPUs a node"),
        ([RUN], {"SLURM_GPUS_ON_NODE": "0"}, "no GPUs in this job; expected sbatch --gpus-per-"),
        ([RUN], {"DPO_PROCS_PER_NODE": "0"}, "DPO_PROCS_PER_NODE=0; expected a whole number from"),
        ([RUN], {"DPO_PROCS_PER_NODE": "-1"}, "DPO_PROCS_PER_NODE=-1; expected a whole number "),
        ([RUN], {"DPO_MAX_FAILURES": "09"}, "DPO_MAX_FAILURES=09; expected a whole number of at"),
        ([RUN], {"DPO_HANG_S": "9" * 20}, f"DPO_HANG_S={'9' * 20}; expected a whole number of at"),
        (["logger.log_dir=null"], {}, "no run folder: "),
        ([RUN], {"DPO_DRY_RUN": "no"}, "not in a Slurm job; expected: sbatch "),
        (
            [RUN],
            {"DPO_CONTAINER_IMAGE": "/no/image.sqsh"},
            "DPO_CONTAINER_IMAGE=/no/image.sqsh is ",
        ),
        ([RUN], {"DPO_CONTAINER_MOUNTS": "/a:/b"}, "DPO_CONTAINER_MOUNTS is set without "),
        (
            [RUN],
            {"DPO_CONTAINER_IMAGE": "x", "DPO_CONTAINER_MOUNTS": "/tmp:/a,/no/data:/b"},
            "DPO_CONTAINER_MOUNTS=/no/data:/b: /no/data is not there",
        ),
    ],
)
def test_bad_input_is_refused(arguments, environment, message):
    run = run_script(*arguments, **environment)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"error: {message}"), run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_submitting_from_elsewhere_is_refused(tmp_path):
    run = run_script(RUN, DPO_REPO=str(tmp_path))
    assert run.returncode == 2 and "submit from the repository root" in run.stderr
    assert "--nodes=8" in dry_run(RUN, SLURM_SUBMIT_DIR=str(tmp_path)), "sbatch --chdir"
    assert "--nodes=8" in dry_run(RUN, DPO_REPO=str(REPOSITORY))


def test_the_scripts_know_the_trainers_files():
    """Phases with a time limit, exit codes that end a job, the folder beside the trainer's."""
    settings, outcome = ((FOLDER / f"{name}.sh").read_text() for name in ("settings", "outcome"))
    assert set(re.search(r"STEP_PHASES='(.*)'", settings)[1].split("|")) == LIMITED
    for_good = {Exit.DATA, Exit.CONFIG, Exit.NO_RESTART}
    assert {int(c) for c in re.search(r"\n    (65.*)\)\n", outcome)[1].split(" | ")} == for_good
    assert f"$code == {int(Exit.REQUEUE)} && $cause == stop" in outcome
    toy = (REPOSITORY / "tests" / "slurm" / "toy.py").read_text()
    for name in (run_directory._FINISHED, "checkpoints"):
        assert name in outcome and f'"{name}"' in toy
    assert "slurm" in NAMES, "the trainer would refuse a folder that only holds slurm/"


def test_every_variable_is_in_the_readme():
    text = "".join(path.read_text() for path in FOLDER.glob("*.sh"))
    used = set(re.findall(r"\bDPO_[A-Z_]+\b", text)) - {"DPO_LAST_ATTEMPT", "DPO_PROCS"}
    listed = set(re.findall(r"^\| `(DPO_\w+)`", (FOLDER / "README.md").read_text(), flags=re.M))
    assert used == listed


SMI = """#!/bin/sh
case "$*" in
*-L*) echo "GPU 0: H100 (UUID: GPU-a)"; echo "GPU 1: H100 (UUID: GPU-b)" ;;
*) echo "0, [N/A]"; echo "1, ${ECC:-0}" ;;
esac
"""


def preflight(tmp_path: Path, *, clock: float = 0.0, gpus: int = 2, free_gib: int = 1, **more: str):
    """One node's preflight, with a stand-in for nvidia-smi and without waiting."""
    folder, tools = tmp_path / "folder", tmp_path / "tools"
    for each in (folder, tools):
        each.mkdir(exist_ok=True)
    for name, text in (("nvidia-smi", SMI), ("sleep", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    if "MISSING" not in more:
        (folder / "clock").write_text(f"{int(time.time() + clock)}\n")
    log = tmp_path / "1.0"
    return subprocess.run(
        ["bash", FOLDER / "preflight.sh", folder, log, str(gpus), "60", str(free_gib)],
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURMD_NODENAME": "n7"} | more,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_good_node_says_so_in_its_log_too(tmp_path):
    assert preflight(tmp_path).stdout == "preflight n7: ok\n"
    assert (tmp_path / "1.0.n7.log").read_text() == "preflight n7: ok\n"
    assert (tmp_path / "folder" / "n7.canary").read_text() == "n7\n"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"gpus": 3}, "GPUs: nvidia-smi lists 2, expected 3"),
        ({"ECC": "4"}, "ECC: uncorrected errors: GPU 1: 4; expected 0"),
        ({"clock": -100.0}, r"clock: 10\d s from the first node's, expected at most 60"),
        ({"clock": 100.0}, r"clock: -(100|99) s from the first node's, expected at most 60"),
        ({"free_gib": 10**9}, r"disk: .*folder has \d+ GiB free, expected 1000000000"),
        ({"TMPDIR": "/no/folder"}, r"disk: /no/folder has \? GiB free, expected 1"),
        ({"MISSING": "1"}, "shared folder: .*/clock, just written, is not seen after 30 s"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_node_says_why(tmp_path, given, reason):
    run = preflight(tmp_path, **given)
    assert run.returncode == 1
    assert re.match(f"preflight n7: bad: {reason}", run.stdout), run.stdout
    assert (tmp_path / "1.0.n7.log").read_text() == run.stdout


def test_a_node_that_cannot_write_says_so(tmp_path):
    (tmp_path / "folder" / "n7.canary").mkdir(parents=True)
    run = preflight(tmp_path)
    assert run.stdout.startswith("preflight n7: bad: shared folder: ") and run.returncode == 1
    assert run.stdout.rstrip().endswith("folder cannot be written")


STUBS = {
    "squeue": """
case "$*" in
*%l*) echo 1-00:00:00 ;;
*%L*) echo "${FAKE_LEFT:-12:00:00}" ;;
*"-j 7 "*) echo RUNNING ;;
*) echo "${FAKE_OTHER:-}" ;;
esac""",
    "scontrol": """
case "$*" in
*hostnames*) echo "$3" | tr , '\\n' ;;
*show*) echo "JobId=7 ReqNodeList=${FAKE_ASKED:-(null)} ExcNodeList=(null) X=y $FAKE_JOB" ;;
*) echo "scontrol $*" ;;
esac""",
    "srun": """
case "$*" in
*preflight.sh*) eval "${FAKE_PREFLIGHT:-}" ;;
*) eval "$FAKE_TRAINING" ;;
esac""",
}


def job(tmp_path: Path, *words: str, preflight: str = "", training: str = "exit 1", **more: str):
    """Job 7 on n1 and n2, with stand-ins for Slurm's commands."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1,n2",
        "SLURM_NNODES": "2",
        "DPO_PROCS_PER_NODE": "1",
        "DPO_RUN_DIR": str(tmp_path / "run"),
        "DPO_MIN_FREE_GIB": "0",
        "DPO_DRY_RUN": "0",
        "FAKE_JOB": "PreemptTime=None",
        "FAKE_PREFLIGHT": preflight,
        "FAKE_TRAINING": training,
        "RUN": str(tmp_path / "run"),
    }
    if not preflight:
        given["DPO_PREFLIGHT_S"] = "0"
    return run_script(*words, **given | more)


def attempt(run: Path, number: int, owner: str, end: dict | None = None) -> None:
    folder = run / "attempts" / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text(json.dumps({"rank": 0, "slurm_job": owner}) + "\n")
    if end is not None:
        (folder / "exit.json").write_text(json.dumps(end, indent=2) + "\n")


def answers(first: str, second: str) -> str:
    return f"echo 'preflight n1: {first}'; echo 'preflight n2: {second}'"


def test_a_bad_node_is_left_out(tmp_path):
    run = job(tmp_path, preflight=answers("ok", "bad: GPUs: 0, expected 1"))
    assert "scontrol update JobId=7 ExcNodeList=n2" in run.stdout and run.returncode == 0


def test_a_fault_of_all_nodes_leaves_none_out(tmp_path):
    """Left out, they would all be, and the job pend for ever."""
    run = job(tmp_path, preflight=answers("bad: GPUs: 0", "bad: GPUs: 3, expected 1"))
    assert "failure 1 of at most 3 at checkpoint 0: preflight: all nodes fail alike" in run.stdout
    assert "scontrol requeue 7" in run.stdout and "ExcNodeList" not in run.stdout


def test_a_bad_node_that_was_asked_for_ends_the_job(tmp_path):
    run = job(tmp_path, preflight=answers("ok", "bad: GPUs: 0"), FAKE_ASKED="n2")
    assert "n2 is bad, and asked for by --nodelist" in run.stdout and run.returncode == 1
    assert "scontrol" not in run.stdout


def test_too_little_space_in_the_run_folder_is_refused(tmp_path):
    run = job(tmp_path, DPO_MIN_FREE_GIB="900000000")
    assert run.returncode == 2 and "GiB free, expected 900000000" in run.stderr


def test_a_preemption_before_the_training_is_no_nodes_fault(tmp_path):
    run = job(tmp_path, preflight="echo preflight n1: ok", FAKE_JOB="PreemptTime=2026-01-01T00:00")
    assert "requeue: preempted before the training" in run.stdout, run.stdout
    assert "failure" not in run.stdout and "ExcNodeList" not in run.stdout


def test_a_preflight_does_not_die_of_a_preemptions_term(tmp_path):
    """TERM comes to each process of a step."""
    text = (FOLDER / "preflight.sh").read_text()
    script = text[: text.index("folder=")] + "kill -TERM $$; echo alive"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert run.stdout == "alive\n"


@pytest.mark.parametrize(("left", "is_failure"), [("12:00:00", False), ("10:30", True)])
def test_usr1_ends_a_preflight_at_once(tmp_path, left, is_failure):
    begin = time.monotonic()
    # The batch shell is the parent of timeout, which is srun's.
    tell = "kill -USR1 $(awk '{print $4}' /proc/$PPID/stat); exec sleep 40"
    run = job(tmp_path, preflight=tell, FAKE_LEFT=left)
    assert time.monotonic() - begin < 20 and run.returncode == 0, run.stdout
    assert ("failure 1 of" in run.stdout) == is_failure
    assert "scontrol requeue 7" in run.stdout and "ExcNodeList" not in run.stdout


def test_a_changed_config_is_another_command(tmp_path):
    """However it is given."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "finished.json").touch()
    given = tmp_path / "a.yaml"
    done = "mkdir -p $RUN/attempts/0001; echo '  \"code\": 0,' > $RUN/attempts/0001/exit.json"
    for words in (["--config", str(given)], [f"--config={given}"]):
        given.write_text("a: 1\n")
        assert "done: " in job(tmp_path, *words, training=done).stdout
        assert "done already" in job(tmp_path, *words).stdout
        given.write_text("a: 2\n")
        assert "done already" not in job(tmp_path, *words).stdout
        shutil.rmtree(tmp_path / "run" / "attempts")


def test_export_none_is_not_for_the_steps(tmp_path):
    run = job(tmp_path, training="echo steps get $SLURM_EXPORT_ENV", SLURM_EXPORT_ENV="NONE")
    assert "steps get ALL" in run.stdout


def test_a_run_of_another_job_is_left_alone(tmp_path):
    attempt(tmp_path / "run", 1, "6.0")
    (tmp_path / "run" / "stop").touch()
    run = job(tmp_path, FAKE_OTHER="RUNNING")
    assert run.returncode == 2 and f"{tmp_path}/run is in use by job 6; wait" in run.stderr
    assert (tmp_path / "run" / "stop").exists()
    run = job(tmp_path, FAKE_OTHER="")  # it has been killed
    assert "training: 2 x 1 processes" in run.stdout and not (tmp_path / "run" / "stop").exists()


def test_only_its_own_attempt_says_how_a_job_has_ended(tmp_path):
    attempt(tmp_path, 2, "7.0", {"code": 65, "cause": "error", "message": "its own"})
    attempt(tmp_path, 3, "6.0", {"code": 0, "cause": "done", "message": "another's"})
    training = f"mkdir $RUN/attempts; cp -r {tmp_path}/attempts/* $RUN/attempts/"
    run = job(tmp_path, training=training)
    assert run.returncode == 65 and "ended with 65: its own" in run.stdout


def test_a_run_that_another_job_has_begun_meanwhile_ends_this_job(tmp_path):
    attempt(tmp_path, 1, "6.0")
    said = "error[75]: logger.log_dir=/r is in use by process 5 on n3; wait until it ends"
    copy = f"mkdir $RUN/attempts; cp -r {tmp_path}/attempts/* $RUN/attempts/"
    training = f"{copy}; echo '{said}' > $RUN/slurm/7.0.n1.log"
    run = job(tmp_path, training=training, FAKE_OTHER="RUNNING")
    assert run.returncode == 75 and "in use by job 6, which goes on" in run.stdout
