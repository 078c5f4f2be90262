"""Pipeline layouts as cases: what a spawned rank runs, and transformers' answers to compare with.

All layouts run in one set of four processes, since imports cost most.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcer_tp.config import (
    Config,
    DistributedDataParallelConfig,
    DPOConfig,
    MegatronConfig,
    OptimizerConfig,
    PolicyConfig,
    SchedulerConfig,
)
from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.tokenized import TokenizedPair
from tests.distributed.judge import sequence_logps

WORLD = 4
BETA, LR, DECAY, CLIP = 0.3, 0.01, 0.1, 0.05
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 128,
}
MODELS = {  # name -> (layers, tied)
    "four": (4, False),
    "five_tied": (5, True),
    "eight": (8, False),
}
FULL = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing": True, "recompute_granularity": "selective"}
MLP = SELECTIVE | {"recompute_modules": ["mlp", "core_attn"]}
BLOCK = FULL | {"recompute_method": "block"}
UNITS = FULL | {"recompute_num_layers": 2}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
_groups: dict = {}  # of a spawned rank: (tp, pp) -> the topology whose groups exist


def ends(first: int | None, last: int | None) -> dict:
    return {
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }


def layout(text: str) -> dict:
    return {"pipeline_model_parallel_layout": text}


CASES = {  # name -> (model, tp, pp, keys of policy.megatron_cfg); dp is what is left of 4
    "pp2_full": ("four", 1, 2, FULL),
    "pp2_selective": ("four", 1, 2, SELECTIVE),
    "pp2_mlp": ("four", 1, 2, MLP),
    "pp2_block": ("four", 1, 2, BLOCK),
    "pp2_units": ("four", 1, 2, UNITS),
    "vpp2": ("four", 1, 2, VIRTUAL),
    "vpp2_full": ("four", 1, 2, VIRTUAL | FULL),
    "vpp2_selective": ("four", 1, 2, VIRTUAL | SELECTIVE),
    "first_tied": ("five_tied", 1, 2, ends(3, None)),
    "first_vpp2": ("eight", 1, 2, VIRTUAL | ends(2, None)),
    "first_last_vpp2": ("eight", 1, 2, VIRTUAL | ends(6, 2)),
    "layout_tied": ("five_tied", 1, 2, layout("Et|tttt,L")),
    "layout_vpp2_tied": ("five_tied", 1, 2, layout("Et|tt|t|tL")),
    "layout_vpp3": ("eight", 1, 2, layout("E|t|(tt|)*2t|ttL")),
    "first_last_pp4": ("eight", 1, 4, ends(1, 3)),
    "vpp2_pp4": ("eight", 1, 4, VIRTUAL),
    "vpp2_block_sp": ("eight", 2, 2, VIRTUAL | BLOCK | SP),
    "vpp2_units_sp": ("eight", 2, 2, VIRTUAL | UNITS | SP),
    "vpp2_mlp_sp": ("four", 2, 2, VIRTUAL | MLP | SP),
    "vpp2_sp": ("four", 2, 2, VIRTUAL | SP),
    "layout_bare_loss_tied": ("five_tied", 1, 2, layout("Ettt|t|t|L") | FULL),
    "layout_vpp2_sp_full_tied": ("five_tied", 2, 2, layout("E|tt|t|ttL") | FULL | SP),
}
# Micro-batches by data-parallel size, [dp_rank][micro-batch] -> pairs; some are only padding.
PLANS = {
    1: [[[0], [1], [], [2], [3], [4], [5], []]],
    2: [[[0], [1], [], [2]], [[3], [4, 5], [], []]],
}


def make_pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(0, SHAPE["vocab_size"], (count,), generator=generator).tolist()

    sizes = [(5, 9, 4), (12, 7, 11), (1, 1, 2), (3, 14, 1), (7, 6, 6), (2, 3, 8)]
    return [
        TokenizedPair(prompt=ids(p), chosen=ids(c), rejected=ids(r), weight=1.0, row=i)
        for i, (p, c, r) in enumerate(sizes)
    ]


def reference_logps(pair: TokenizedPair) -> torch.Tensor:
    """Made-up log-probs (C + R,) of the reference model."""
    places = torch.arange(len(pair.chosen) + len(pair.rejected))
    return -4 + torch.sin(1.7 * places + pair.row)


def config_of(tp: int, pp: int, keys: dict, *, sharded: bool = False) -> Config:
    """Only a sharded optimizer leaves ranks without whole gradients."""
    return Config(
        policy=PolicyConfig(
            model_name="unused",
            precision="float32",
            max_grad_norm=CLIP,
            megatron_cfg=MegatronConfig(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                optimizer=OptimizerConfig(
                    lr=LR, min_lr=LR, weight_decay=DECAY, use_distributed_optimizer=sharded
                ),
                scheduler=SchedulerConfig(lr_warmup_iters=0),
                distributed_data_parallel_config=DistributedDataParallelConfig(
                    overlap_grad_reduce=sharded
                ),
                **keys,
            ),
        ),
        dpo=DPOConfig(reference_policy_kl_penalty=BETA),
    )


def judge(name: str, folder: Path) -> dict:
    """Writes a random model to `folder`; transformers' log-probs, loss and gradients of it."""
    num_layers, tied = MODELS[name]
    torch.manual_seed(3)
    config = LlamaConfig(**SHAPE, num_hidden_layers=num_layers, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    logps, losses = {}, []
    for pair in make_pairs():
        found = [sequence_logps(model, pair.prompt, r) for r in (pair.chosen, pair.rejected)]
        ratios = torch.cat(found) - reference_logps(pair)
        chosen, rejected = ratios.split([len(pair.chosen), len(pair.rejected)])
        losses.append(-F.logsigmoid(BETA * (chosen.sum() - rejected.sum())))
        logps[pair.row] = torch.cat(found).detach()
    loss = torch.stack(losses).mean()
    loss.backward()
    return {
        "folder": str(folder),
        "logps": logps,
        "loss": loss.item(),
        "grads": {n: p.grad for n, p in model.named_parameters()},
    }


def run_cases(folders: dict[str, str], cases: dict, export_root: str) -> dict:
    """In one spawned rank: a checkpoint's round trip, then every case."""
    root = Path(export_root)
    _groups.clear()
    results = {"round_trip": round_trip(folders["four"], root / "checkpoints")}
    for name, (model_name, tp, pp, keys) in cases.items():
        config = config_of(tp, pp, keys)
        results[name] = run_case(config, folders[model_name], root / name)
    return results


def build(config, folder: str):
    """(topology, model, training, stage) with the folder's weights."""
    from transformers import AutoConfig

    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.schedule import open_stage
    from reinforcer_tp.mcore.weights import SafetensorsReader, load_weights

    topology = open_topology(config)
    model = build_model(AutoConfig.from_pretrained(folder), config.policy, topology)
    load_weights(model, SafetensorsReader(folder), topology)
    stage = open_stage(model, config.policy, topology)
    training = build_training(model, config.policy, topology, total_steps=10)
    return topology, model, training, stage


def open_topology(config):
    """Cases of equal sizes share process groups: gloo's threads outlive them and would add up."""
    from megatron.core import parallel_state

    from reinforcer_tp.mcore.topology import init_topology

    megatron = config.policy.megatron_cfg
    sizes = (megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size)
    vpp = megatron.virtual_stages
    if sizes not in _groups:
        parallel_state.destroy_model_parallel()
        _groups.clear()
        _groups[sizes] = init_topology(*sizes, vpp, seed=0)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp if vpp > 1 else None)
    return replace(_groups[sizes], vpp_size=vpp)


def make_batches(topology) -> list:
    pairs = make_pairs()
    return [
        build_packed_batch(
            [pairs[i] for i in members],
            reference_logps=[reference_logps(pairs[i]) for i in members],
            row_length=64,
        )
        for members in PLANS[topology.dp_size][topology.dp_rank]
    ]


def run_case(config, folder: str, export: Path) -> dict:
    from reinforcer_tp.loop import SUMS, loss_function
    from reinforcer_tp.mcore.optim import optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import forward_backward, forward_logps, reduce_metrics
    from reinforcer_tp.mcore.weights import export_hf, full_tensors

    topology, model, training, stage = build(config, folder)
    export_hf(model, topology, export, lambda folder: None)
    batches = make_batches(topology)
    logps = {}
    for batch, found in zip(batches, forward_logps(stage, batches), strict=False):
        counts = batch.response_lengths.view(-1, 2).sum(1).tolist()
        logps |= dict(zip(batch.rows, found.split(counts), strict=True))
    stage = replace(stage, modules=training.ddp)
    zero_grad(training)
    reports = forward_backward(stage, batches, loss_function(config))
    local = {n: sum(float(r[n]) for r in reports) for n in SUMS}
    sums = reduce_metrics(local, SUMS, topology)
    grads = whole(full_tensors(model, topology, of=lambda p: p.main_grad))
    _, norm = optimizer_step(training)
    head = model.head.output_layer.weight if topology.is_last_stage else None
    return {
        "logps": logps,
        "loss": sums["loss"] / sums["num_pairs"],
        "num_pairs": sums["num_pairs"],
        "grads": grads,
        "norm": norm,
        "stepped": whole(full_tensors(model, topology)),
        "head": None if head is None else (topology.tp_rank, head.detach().clone()),
    }


def whole(tensors) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in dict(tensors).items() if t is not None}


def steps_of(config, parts, count: int) -> dict[str, torch.Tensor]:
    """Trains `count` steps; the whole weights afterwards."""
    from reinforcer_tp.loop import loss_function
    from reinforcer_tp.mcore.optim import gather_weights, optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import forward_backward
    from reinforcer_tp.mcore.weights import full_tensors

    topology, model, training, stage = parts
    for _ in range(count):
        zero_grad(training)
        stage = replace(stage, modules=training.ddp)
        forward_backward(stage, make_batches(topology), loss_function(config))
        optimizer_step(training)
    gather_weights(training)
    return whole(full_tensors(model, topology))


def round_trip(folder: str, directory: Path) -> dict:
    """dp=2 x pp=2 x vpp=2: three plain steps; the same sharded, overlapped and interrupted."""
    from reinforcer_tp.mcore.checkpoint import CheckpointWriter
    from reinforcer_tp.mcore.restore import load_checkpoint
    from reinforcer_tp.mcore.weights import full_tensors

    config = config_of(1, 2, VIRTUAL)
    expected = steps_of(config, build(config, folder), 3)

    config = config_of(1, 2, VIRTUAL, sharded=True)
    parts = build(config, folder)
    topology, model, training, _ = parts
    assert training.ddp[0].ddp_config.overlap_param_gather
    steps_of(config, parts, 2)
    writer = CheckpointWriter(directory, topology, described={"layout": topology.layout()})
    writer.save(2, model, training, state={}, metrics={})
    saved = directory / "step_2"
    at_save = whole(full_tensors(model, topology)), optimizer_tensors(training)
    uninterrupted = steps_of(config, parts, 1)

    parts = build(config, folder)
    topology, model, training, _ = parts
    load_checkpoint(saved, model, training, topology)
    return {
        "expected": expected,
        "uninterrupted": uninterrupted,
        "at_save": at_save,
        "at_load": (whole(full_tensors(model, topology)), optimizer_tensors(training)),
        "resumed": steps_of(config, parts, 1),
    }


def optimizer_tensors(training) -> dict[str, torch.Tensor]:
    """Masters and moments of this rank, in Megatron's order, read from the inner optimizers."""
    parts = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    tensors = {}
    for part_index, part in enumerate(parts):
        for group_index, group in enumerate(part.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                state = {"parameter": parameter, **part.optimizer.state[parameter]}
                for name, value in state.items():
                    key = f"{part_index}.{group_index}.{index}.{name}"
                    tensors[key] = value.detach().clone()
    return tensors
