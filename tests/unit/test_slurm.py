"""slurm/dpo_llama70b.sh with stand-ins for srun, scontrol and torchrun on PATH."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reinforcer_tp.config import load_config
from reinforcer_tp.train import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "slurm" / "dpo_llama70b.sh"
NUM_NODES, GPUS = 4, 8
ARGUMENTS = [
    "dpo.seed=1",
    'logger.wandb.name="dpo-dev-8-gpu"',
    'logger.log_dir=/shared/my runs/it\'s "here" $HOME *',
    "policy.tokenizer.chat_template_kwargs={a: 'b  c'}",
]

SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
codes = []
for node in range(int(os.environ["SLURM_NNODES"])):
    codes.append(subprocess.call(words, env=os.environ | {{"SLURM_NODEID": str(node)}}))
sys.exit(max(codes))
"""
SCONTROL = """#!{python}
import os, sys
assert sys.argv[1:] == ["show", "hostnames", "big[3,1-2,7]"], sys.argv
if os.environ.get("SCONTROL_FAILS"):
    sys.exit(1)
print("big3", "big1", "big2", "big7", sep="\\n")
"""
TORCHRUN = """#!{python}
import json, os, sys
node = os.environ["SLURM_NODEID"]
with open(f"node.{{node}}.json", "x") as file:
    json.dump(sys.argv[1:], file)
sys.exit(int(os.environ.get("TORCHRUN_RC", "0")) if node == "2" else 0)
"""


@pytest.fixture
def submit_dir(tmp_path):
    """A repository with a blank in its path, holding what the script looks for."""
    folder = tmp_path / "my repository"
    (folder / "reinforcer_tp").mkdir(parents=True)
    (folder / "reinforcer_tp" / "train.py").touch()
    return folder


def run_script(submit_dir: Path, *arguments: str, **environment: str):
    """Run a spooled copy of the script as slurmd does, from another folder."""
    spool, tools = submit_dir.parent / "spool", submit_dir.parent / "tools"
    for folder in (spool, tools):
        folder.mkdir(exist_ok=True)
    shutil.copy(SCRIPT, spool / "slurm_script")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    variables |= {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(submit_dir),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "big[3,1-2,7]",
        "SLURM_NNODES": str(NUM_NODES),
        "SLURM_GPUS_ON_NODE": str(GPUS),
    }
    variables |= environment
    command = ["bash", str(spool / "slurm_script"), *arguments]
    return subprocess.run(
        command, env=variables, cwd=spool, capture_output=True, text=True, timeout=60
    )


def torchrun_arguments(submit_dir: Path) -> list[list[str]]:
    files = [submit_dir / f"node.{node}.json" for node in range(NUM_NODES)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def test_bash_can_read_the_script():
    run = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert os.access(SCRIPT, os.X_OK)


def test_directives_ask_for_what_the_config_says():
    """sbatch reads directives up to the first command only."""
    directives = {}
    for line in SCRIPT.read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if found := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
            directives[found[1]] = found[2]
    cluster = load_config(str(REPOSITORY / "configs" / "dpo_llama70b.yaml"), []).cluster
    assert directives["nodes"] == str(cluster.num_nodes)
    assert directives["gpus-per-node"] == str(cluster.gpus_per_node) == str(GPUS)
    assert directives["ntasks-per-node"] == "1"


def test_every_node_starts_one_torchrun_that_finds_the_first(submit_dir):
    from torch.distributed.run import get_args_parser

    run = run_script(submit_dir, *ARGUMENTS)
    assert run.returncode == 0, run.stderr
    launched = [get_args_parser().parse_args(words) for words in torchrun_arguments(submit_dir)]
    assert [int(arguments.node_rank) for arguments in launched] == [0, 1, 2, 3]
    for arguments in launched:
        assert arguments.nnodes == str(NUM_NODES) and arguments.nproc_per_node == str(GPUS)
        assert arguments.rdzv_backend == "static"
        assert arguments.master_addr == "big3"  # Slurm's first node, not the alphabet's
        assert arguments.master_port == launched[0].master_port
        assert 1024 < arguments.master_port < 32768  # below Linux's ephemeral ports
        assert arguments.training_script == "reinforcer_tp/train.py"


def test_arguments_reach_the_trainer_intact(submit_dir):
    assert run_script(submit_dir, *ARGUMENTS).returncode == 0
    for words in torchrun_arguments(submit_dir):
        trainer = words[words.index("reinforcer_tp/train.py") + 1 :]
        assert trainer[:2] == ["--config", "configs/dpo_llama70b.yaml"]
        assert trainer[-len(ARGUMENTS) :] == ARGUMENTS
    config = load_config(str(REPOSITORY / trainer[1]), trainer[2:])
    config.validate(NUM_NODES * GPUS, GPUS)
    assert config.logger.wandb.name == "dpo-dev-8-gpu"
    assert config.logger.log_dir == '/shared/my runs/it\'s "here" $HOME *'
    assert config.policy.tokenizer.chat_template_kwargs == {"a": "b  c"}


def test_no_arguments_are_none(submit_dir):
    assert run_script(submit_dir).returncode == 0
    assert torchrun_arguments(submit_dir)[0][-1] == f"cluster.gpus_per_node={GPUS}"


def test_what_sbatch_was_given_wins_over_the_config(submit_dir):
    run = run_script(submit_dir, SLURM_NNODES="16", SLURM_GPUS_ON_NODE="4")
    assert run.returncode == 0, run.stderr
    trainer = torchrun_arguments(submit_dir)[3]
    config = load_config(str(REPOSITORY / "configs" / "dpo_llama70b.yaml"), trainer[-2:])
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (16, 4)
    config.validate(64, 4)


def test_a_later_config_wins(submit_dir):
    run = run_script(submit_dir, "--config", "configs/dpo_qwen3_32b.yaml", "dpo.seed=3")
    assert run.returncode == 0, run.stderr
    words = torchrun_arguments(submit_dir)[0]
    trainer = words[words.index("reinforcer_tp/train.py") + 1 :]
    arguments = parse_arguments(trainer)
    assert arguments.config == "configs/dpo_qwen3_32b.yaml"
    assert arguments.overrides[-1] == "dpo.seed=3"


def test_two_jobs_on_one_node_have_two_ports(submit_dir):
    ports = set()
    for job in ("1234567", "1234568"):
        for file in submit_dir.glob("node.*"):
            file.unlink()
        assert run_script(submit_dir, SLURM_JOB_ID=job).returncode == 0
        ports |= {word for word in torchrun_arguments(submit_dir)[0] if "--master-port" in word}
    assert len(ports) == 2


def test_a_venv_in_the_repository_is_used(submit_dir):
    tools = submit_dir / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "torchrun").write_text("#!/bin/bash\ntouch used.$SLURM_NODEID\n")
    (tools / "torchrun").chmod(0o755)
    assert run_script(submit_dir).returncode == 0
    assert len(list(submit_dir.glob("used.*"))) == NUM_NODES


@pytest.mark.parametrize(
    ("environment", "launches"),
    [({"TORCHRUN_RC": "3"}, NUM_NODES), ({"SCONTROL_FAILS": "1"}, 0)],
)
def test_failures_are_passed_on(submit_dir, environment, launches):
    assert run_script(submit_dir, **environment).returncode != 0
    assert len(torchrun_arguments(submit_dir)) == launches


def test_submitting_from_elsewhere_is_refused(submit_dir):
    run = run_script(submit_dir, SLURM_SUBMIT_DIR=str(submit_dir / "reinforcer_tp"))
    assert run.returncode != 0 and "submit from the repository root" in run.stderr
    assert torchrun_arguments(submit_dir) == []
