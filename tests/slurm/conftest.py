"""A Slurm of three nodes for the session, and the jobs that need no hand: submitted at once.

Those are in the partition `urgent`, which is never preempted; jobs in `batch` are.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.cluster import HERE, REPOSITORY, Cluster, Job

SCRIPT = "slurm/dpo_llama70b.sh"
LIMIT = "--time=1 --signal=B:USR1@25"
WORDS = [
    "dpo.seed=1",
    'logger.wandb.name="two words"',
    "policy.tokenizer.chat_template_kwargs={a: 'b  c', d: $HOME *}",
]
# FAKE_BAD: what is wrong with the first node of the first start
SMI = """#!/bin/bash
bad=${FAKE_BAD:-}
[[ ${SLURM_RESTART_COUNT:-0}.$SLURM_NODEID == 0.0 ]] || bad=
case "$*.$bad" in
*-L*.few) ;;
*-L*.slow) sleep 8; echo "GPU 0: H100 (UUID: GPU-0)" ;;
*-L*) echo "GPU 0: H100 (UUID: GPU-0)" ;;
*ecc*.ecc) echo "0, 3" ;;
*ecc*) echo "0, [N/A]" ;;
esac
"""


@pytest.fixture(scope="session")
def cluster():
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)  # munge insists that all may reach its socket
    try:
        result = slurm.start(root)
        if result.returncode == slurm.CANNOT_RUN and os.environ.get("REQUIRE_SLURM") != "1":
            pytest.skip(f"no Slurm can run here: {result.stderr.strip()}")
        assert result.returncode == 0, result.stderr
        folder = root / "runs"
        folder.mkdir()
        yield Cluster(root=root, folder=folder)
    finally:
        slurm.stop(root)
        shutil.rmtree(root, ignore_errors=True)


def tool(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def toys(cluster):
    """Submits a job whose torchrun is the toy."""
    tools = cluster.root / "tools"
    tool(tools, "nvidia-smi", SMI)
    toy = tool(tools, "toy", f'#!/bin/sh\nexec {sys.executable} {HERE / "toy.py"} "$@"\n')

    def submit(name: str, options: str = "", words: tuple[str, ...] = (), **environment) -> Job:
        small = "-p urgent --nodes=1 --gpus-per-node=1 --exclusive=user --mem=100 --exclude=n2"
        variables = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "DPO_TORCHRUN": toy,
            "DPO_RUN_DIR": str(cluster.folder / name),
            "DPO_MIN_FREE_GIB": "1",
            "TOY_STEPS": "10",
            "TOY_STEP_S": "0.1",
            "TOY_SAVE_EVERY": "5",
        } | environment
        given = [*small.split(), *options.split()]
        return cluster.submit(name, given, [SCRIPT, *words], **variables)

    return submit


TRAINER = [
    *("policy.model_name=embedded", "dpo.max_num_steps=60", "dpo.val_period=0"),
    *("dpo.val_at_start=false", "dpo.val_at_end=false", "checkpointing.save_period=1000"),
    "logger.tensorboard_enabled=false",
]


def submit_trainer(cluster: Cluster, name: str, options: str, **environment: str) -> Job:
    """The real trainer on CPUs, a process on each of two nodes."""
    given = "--nodes=2 --gpus-per-node=0 --exclusive=user --nodelist=n1,n3 " + options
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DPO_CONFIG": "configs/dpo.yaml",
        "DPO_PROCS_PER_NODE": "1",
        "DPO_MIN_FREE_GIB": "1",
    } | environment
    words = [SCRIPT, *TRAINER, f"logger.log_dir={cluster.folder / name}"]
    return cluster.submit(name, given.split(), words, **variables)


@pytest.fixture(scope="session", autouse=True)
def jobs(cluster, toys) -> dict[str, Job]:
    """All that need no hand: submitted together, each found by its name."""
    crash = {"TOY_STEPS": "20", "TOY_STEP_S": "0.05"}
    # No preflight: Slurm may signal six seconds after the start.
    lead = {"DPO_SAVE_LEAD_S": "25", "DPO_PREFLIGHT_S": "0"}
    made = [
        submit_trainer(cluster, "preempted", "-p batch --mem=1500G", DPO_PREFLIGHT_S="0"),
        submit_trainer(cluster, "whole", "-p urgent --mem=100"),
        toys("limit", LIMIT, TOY_STEPS="720", TOY_SAVE_EVERY="10000", **lead),
        toys("deaf", LIMIT, TOY_FAULT="hang@7", TOY_FAULTS="1", **lead),
        toys("order", "--nodes=3 --exclude=", words=tuple(WORDS)),
        toys("progress", TOY_FAULT="killed@+6", DPO_MAX_FAILURES="2", **crash),
        toys("stuck", TOY_FAULT="killed@7", **crash),
        toys("errors", TOY_FAULT="error@7", DPO_MAX_FAILURES="9", **crash),
        toys("damaged", TOY_FAULT="data@7", **crash),
        toys("hang", "--nodes=2", TOY_FAULT="hang@7", TOY_FAULTS="1", DPO_HANG_S="6"),
        toys("few", FAKE_BAD="few"),
        toys("ecc", FAKE_BAD="ecc"),
        toys("ring", "--nodes=2 --exclude=", TOY_NO_ALL_REDUCE="1"),
        toys("extended", "--dependency=singleton"),
        toys("chain", "--dependency=singleton", TOY_STEP_S="0.5"),
    ]
    again = toys("chain", "--dependency=singleton")
    return {job.run.name: job for job in made} | {"again": again}
