"""What is measured of fake ranks, against Hugging Face's parameters, Megatron's own schedules and
formulas written down here."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reinforcer_tp.config import load_config
from reinforcer_tp.hf_files import config_of
from reinforcer_tp.loop import loss_function
from reinforcer_tp.mcore.model import build_model
from reinforcer_tp.mcore.optim import build_training
from reinforcer_tp.mcore.schedule import forward_backward, open_stage
from reinforcer_tp.mcore.shape import model_shape
from reinforcer_tp.plan.layout import layout_of
from reinforcer_tp.plan.memory import rank_memory
from reinforcer_tp.plan.meter import Meter
from reinforcer_tp.plan.pipeline import duration_s, peak_held, units
from reinforcer_tp.plan.probe import fake_stage, probe_rank
from reinforcer_tp.plan.rows import Assumed, assumed_pairs, rows_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a fake rank needs no CUDA")
ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1001,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def opened(hf_config, world_size, *overrides, pairs=None):
    """(config, layout, rows) of a model whose rows are assumed."""
    config = load_config(
        str(ROOT / "configs" / "dpo_llama70b.yaml"),
        ["policy.micro_batch_tokens=1024", "policy.max_total_sequence_length=512",
         "policy.train_global_batch_size=32", f"cluster.num_nodes={max(world_size // 8, 1)}",
         f"cluster.gpus_per_node={min(world_size, 8)}", *overrides],
    )  # fmt: skip
    config.validate(world_size)
    shape = model_shape(hf_config)
    layout = layout_of(config, shape.num_layers, world_size, 8)
    lengths = Assumed(prompt_tokens=60, response_tokens=50, num_pairs=200)
    rows = rows_of(config, shape, layout, assumed_pairs(lengths, 512))
    return config, layout, rows


def sizes(tp=1, pp=1, **more):
    keys = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} | more
    keys.setdefault("sequence_parallel", str(tp > 1).lower())
    return [f"policy.megatron_cfg.{key}={value}" for key, value in keys.items()]


def expected_elements(hf_config, tp: int, layers: range, *, first: bool, last: bool) -> int:
    """Of one rank, by the names of Hugging Face's tensors: what is split, what is whole."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    total = 0
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts and int(parts[parts.index("layers") + 1]) not in layers:
            continue
        is_embedding, is_head = "embed_tokens" in parts, "lm_head" in parts
        if (is_embedding and not first) or (is_head and not last):
            continue
        if parts[-2] == "norm" and not last:
            continue
        if is_embedding or is_head:
            total += math.ceil(tensor.shape[0] / tp) * tensor.shape[1]
        elif parts[-2] in SPLIT and not (parts[-1] == "bias" and parts[-2] == "o_proj"):
            assert tensor.numel() % tp == 0
            total += tensor.numel() // tp
        else:
            total += tensor.numel()
    return total


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem.split("--")[1])
def test_parameter_bytes_are_exact(path):
    """Every stage of every shape, against the tensors that transformers would make."""
    hf_config = config_of(json.loads(path.read_text()), path)
    tp, pp = (8, 4) if hf_config.hidden_size >= 8192 else (4, 2)
    hf_config.num_hidden_layers = 2 * pp
    config, layout, rows = opened(hf_config, 2 * tp * pp, *sizes(tp, pp))
    if hf_config.tie_word_embeddings:
        pytest.skip("tied: counted in test_tied_weights_stand_on_both_ends")
    for rank in (0, 1, pp - 1):
        work = probe_rank(config, hf_config, layout, rank, rows.longest, None, on_gpu=True)
        expected = expected_elements(
            hf_config,
            tp,
            range(2 * rank, 2 * rank + 2),
            first=rank == 0,
            last=rank == pp - 1,
        )
        assert work.num_parameters == expected
        assert work.parameter_bytes == 2 * expected  # bfloat16
        assert abs(work.gradient_bytes - 4 * expected) <= 4 * 256 * len(layout.stage_layers)
        # float32 masters and two moments, over two data-parallel ranks
        assert work.optimizer_bytes == pytest.approx(12 * expected / 2, rel=1e-3)


def test_tied_weights_stand_on_both_ends():
    hf_config = config_of(SMALL | {"tie_word_embeddings": True}, Path("config.json"))
    config, layout, rows = opened(hf_config, 2, *sizes(1, 2))
    works = [
        probe_rank(config, hf_config, layout, rank, rows.longest, None, on_gpu=True)
        for rank in range(2)
    ]
    embedding = SMALL["vocab_size"] * SMALL["hidden_size"]
    with torch.device("meta"):
        whole = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf_config).parameters())
    assert sum(work.num_parameters for work in works) == whole + embedding


def test_flops_are_those_of_the_weights():
    """2 a weight and token forward, twice that backward, and forward again where it recomputes."""
    hf_config = config_of(SMALL, Path("config.json"))
    for recompute, times in (("true", 6), ("false", 4)):
        options = sizes(1, 2, activation_checkpointing=recompute)
        config, layout, rows = opened(hf_config, 2, *options)
        work = probe_rank(config, hf_config, layout, 0, rows.longest, None, on_gpu=True)
        d, f, kv = 256, 704, 4 * 32
        weights = 4 * (2 * d * d + 2 * d * kv + 3 * d * f)  # of four layers
        tokens = len(rows.longest.tokens)
        [chunk] = work.chunks
        assert chunk.forward.flops == 2 * weights * tokens
        assert chunk.backward.flops == times * weights * tokens


@pytest.mark.parametrize(
    "world_size, options, num_micro_batches",
    [
        (1, sizes(1, 1), 3),
        (4, sizes(1, 4), 6),
        (4, sizes(1, 4, activation_checkpointing="false"), 6),
        (4, sizes(1, 4, virtual_pipeline_model_parallel_size=2), 8),
        (4, sizes(2, 2, virtual_pipeline_model_parallel_size=2), 4),
    ],
    ids=["pp1", "pp4", "pp4-kept", "pp4-vpp2", "tp2-pp2-vpp2"],
)
def test_peak_is_that_of_megatrons_schedule(world_size, options, num_micro_batches):
    """One micro-batch at a time and the order of pipeline.py give what the real schedule holds."""
    hf_config = config_of(SMALL, Path("config.json"))
    config, layout, rows = opened(hf_config, world_size, *options)
    for rank in range(layout.pp_size):
        work = probe_rank(config, hf_config, layout, rank, rows.longest, None, on_gpu=True)
        predicted = rank_memory(work, layout, num_micro_batches).moments["forward and backward"]
        scheduled = measured_by_schedule(config, hf_config, layout, rank, rows, num_micro_batches)
        static = work.parameter_bytes + work.gradient_bytes + work.optimizer_bytes
        assert 0.97 < (predicted - static) / scheduled < (1.03 if layout.vpp_size == 1 else 1.1)


def measured_by_schedule(config, hf_config, layout, rank, rows, count) -> int:
    """Bytes over what the step began with, of Megatron's own forward and backward."""
    with fake_stage(layout, rank, on_gpu=True) as topology, Meter() as meter:
        model = build_model(hf_config, config.policy, topology)
        training = build_training(model, config.policy, topology, total_steps=10)
        stage = open_stage(model, config.policy, topology)
        stage = dataclasses.replace(stage, modules=training.ddp)
        with meter.measure() as work:
            forward_backward(stage, [rows.longest] * count, loss_function(config))
        return work.peak_bytes


@pytest.mark.parametrize("pp, count", [(1, 4), (2, 4), (4, 8), (4, 2)])
def test_bubble_of_1f1b(pp, count):
    """(m + p - 1) (f + b): arXiv:2104.04473, section 2.2."""
    layout = dataclasses.replace(a_layout(), pp_size=pp)
    seconds = [[(1.0, 2.0)]] * pp
    assert duration_s(layout, count, seconds, 0.0) == pytest.approx((count + pp - 1) * 3.0)


@pytest.mark.parametrize("pp, vpp, count", [(2, 2, 4), (4, 2, 8), (4, 4, 16)])
def test_bubble_of_the_interleaved_schedule(pp, vpp, count):
    """The bubble is 1 / vpp of 1F1B's: (p - 1) (f + b) / v with f, b of all of a rank's chunks."""
    layout = dataclasses.replace(a_layout(), pp_size=pp, vpp_size=vpp)
    seconds = [[(1.0 / vpp, 2.0 / vpp)] * vpp] * pp
    expected = count * 3.0 + (pp - 1) * 3.0 / vpp
    assert duration_s(layout, count, seconds, 0.0) == pytest.approx(expected)


def test_messages_delay_the_next_stage():
    layout = dataclasses.replace(a_layout(), pp_size=2)
    # forward, message, forward + backward, message, backward
    assert duration_s(layout, 1, [[(1.0, 2.0)]] * 2, 0.25) == pytest.approx(1 + 0.25 + 3 + 0.25 + 2)


@pytest.mark.parametrize("pp, vpp, count", itertools.product((1, 2, 4), (1, 2), (4, 8)))
def test_every_unit_is_done_once(pp, vpp, count):
    if pp == 1 and vpp > 1:
        return
    layout = dataclasses.replace(a_layout(), pp_size=pp, vpp_size=vpp)
    for rank in range(pp):
        order = list(units(layout, rank, count))
        assert len(order) == len(set(order)) == 2 * vpp * count
        assert peak_held(order, [1] * vpp, [(1, 0)] * vpp) <= vpp * count


def a_layout():
    hf_config = config_of(SMALL, Path("config.json"))
    return opened(hf_config, 1, *sizes())[1]
