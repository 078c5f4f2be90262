"""Checkpoints of every layout into every other one: weights, moments and the next loss.

Each layout trains two steps and saves. Each other one loads that, gathers weights and moments as
Hugging Face names and shapes them, and compares them bit for bit with what the first one gathered
before it saved; then both compute the loss of the same next batch.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcer_tp.data.packed_batch import build_packed_batch
from tests.distributed.layouts import (
    SHAPE,
    SP,
    VIRTUAL,
    build,
    config_of,
    ends,
    layout,
    make_pairs,
    reference_logps,
)
from tests.distributed.spawn import run_distributed

PAIRS = 100
# name -> (processes, tp, pp, keys of policy.megatron_cfg, distributed optimizer); dp is the rest
LAYOUTS = {
    "one": (1, 1, 1, {}, False),
    "dp2": (2, 1, 1, {}, False),
    "dp2_sharded": (2, 1, 1, {}, True),
    "tp2": (2, 2, 1, {}, False),
    "pp2_uneven": (2, 1, 2, ends(6, 2), False),
    "dp4_sharded": (4, 1, 1, {}, True),
    "tp4_sp": (4, 4, 1, SP, False),
    "pp4_vpp2": (4, 1, 4, VIRTUAL, False),
    "tp2_pp2_sp": (4, 2, 2, SP, False),
    "tp2_dp2_sp_sharded": (4, 2, 1, SP, True),
    "pp2_dp2_vpp2_sharded": (4, 1, 2, VIRTUAL, True),
    "pp2_dp2_layout": (4, 1, 2, layout("Ettt|ttttt,L"), False),
    "pp4_layout": (4, 1, 4, layout("E|tttt|tt|ttL"), False),
}
PLANS = {  # data-parallel size -> [dp_rank][micro-batch] -> pairs; some are only padding
    1: [[[0, 1], [2, 3], [], [4, 5]]],
    2: [[[0], [1, 2]], [[3, 4, 5], []]],
    4: [[[0, 1]], [[2]], [[3]], [[4, 5]]],
}
TOLERANCE = 1e-5


def run(budget: float, seed: int, folder: Path, failures: list[str]) -> dict[str, int | float]:
    """Budget 1.0: all ordered pairs of all layouts; less: some pairs, of four processes only."""
    folder.mkdir(parents=True)
    model = make_model(folder / "model")
    names = [n for n, (world, *_) in LAYOUTS.items() if budget >= 0.5 or world == 4]
    pairs = [(a, b) for a in names for b in names if a != b]
    wanted = len(pairs) if budget >= 1 else max(1, round(PAIRS * budget))
    pairs = random.Random(seed).sample(pairs, min(wanted, len(pairs)))
    sources = {source for source, _ in pairs}
    at_save: dict[str, dict] = {}
    for world in sorted({LAYOUTS[name][0] for name in sources}):
        saving = [name for name in sources if LAYOUTS[name][0] == world]
        found = run_distributed(save_all, world, model, sorted(saving), str(folder), timeout_s=300)
        at_save |= found[0]
    # Downwards: the processes that saved last are there already.
    for world in sorted({LAYOUTS[target][0] for _, target in pairs}, reverse=True):
        loading: dict[str, list[str]] = {}
        for source, target in sorted(pairs):
            if LAYOUTS[target][0] == world:
                loading.setdefault(target, []).append(source)
        found = run_distributed(load_all, world, model, loading, str(folder), timeout_s=600)
        failures += [f"{pair}: {wrong}" for rank in found for pair, wrong in rank["wrong"]]
        for pair, loss in found[0]["losses"].items():
            expected = at_save[pair.split(" -> ")[0]]["loss"]
            if not abs(loss - expected) <= TOLERANCE:
                failures.append(f"{pair}: next loss {loss}, expected {expected}")
    return {"layouts": len(names), "pairs of layouts": len(pairs)}


def make_model(folder: Path) -> str:
    """Eight layers, a tied embedding of 67 rows, which tensor parallelism pads."""
    torch.manual_seed(3)
    shape = SHAPE | {"num_key_value_heads": 4, "num_hidden_layers": 8, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**shape)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    return str(folder)


def save_all(model_folder: str, names: list[str], root: str) -> dict[str, dict]:
    """In a spawned rank: each layout trains two steps, says what it holds, saves; its next loss."""
    from reinforcer_tp.mcore.checkpoint import CheckpointWriter
    from reinforcer_tp.mcore.optim import gather_weights, optimizer_step

    forget_groups()
    results = {}
    for name in names:
        config, parts = open_layout(model_folder, name)
        topology, model, training, _ = parts
        for _ in range(2):
            loss_of(config, parts)
            assert optimizer_step(training)[0]
        gather_weights(training)
        save_gathered(parts, Path(root) / name)
        described = {"run": name, "layout": topology.layout()}
        writer = CheckpointWriter(Path(root) / name, topology, described=described)
        writer.save(2, model, training, state={"of": name}, metrics={})
        results[name] = {"loss": loss_of(config, parts)}
    return results


def load_all(model_folder: str, loading: dict[str, list[str]], root: str) -> dict:
    """In a spawned rank: each target loads its sources in turn; what differs, and the next loss."""
    from reinforcer_tp.mcore.restore import load_checkpoint

    forget_groups()
    wrong, losses = [], {}
    for target, sources in loading.items():
        config, parts = open_layout(model_folder, target)
        topology, model, training, _ = parts
        for source in sources:
            pair = f"{source} -> {target}"
            folder = Path(root) / source
            state = load_checkpoint(folder / "step_2", model, training, topology)
            assert state["of"] == source
            want = {}
            for path in folder.glob("gathered_*.safetensors"):
                want |= load_file(path)
            got = gathered(parts)
            wrong += [(pair, f"{n} differs") for n in got if not equal(got[n], want.get(n))]
            names: list = [None] * topology.world_size
            dist.all_gather_object(names, set(got))
            missing = want.keys() - set().union(*names)
            if missing:
                wrong.append((pair, f"{len(missing)} tensors are nowhere: {min(missing)}"))
            losses[pair] = loss_of(config, parts)
    return {"wrong": wrong, "losses": losses}


def equal(got: Tensor, want: Tensor | None) -> bool:
    """Bit for bit."""
    return want is not None and torch.equal(got.view(torch.int32), want.view(torch.int32))


def forget_groups() -> None:
    """Groups of an earlier call are gone with its default group."""
    from tests.distributed import layouts

    layouts._groups.clear()


def open_layout(model_folder: str, name: str):
    _, tp, pp, keys, sharded = LAYOUTS[name]
    config = config_of(tp, pp, keys, sharded=sharded)
    return config, build(config, model_folder)


def loss_of(config, parts) -> float:
    """Forward and backward of one global batch, the same in every layout; its mean loss."""
    from reinforcer_tp.loop import SUMS, local_sums, loss_function
    from reinforcer_tp.mcore.optim import zero_grad
    from reinforcer_tp.mcore.schedule import forward_backward, reduce_metrics

    topology, _, training, stage = parts
    pairs = make_pairs()
    batches = [
        build_packed_batch(
            [pairs[i] for i in members],
            reference_logps=[reference_logps(pairs[i]) for i in members],
            row_length=96,
        )
        for members in PLANS[topology.dp_size][topology.dp_rank]
    ]
    zero_grad(training)
    stage = replace(stage, modules=training.ddp)
    reports = forward_backward(stage, batches, loss_function(config))
    sums = reduce_metrics(local_sums(reports), SUMS, topology)
    return sums["loss"] / sums["num_pairs"]


def gathered(parts) -> dict[str, Tensor]:
    """kind:name -> whole tensor, of weights and both moments, where tp_rank = 0."""
    from reinforcer_tp.mcore.optimizer_state import MOMENTS, owned_parts
    from reinforcer_tp.mcore.weights import full_tensors

    topology, model, training, _ = parts
    owned_by = owned_parts(training)

    def local(kind: str):
        def pick(parameter: Tensor) -> Tensor:
            """The local tensor, put together over data parallelism where each holds a range."""
            whole = torch.zeros(parameter.numel(), dtype=torch.float32)
            owned = owned_by.get(parameter)
            is_whole = owned is not None and owned.stop - owned.start == parameter.numel()
            if owned is not None and (not is_whole or sharded or topology.dp_rank == 0):
                values = owned.main.detach() if kind == "main" else owned.state[kind]
                whole[owned.start : owned.stop] = values.reshape(-1)
            if topology.dp_size > 1:  # bits, since -0.0 + 0.0 is 0.0
                bits = whole.view(torch.int32)
                dist.all_reduce(bits, group=topology.dp_group)
            return whole.view(parameter.shape)

        return pick

    sharded = training.optimizer.config.use_distributed_optimizer
    found = {f"weight:{n}": t for n, t in full_tensors(model, topology) if t is not None}
    for kind in ("main", *MOMENTS):
        tensors = full_tensors(model, topology, of=local(kind))
        found |= {f"{kind}:{n}": t for n, t in tensors if t is not None}
    return {name: tensor.clone() for name, tensor in found.items()}


def save_gathered(parts, folder: Path) -> None:
    """One file for each pipeline stage, for those who load."""
    topology = parts[0]
    folder.mkdir(exist_ok=True)
    mine = gathered(parts)
    if topology.tp_rank == 0 and topology.dp_rank == 0:
        save_file(mine, folder / f"gathered_{topology.pp_rank}.safetensors")
        (folder / f"gathered_{topology.pp_rank}.json").write_text(json.dumps(sorted(mine)))
    dist.barrier()
