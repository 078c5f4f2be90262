"""The 70B configuration's train step on 64 ranks, on the paths of a GPU, with fake tensors.

Real are the configuration that ships, rows with shared prompts, the model, Megatron's schedule, the
operator's shape rules, loss, DDP and optimizer; only numbers are missing. So shapes, dtypes and
groups are tested for every role that a rank may have, and every place where the host waits for the
device is found: a fake tensor has no value to give.
"""

import json
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaConfig

from reinforcer_tp.config import Config, load_config
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL = json.loads((CONFIGS / "models/meta-llama--Llama-3.3-70B-Instruct.json").read_text())
WORLD, PAIRS = 64, 24
MEGATRON = "policy.megatron_cfg"
SHIPPED = ("cluster.gpus_per_node=8", "cluster.num_nodes=8")
# Where the host waits in the optimizer's step: (file, function) -> what it gets to hear. The first
# two are Megatron's; the second is float16's, the third decides whether all ranks take the step.
WAITS = {
    ("clip_grads.py", "get_grad_norm_fp32"): 2.0,
    ("optimizer.py", "_unscale_main_grads_and_check_for_nan"): 0.0,
    ("topology.py", "any_rank"): 0.0,
}
NORM, FOUND_INF, ANY_RANK = WAITS
VARIANTS = {
    "as it ships": (),
    "recompute": (f"{MEGATRON}.activation_checkpointing=true",),
    "interleaved": (f"{MEGATRON}.virtual_pipeline_model_parallel_size=2",),
    "plain optimizer": (f"{MEGATRON}.optimizer.use_distributed_optimizer=false",),
    "float16": ("policy.precision=float16",),
}


def config_of(overrides=()) -> Config:
    config = load_config(str(CONFIGS / "dpo_llama70b.yaml"), [*SHIPPED, *overrides])
    config.validate(WORLD)
    return config


def roles(*, crossed: bool) -> list[int]:
    """Ranks: the first, a middle and the last stage, each with both ends of the other two axes;
    not `crossed`: with both first or both last."""
    megatron = config_of().policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    dp = WORLD // (tp * pp)
    ends = product((0, dp - 1), (0, tp - 1)) if crossed else ((0, 0), (dp - 1, tp - 1))
    return [
        tp_rank + tp * (dp_rank + dp * pp_rank)
        for pp_rank, (dp_rank, tp_rank) in product((0, pp // 2, pp - 1), ends)
    ]


def few_layers(overrides=()) -> int:
    """Two for every chunk."""
    megatron = config_of(overrides).policy.megatron_cfg
    return 2 * megatron.pipeline_model_parallel_size * megatron.virtual_stages


def make_pairs() -> TokenizedSet:
    generator = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return generator.integers(0, MODEL["vocab_size"], count).tolist()

    return TokenizedSet.from_pairs(
        TokenizedPair(prompt=ids(p), chosen=ids(c), rejected=ids(r), row=row)
        for row, (p, c, r) in enumerate(generator.integers(20, 1500, (PAIRS, 3)))
    )


class Collectives(TorchDispatchMode):
    """Sizes of what is gathered and scattered fit their group."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.c10d._allgather_base_.default,
            torch.ops.c10d._reduce_scatter_base_.default,
        ):
            out, given, group = args[:3]
            whole, part = sorted((out.numel(), given.numel()), reverse=True)
            assert whole == part * dist.ProcessGroup.unbox(group).size(), (func, whole, part)
        return func(*args, **(kwargs or {}))


class Reads:
    """Every read of a value: in which phase of the step, by which file and function."""

    def __init__(self):
        self.phase, self.found = "build", []

    def __call__(self, operator):
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        place = [f for f in frames if f.name not in ("__call__", "__torch_dispatch__")][-1]
        where = (Path(place.filename).name, place.name)
        self.found.append((self.phase, *where))
        return WAITS.get(where, 0.0)


@contextmanager
def opened(rank: int, num_layers: int, overrides=()):
    """(config, topology, stage, training, reads) on one rank."""
    from reinforcer_tp.mcore.fake_cluster import fake_rank
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training
    from reinforcer_tp.mcore.schedule import open_stage

    config, reads = config_of(overrides), Reads()
    policy, megatron = config.policy, config.policy.megatron_cfg
    hf_config = LlamaConfig(**MODEL | {"num_hidden_layers": num_layers})
    hf_config.architectures = ["LlamaForCausalLM"]
    with fake_rank(
        rank=rank,
        world_size=WORLD,
        tp_size=megatron.tensor_model_parallel_size,
        pp_size=megatron.pipeline_model_parallel_size,
        vpp_size=megatron.virtual_stages,
        on_gpu=True,
        read=reads,
    ) as topology, Collectives():  # fmt: skip
        model = build_model(hf_config, policy, topology)
        training = build_training(model, policy, topology, total_steps=10)
        stage = replace(open_stage(model, policy, topology), modules=training.ddp)
        yield config, topology, stage, training, reads


def cut_batches(config, topology, model):
    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.micro_batches import micro_batches

    pairs = make_pairs()

    def reference(index: int) -> np.ndarray:
        return np.zeros(len(pairs[index].chosen) + len(pairs[index].rejected))

    known = reference if topology.is_last_stage else None
    with _disable_current_modes():  # packing is the host's work
        cut = micro_batching(config, model.shape, topology)
        return micro_batches(pairs, range(PAIRS), cut, known).batches


def train_step(rank: int, num_layers: int, overrides=()) -> dict:
    """One step, in a process of its own; what there is to see of it."""
    from reinforcer_tp.loop import SUMS, local_sums, loss_function
    from reinforcer_tp.mcore.optim import current_lr, gather_weights, optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import forward_backward, reduce_metrics

    with opened(rank, num_layers, overrides) as (config, topology, stage, training, reads):
        batches = cut_batches(config, topology, stage.model)
        reads.phase = "forward and backward"
        zero_grad(training)
        reports = forward_backward(stage, batches, loss_function(config))
        reads.phase = "optimizer"
        before = current_lr(training)
        updated, norm = optimizer_step(training)
        gather_weights(training)
        reads.phase = "metrics"
        reduce_metrics(local_sums(reports), SUMS, topology)
        parameters = dict(stage.model.named_parameters())
        return {
            "reads": set(reads.found),
            "updated": updated and current_lr(training) != before,
            "norm": norm,
            "num_reports": len(reports),
            "row_lengths": {len(batch.tokens) for batch in batches},
            "num_batches": len(batches),
            "shares": all(b.kv_index is not None for b in batches if b.rows),
            "parameters": {name: tuple(p.shape) for name, p in parameters.items()},
            "main_grads": {
                n: (tuple(p.main_grad.shape), p.main_grad.dtype) for n, p in parameters.items()
            },
        }


def waits_on_purpose(rank: int, num_layers: int) -> set:
    """Reads of a loss that asks for values, in a step that is otherwise as above."""
    from reinforcer_tp.loop import loss_function
    from reinforcer_tp.mcore.schedule import forward_backward

    with opened(rank, num_layers) as (config, topology, stage, _, reads):
        loss = loss_function(config)

        def curious(logps, entropies, batch):
            assert not bool(logps.isnan().any())
            (logps > 0).nonzero()
            return loss(logps, entropies, batch)

        forward_backward(stage, cut_batches(config, topology, stage.model), curious)
        return set(reads.found)


@pytest.fixture(scope="module")
def apart():
    """Calls a function in a process without CUDA and process groups."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_hide_gpus) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _hide_gpus():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def expected_parameters(pp_rank: int, tp: int, pp: int) -> int:
    """Of the 70.6 B, on a rank of an even pipeline."""
    hidden, head_dim = MODEL["hidden_size"], MODEL["head_dim"]
    heads, groups = MODEL["num_attention_heads"], MODEL["num_key_value_heads"]
    matrices = (
        hidden * head_dim * (2 * heads + 2 * groups) + 3 * hidden * MODEL["intermediate_size"]
    )
    count = MODEL["num_hidden_layers"] // pp * (matrices // tp + 2 * hidden)
    count += MODEL["vocab_size"] // tp * hidden * ((pp_rank == 0) + (pp_rank == pp - 1))
    return count + hidden * (pp_rank == pp - 1)


def check_step(found: dict, rank: int, overrides=()) -> None:
    policy = config_of(overrides).policy
    megatron = policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    waits = {NORM, ANY_RANK} | ({FOUND_INF} if policy.precision == "float16" else set())
    seen = {(phase, *where) for phase, *where in found["reads"]}
    assert {read for read in seen if read[0] == "build"} == set()
    assert {read for read in seen if read[0] == "forward and backward"} == set()
    assert {read[1:] for read in seen if read[0] == "optimizer"} == waits
    is_last = rank // (WORLD // pp) == pp - 1
    metrics = {("schedule.py", "reduce_metrics")} | (
        {("loop.py", "local_sums")} if is_last else set()
    )
    assert {read[1:] for read in seen if read[0] == "metrics"} == metrics
    assert found["updated"] and found["norm"] == pytest.approx(2.0**0.5)
    assert found["num_reports"] == (found["num_batches"] if is_last else 0)
    assert found["num_batches"] > 1 and found["shares"]
    [length] = found["row_lengths"]
    assert length % tp == 0 and 1000 < length <= policy.micro_batch_tokens
    for name, shape in found["parameters"].items():
        assert found["main_grads"][name] == (shape, torch.float32), name


@pytest.mark.parametrize("rank", roles(crossed=False)[::2])
def test_each_stage_of_the_configuration_that_ships(apart, rank):
    """With all its layers; a stage's other roles have fewer, below."""
    found = apart(train_step, rank, MODEL["num_hidden_layers"])
    check_step(found, rank)
    megatron = config_of().policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    count = sum(int(np.prod(shape)) for shape in found["parameters"].values())
    assert count == expected_parameters(rank // (WORLD // pp), tp, pp)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_role_with_fewer_layers_and_other_keys(apart, variant):
    overrides = VARIANTS[variant]
    num_layers = few_layers(overrides)
    for rank in roles(crossed=not overrides):
        check_step(apart(train_step, rank, num_layers, overrides), rank, overrides)


def test_a_wait_for_the_device_is_found(apart):
    """And what the step above may not do: ask for a value in the loss."""
    found = apart(waits_on_purpose, WORLD - 1, few_layers())
    assert found == {("build", "test_whole_gpu_path.py", "curious")}
