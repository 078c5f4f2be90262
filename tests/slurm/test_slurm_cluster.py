"""The job scripts on a real Slurm of three nodes. One file: one cluster, and jobs side by side.

Jobs that need no hand are submitted together (conftest.py) and looked at one after the other.
"""

import os
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.slurm.cluster import REPOSITORY, Cluster, Job
from tests.slurm.conftest import SCRIPT, WORDS, tool

pytestmark = pytest.mark.timeout(400)


def preempt(cluster: Cluster, nodes: str) -> Job:
    """A job of more worth, which needs the memory that only one in `batch` has."""
    script = tool(cluster.root / "tools", "short.sh", "#!/bin/bash\nsleep 1\n")
    options = f"-p urgent --nodelist={nodes} --nodes={nodes.count('n')} --mem=1000G"
    name = f"worth-{nodes.replace(',', '-')}"
    return cluster.submit(name, [*options.split(), "--exclusive=user"], [script])


def checkpoints(job: Job) -> list[str]:
    return sorted(path.name for path in job.run.glob("checkpoints/step_*"))


def goes_on(job: Job) -> bool:
    """Whether each attempt began at the checkpoint that the one before it had left."""
    ends = [end for end in job.ends() if end]
    return all(
        later["start_step"] == (earlier["saved_step"] or earlier["start_step"])
        for earlier, later in pairwise(ends)
    )


def test_a_preempted_trainer_goes_on_bit_for_bit(cluster, jobs):
    """First, since it takes longest: the other jobs run meanwhile."""
    job, whole = jobs["preempted"], jobs["whole"]
    job.wait_for(lambda: job.heartbeat_step() >= 10, 150, "ten steps")
    preempt(cluster, "n1,n3")
    assert job.end(200) == "COMPLETED", job.story()
    first, last = job.ends()
    assert (first["code"], first["cause"], last["code"]) == (75, "stop", 0), job.story()
    assert "SIGTERM" in first["message"] and 10 <= first["saved_step"] < 60
    assert last["start_step"] == first["saved_step"]
    assert whole.end(120) == "COMPLETED", whole.story()
    assert whole.codes() == [0]
    assert "preflight: all-reduce: 0.25 MiB over 2 ranks" in whole.text()
    files = [path.relative_to(whole.run) for path in whole.run.rglob("*.safetensors")]
    assert {path.parts[0] for path in files} == {"hf", "checkpoints"}
    for path in files:
        expected, found = load_file(whole.run / path), load_file(job.run / path)
        assert expected.keys() == found.keys() and expected
        for name, tensor in expected.items():
            assert found[name].tobytes() == tensor.tobytes(), (path, name)


def test_nodes_are_launched_in_slurms_order(cluster, jobs):
    job = jobs["order"]
    assert job.end() == "COMPLETED", job.story()
    [nodes] = job.launches()
    named = job.show()["NodeList"]
    order = cluster.ask("scontrol", "show", "hostnames", named).split()
    assert [node["host"] for node in nodes] == order == ["n1", "n2", "n3"]
    for number, node in enumerate(nodes):
        assert {f"--node-rank={number}", "--nnodes=3", "--nproc-per-node=1"} <= set(node["words"])
        assert f"--master-addr={order[0]}" in node["words"]
        assert "--rdzv-backend=static" in node["words"]
    ports = {w for node in nodes for w in node["words"] if w.startswith("--master-port=")}
    assert len(ports) == 1
    assert {p.name for p in job.run.glob("slurm/*.log")} == {
        f"{job.number}.0.{node}.log" for node in order
    }


def test_arguments_reach_the_trainer_as_they_were(cluster, jobs):
    jobs["order"].end()
    for node in jobs["order"].launches()[0]:
        words = node["words"]
        trainer = words[words.index("reinforcer_tp/train.py") + 1 :]
        assert trainer[:2] == ["--config", "configs/dpo_llama70b.yaml"]
        assert trainer[2:4] == ["cluster.num_nodes=3", "cluster.gpus_per_node=1"]
        assert trainer[4:] == [f"logger.log_dir={jobs['order'].run}", *WORDS]


def test_crashes_with_progress_are_requeued_until_done(jobs):
    job = jobs["progress"]
    assert job.end() == "COMPLETED", job.story()
    assert job.codes() == [None, None, None, 0]
    assert job.ends()[-1]["start_step"] == 15 and job.show()["Restarts"] == "3"
    assert "failure 2" not in job.text()


def test_crashes_without_progress_end_the_job(jobs):
    job = jobs["stuck"]
    assert job.end() == "FAILED", job.story()
    assert job.codes() == [None] * 3 and job.show()["Restarts"] == "2"
    assert "no progress since checkpoint 5" in job.text()


def test_the_trainers_own_verdict_ends_the_job(jobs):
    job = jobs["errors"]
    assert job.end() == "FAILED", job.story()
    assert job.codes() == [70, 70, 93] and job.show()["ExitCode"] == "93:0"
    assert "the third failure in a row" in job.text()


def test_bad_data_is_not_tried_again(jobs):
    job = jobs["damaged"]
    assert job.end() == "FAILED", job.story()
    assert job.codes() == [65] and job.show()["ExitCode"] == "65:0"
    assert "the attempt has ended with 65: the toy's checkpoint is damaged" in job.text()


def test_a_hang_leaves_stacks_and_is_requeued(jobs):
    job = jobs["hang"]
    assert job.end() == "COMPLETED", job.story()
    assert job.codes() == [None, 0] and job.ends()[1]["start_step"] == 5
    assert "no heartbeat for 6 s" in job.text()
    stacks = (job.run / "attempts" / "0001" / "stacks_rank0.txt").read_text()
    assert re.search(r'toy.py", line \d+ in fail', stacks), stacks


def check_left_out(job: Job, why: str, excluded: set[str] = frozenset()) -> str:
    """The first node of the first start, which is the one."""
    assert job.end() == "COMPLETED", job.story()
    bad = re.search("preflight of (n[123])", job.text())[1]
    assert why.format(node=bad) in job.text(), job.text()
    about = job.show()
    assert names(job.cluster, about["ExcNodeList"]) == {bad} | excluded, about
    assert bad not in names(job.cluster, about["NodeList"])
    assert about["Restarts"] == "1" and job.codes() == [0]
    return bad


def names(cluster: Cluster, nodes: str) -> set[str]:
    return set(cluster.ask("scontrol", "show", "hostnames", nodes).split())


def test_a_node_with_fewer_gpus_is_left_out(jobs):
    """Beside the one that sbatch --exclude named."""
    why = "preflight {node}: bad: GPUs: nvidia-smi lists 0, expected 1"
    bad = check_left_out(jobs["few"], why, {"n2"})
    log = jobs["few"].run / "slurm" / f"{jobs['few'].number}.0.{bad}.log"
    assert "lists 0, expected 1" in log.read_text()


def test_a_node_with_memory_errors_is_left_out(jobs):
    why = "preflight {node}: bad: ECC: uncorrected errors: GPU 0: 3"
    check_left_out(jobs["ecc"], why, {"n2"})


def test_a_node_whose_gpus_do_not_reduce_is_left_out(jobs):
    check_left_out(jobs["ring"], "no all-reduce among the processes of {node}")


def test_no_node_is_blamed_for_what_none_can_do(cluster, toys):
    """Such as a container image that cannot be fetched."""
    srun = Path(tool(cluster.root / "bad", "srun", "#!/bin/sh\necho no such image\nexit 1\n"))
    path = f"{srun.parent}:{os.environ['PATH']}"
    job = toys("nowhere", PATH=path, DPO_MAX_FAILURES="1")
    assert job.end() == "FAILED", job.story()
    assert "no such image" in job.text() and "no node has answered" in job.text()
    assert job.show()["ExcNodeList"] == "n2", "sbatch's own --exclude"


def test_a_chain_ends_with_the_run(jobs):
    first, again = jobs["chain"], jobs["again"]
    assert (first.end(), again.end()) == ("COMPLETED", "COMPLETED")
    assert first.codes() == [0], "the second job has started the trainer again"
    assert "done already" in first.text()


def test_another_command_starts_the_trainer_again(jobs, toys):
    job = jobs["extended"]
    assert job.end() == "COMPLETED", job.story()
    more = toys("extended", words=("dpo.max_num_steps=20",), TOY_STEPS="20")
    assert more.end() == "COMPLETED", more.story()
    assert job.codes() == [0, 0] and job.ends()[1]["start_step"] == 10


def test_a_preempted_job_goes_on(cluster, toys):
    job = toys("yields", "-p batch --exclude= --nodelist=n2 --mem=1500G", TOY_STEPS="100")
    job.wait_for(lambda: job.heartbeat_step() >= 20, 60, "twenty steps")
    urgent = preempt(cluster, "n2")
    urgent.end()
    job.wait_for(lambda: job.show()["Restarts"] == "1", 30, "the requeue")
    assert job.end() == "COMPLETED", job.story()
    assert job.codes() == [75, 0] and goes_on(job)
    assert "stopped by SIGTERM" in job.text() and "failure" not in job.text()


def test_a_preemption_in_the_preflight_is_no_nodes_fault(cluster, toys):
    job = toys("early", "-p batch --exclude= --nodelist=n2 --mem=1500G", FAKE_BAD="slow")
    job.wait_for(lambda: "preflight of" in job.text(), 60, "the preflight")
    preempt(cluster, "n2").end()
    assert job.end() == "COMPLETED", job.story()
    assert "preflight n2: ok" in job.text() and "preempted before the training" in job.text()
    assert job.codes() == [0] and "failure" not in job.text()
    assert job.show()["ExcNodeList"] in ("", "(null)") and job.show()["Restarts"] == "1"


def test_a_lost_node_is_replaced(cluster, toys):
    job = toys("lost", "--exclude= --nodes=2 --nodelist=n2", TOY_STEPS="80")
    job.wait_for(lambda: job.heartbeat_step() >= 12, 60, "a checkpoint")
    try:
        for state in ("DRAIN", "DOWN"):  # or it would be back at once
            cluster.ask("scontrol", "update", "NodeName=n2", f"State={state}", "Reason=test")
        job.wait_for(lambda: job.state() == "PENDING", 60, "the requeue")
        cluster.ask("scontrol", "update", f"JobId={job.number}", "ReqNodeList=")
        assert job.end() == "COMPLETED", job.story()
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert job.show()["NodeList"] == "n[1,3]"
    assert job.codes()[-1] == 0 and job.ends()[-1]["start_step"] >= 10


def test_scancel_ends_it_for_good(cluster, toys):
    job = toys("cancelled", TOY_STEPS="500")
    job.wait_for(lambda: job.heartbeat_step() >= 3, 60, "three steps")
    cluster.ask("scancel", job.number)
    assert job.end() == "CANCELLED", job.story()
    time.sleep(3)
    assert job.state() == "CANCELLED" and job.show()["Restarts"] == "0"
    assert job.codes() == [75]


def test_the_stop_file_ends_it_for_good(toys):
    job = toys("stopped", TOY_STEPS="500")
    job.wait_for(lambda: job.heartbeat_step() >= 3, 60, "three steps")
    (job.run / "stop").touch()
    assert job.end() == "FAILED", job.story()
    assert job.show()["ExitCode"] == "75:0" and "stopped by hand" in job.text()
    assert job.codes() == [75] and checkpoints(job)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ("--time=10", {}, "--time is 10:00, but saving begins 600 s before its end"),
        ("", {"DPO_RUN_DIR": ""}, "no run folder: a requeued job would not find its run"),
        ("", {"DPO_RUN_DIR": "/proc/no/folder"}, "run folder /proc/no/folder cannot be written"),
        ("", {"DPO_PROCS_PER_NODE": "2"}, "DPO_PROCS_PER_NODE=2, but the job has 1 GPUs a node"),
    ],
    ids=["time", "unset", "unwritable", "processes"],
)
def test_bad_input_is_refused_once(cluster, toys, options, environment, message):
    job = toys(f"refused{len(message)}", options, **environment)
    assert job.end(30) == "FAILED", job.story()
    assert job.show()["ExitCode"] == "2:0" and job.show()["Restarts"] == "0"
    assert f"error: {message}" in job.text()


def test_more_gpus_than_a_node_has_are_refused_by_sbatch(cluster):
    result = cluster.run("sbatch", "--nodes=1", "--gpus-per-node=9", SCRIPT, DPO_RUN_DIR="/x")
    assert result.returncode != 0 and "node configuration is not available" in result.stderr


def test_the_container_gets_what_the_job_needs(cluster, toys):
    if "fakepyxis" not in (cluster.root / "etc" / "plugstack.conf").read_text():
        pytest.skip("no C compiler or slurm/spank.h to build the container plugin with")
    image, data = cluster.root / "image.sqsh", cluster.root / "data"
    image.touch()
    data.mkdir()
    mounts = {"DPO_CONTAINER_IMAGE": str(image), "DPO_CONTAINER_MOUNTS": f"{data}:/data:ro"}
    job = toys("contained", **mounts)
    assert job.end() == "COMPLETED", job.story()
    seen = job.launches()[0][0]["env"]
    assert seen["FAKE_CONTAINER_IMAGE"] == str(image)
    repository, run, given = seen["FAKE_CONTAINER_MOUNTS"].split(",")
    assert repository == f"{REPOSITORY}:{REPOSITORY}" and run == f"{job.run}:{job.run}"
    assert given == f"{data}:/data:ro"
    assert seen["FAKE_CONTAINER_WORKDIR"] == str(REPOSITORY)


def test_time_limits_are_lived_through(jobs):
    """Last: it has been running all the time."""
    job = jobs["limit"]
    assert job.end(150) == "COMPLETED", job.story()
    codes = job.codes()
    assert len(codes) >= 3 and codes == [75] * (len(codes) - 1) + [0]
    assert goes_on(job) and "failure" not in job.text()
    assert int(job.show()["Restarts"]) == len(codes) - 1


def test_ranks_that_do_not_save_are_ended_before_the_limit(jobs):
    job = jobs["deaf"]
    assert job.end() == "COMPLETED", job.story()
    assert "not ended 13 s after USR1: stacks to" in job.text()
    assert job.codes() == [None, 0] and job.ends()[1]["start_step"] == 5
    assert job.show()["Restarts"] == "1"
