"""Stands for torchrun and a trainer of one process a node: the trainer's own lifecycle, no torch.

Like the trainer it hears signals and the stop file, rewrites the heartbeat, saves checkpoints and
leaves exit.json and finished.json; like torchrun it ends with 1 for every code. Behaviour:
    TOY_STEPS, TOY_STEP_S, TOY_SAVE_EVERY
    TOY_FAULT   error | killed | hang | data, "@", the step (+N: after the one it began from)
    TOY_FAULTS  in how many attempts; the later ones are well
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from reinforcer_tp.checkpoint_folder import CheckpointError, list_checkpoints
from reinforcer_tp.lifecycle.ending import leave
from reinforcer_tp.lifecycle.stops import Stopped, Stops

ALONE = SimpleNamespace(world_size=1)


def main(words: list[str]) -> int:
    given = [word[2:] for word in words if word.startswith(("--nnodes=", "--node-rank="))]
    options = dict(word.split("=", 1) for word in given)
    rank, num_nodes = int(options["node-rank"]), int(options["nnodes"])
    [script] = [n for n, word in enumerate(words) if word.endswith(".py")]
    if words[script].endswith("allreduce.py"):
        return play_all_reduce(Path(words[script + 1]))
    run = Path(next(w for w in reversed(words) if w.startswith("logger.log_dir=")).split("=", 1)[1])
    about = {"words": words, "host": socket.gethostname(), "env": dict(os.environ)}
    (run / "slurm" / f"launch.{os.environ.get('SLURM_RESTART_COUNT', 0)}.{rank}.json").write_text(
        json.dumps(about)
    )
    if rank > 0:
        return wait_for_rank_zero(run)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(num_nodes), "LOCAL_RANK": "0"}
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    stops = Stops()
    code = train(run, stops)
    stops.ignore()
    leave(1 if code else 0)
    return 0


def play_all_reduce(folder: Path) -> int:
    node = os.environ["SLURMD_NODENAME"]
    is_first_start = "SLURM_RESTART_COUNT" not in os.environ
    if "TOY_NO_ALL_REDUCE" in os.environ and is_first_start and os.environ["SLURM_NODEID"] == "0":
        return 1
    for part in ("local", "all"):
        (folder / f"{node}.{part}").touch()
    return 0


def wait_for_rank_zero(run: Path) -> int:
    before = int(os.environ["DPO_LAST_ATTEMPT"])
    while True:
        for path in run.glob("attempts/*/exit.json"):
            if int(path.parent.name) > before:
                return int(json.loads(path.read_text())["code"] != 0)
        time.sleep(0.1)


def train(run: Path, stops: Stops) -> int:
    try:
        steps(run, stops)
    except Stopped as stopped:
        stops.position.saved_step = stopped.step
        return stops.ending.stopped(str(stopped))
    except Exception as error:
        return stops.ending.failed(error)
    return stops.ending.done()


def steps(run: Path, stops: Stops) -> None:
    total, every = int(os.environ["TOY_STEPS"]), int(os.environ["TOY_SAVE_EVERY"])
    stops.open_run(run, None)
    stops.phase("load")
    start = max(list_checkpoints(run / "checkpoints"), default=0)
    attempt = int(stops.ending.attempt.folder().name)
    kind, _, place = os.environ.get("TOY_FAULT", "none@0").partition("@")
    fault_step = int(place) + start * place.startswith("+")
    if attempt > int(os.environ.get("TOY_FAULTS", "99")):
        kind = "none"
    stops.begin_loop(start)
    stops.phase("step")
    for step in range(start + 1, total + 1):
        time.sleep(float(os.environ["TOY_STEP_S"]))
        if step == fault_step:
            fail(kind)
        stops.step(step)
        reason = stops.agree(ALONE)
        if reason or step % every == 0:
            saved = run / "checkpoints" / f"step_{step}"
            saved.mkdir(parents=True, exist_ok=True)
            stops.saved(step, 0.0)
        if reason:
            raise Stopped(reason, step=step, total_steps=total, saved=saved)
    stops.end_loop()
    (run / "finished.json").write_text(json.dumps({"steps": total}))


def fail(kind: str) -> None:
    if kind == "error":
        raise RuntimeError("the toy's error")
    if kind == "data":
        raise CheckpointError("the toy's checkpoint is damaged")
    if kind == "killed":
        os._exit(1)
    while kind == "hang":
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
