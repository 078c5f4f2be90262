"""A tiny run inside spawned ranks, to put numbers into it that are not finite."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.faultpoints import VARIABLE
from tests.distributed.layouts import VIRTUAL, build, config_of

NUM_PAIRS, BATCH, MICRO_BATCH = 32, 8, 2
LAYOUTS = {  # name -> (world size, tp, pp, keys of policy.megatron_cfg, sharded, precision)
    "one": (1, 1, 1, {}, False, "float32"),
    "tp2": (2, 2, 1, {}, False, "bfloat16"),
    "tp2_sp": (2, 2, 1, {"sequence_parallel": True}, False, "float32"),
    "pp2": (2, 1, 2, {}, False, "bfloat16"),
    "vpp2": (2, 1, 2, VIRTUAL, False, "float32"),
    "dp2": (2, 1, 1, {}, False, "float32"),
    "dp2_sharded": (2, 1, 1, {}, True, "bfloat16"),
    "float16": (1, 1, 1, {}, False, "float16"),
}


@dataclass
class Messages:
    """Stands for Progress: what every rank would say."""

    lines: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.lines.append(text)


def open_run(name: str, folder: str, **dpo):
    """loop.Run of the layout, with what train_step reads; `dpo` are keys of that section."""
    from reinforcer_tp.loop import PairSet, Run

    _, tp, pp, keys, is_sharded, precision = LAYOUTS[name]
    config = config_of(tp, pp, keys, sharded=is_sharded)
    policy = replace(
        config.policy,
        precision=precision,
        train_global_batch_size=BATCH,
        train_micro_batch_size=MICRO_BATCH,
    )
    keys = {"first_step_check": "off"} | dpo
    config = replace(config, policy=policy, dpo=replace(config.dpo, **keys))
    _, _, training, stage = build(config, folder)
    pairs = make_set()
    unused = {each.name: None for each in fields(Run) if each.default_factory is MISSING}
    used = {
        "config": config,
        "stage": replace(stage, modules=training.ddp),
        "training": training,
        "train_set": PairSet(pairs=pairs, reference=lambda i: made_up_reference(pairs, i)),
        "progress": Messages(),
        "stops": SimpleNamespace(phase=lambda name: None, tick=lambda: None),
        "sweep_s": 0.0,
        "sweep_tokens": 0,
        "starts_at_reference": False,
    }
    return Run(**unused | used)


def make_set():
    from reinforcer_tp.data.tokenized import TokenizedSet

    random = np.random.default_rng(5)
    lengths = random.integers(1, 9, (NUM_PAIRS, 3)).astype(np.int32)
    tokens = random.integers(0, 67, int(lengths.sum())).astype(np.int32)
    weights = np.ones(NUM_PAIRS, np.float32)
    return TokenizedSet(tokens, lengths, weights, 100 + np.arange(NUM_PAIRS))


def made_up_reference(pairs, index: int) -> np.ndarray:  # (C + R,)
    return -4 + np.sin(1.7 * np.arange(int(pairs.lengths()[index, 1:].sum())) + index)


def micro_batches_of(run, step: int):
    """This rank's PackedBatch of each micro-batch."""
    from reinforcer_tp.batches import train_rows
    from reinforcer_tp.loop import _cut

    return _cut(run, run.train_set, train_rows(run.config, NUM_PAIRS, step)).batches


def state(run) -> dict[str, str]:
    """Name -> digest of the bytes: weights, masters, both moments, steps, rate. Collective."""
    from reinforcer_tp.mcore.optim import gather_weights

    gather_weights(run.training)  # else the last step's are on their way still
    found = {f"{i} {n}": p.data for i, n, p in parameters(run)}
    chained = getattr(run.training.optimizer, "chained_optimizers", [run.training.optimizer])
    for i, part in enumerate(chained):
        for j, group in enumerate(part.optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                found[f"optimizer {i} {j} {k} master"] = parameter.data
                for name, value in part.optimizer.state[parameter].items():
                    found[f"optimizer {i} {j} {k} {name}"] = torch.as_tensor(value)
            found[f"optimizer {i} {j} step"] = torch.as_tensor(group.get("step", 0))
            found[f"optimizer {i} {j} lr"] = torch.tensor(group["lr"])
    return {name: digest(tensor) for name, tensor in found.items()}


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]


def parameters(run) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
    for index, chunk in enumerate(run.training.ddp):
        for name, parameter in chunk.module.named_parameters():
            yield index, name, parameter


@contextlib.contextmanager
def armed(text: str | None) -> Iterator[None]:
    """REINFORCER_TP_FAULTS of this rank alone, without the line that says so."""
    if text is not None:
        os.environ[VARIABLE] = text
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        os.environ.pop(VARIABLE, None)


def try_step(run, step: int, fault: str | None = None) -> tuple[str, dict[str, float]]:
    """(what a failed or skipped step said, "" = nothing; its metrics). Collective."""
    from reinforcer_tp.loop import train_step
    from reinforcer_tp.nonfinite import NonFiniteError

    run.progress.lines.clear()
    with armed(fault):
        try:
            metrics = train_step(run, step, is_first=False)
        except NonFiniteError as error:
            return str(error), {}
    return "\n".join(run.progress.lines), metrics


def last_stage_ranks(run) -> list[int]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, run.stage.topology.is_last_stage)
    return [rank for rank, is_last in enumerate(everyone) if is_last]
