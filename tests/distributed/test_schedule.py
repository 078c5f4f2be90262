"""The contract with Megatron's schedule, random weights in every layout, and the optimizer step."""

import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from reinforcer_tp.config import load_config
from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.tokenized import TokenizedPair
from tests.distributed.spawn import run_distributed

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "architectures": ["LlamaForCausalLM"],
}


def make_pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 67, (count,), generator=generator).tolist()

    return [
        TokenizedPair(
            prompt=ids(3 + i), chosen=ids(2 + 3 * i), rejected=ids(6 - i), weight=w, row=i
        )
        for i, w in enumerate([1.0, 0.5, 0.0, 2.0])
    ]


def gradients(
    layout: tuple[int, int],
    plans: list[list[list[list[int]]]],
    precision: str,
    sequence_parallel: bool = False,
) -> list:
    """Gradients, metric sums and one step's norm for each plan [dp_rank][micro_batch][pair]."""
    from reinforcer_tp.loop import SUMS, loss_function
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training, optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import Stage, forward_backward, reduce_metrics
    from reinforcer_tp.mcore.topology import init_topology
    from reinforcer_tp.mcore.weights import RandomReader, full_tensors, load_weights

    topology = init_topology(*layout, seed=0)
    config = load_config(
        None,
        [
            "policy.model_name=unused",
            f"policy.precision={precision}",
            "policy.megatron_cfg.optimizer.use_distributed_optimizer=false",
            "policy.max_total_sequence_length=64",
            f"policy.megatron_cfg.sequence_parallel={sequence_parallel}",
            f"policy.megatron_cfg.pipeline_model_parallel_size={layout[1]}",
            "dpo.sft_loss_weight=0.3",
        ],
    )
    hf_config = LlamaConfig(**SHAPE)
    results = []
    for plan in plans:
        model = build_model(hf_config, config.policy, topology)
        load_weights(model, RandomReader(model.shape, seed=11), topology)
        training = build_training(model, config.policy, topology, total_steps=10)
        pairs = make_pairs()
        batches = [
            build_packed_batch(
                [pairs[i] for i in members],
                reference_logps=[
                    torch.full((len(pairs[i].chosen) + len(pairs[i].rejected),), -4.0)
                    for i in members
                ],
                row_length=96,
            )
            for members in plan[topology.dp_rank]
        ]
        stage = Stage(model=model, modules=training.ddp, topology=topology, kernel_impl="auto")
        zero_grad(training)
        reports = forward_backward(stage, batches, loss_function(config))
        local = {n: sum(float(r[n]) for r in reports) for n in SUMS}
        sums = reduce_metrics(local, SUMS, topology)
        whole = dict(full_tensors(model, topology, of=lambda p: p.main_grad))
        grads = {n: g.clone() for n, g in whole.items() if g is not None}
        updated, norm = optimizer_step(training)
        for _ in range(8 if precision == "float16" else 0):
            if not updated:  # the loss scale was too large, and is halved now
                zero_grad(training)
                forward_backward(stage, batches, loss_function(config))
                updated, norm = optimizer_step(training)
        assert updated
        results.append({"grads": grads, "sums": sums, "norm": norm})
    return results


def merged(ranks: list, index: int) -> dict[str, torch.Tensor]:
    return {n: g for rank in ranks for n, g in rank[index]["grads"].items()}


def test_a_micro_batch_leaves_memory_with_its_last_chunk():
    """Two chunks, the second one a few micro-batches behind, as in an interleaved pipeline."""
    from reinforcer_tp.mcore.schedule import _fan_out

    class Batch:
        pass

    made: list[weakref.ref] = []

    def batches():
        for _ in range(100):
            batch = Batch()
            made.append(weakref.ref(batch))
            yield batch

    def alive() -> int:
        return sum(ref() is not None for ref in made)

    first, second = _fan_out(batches(), 2)
    for _ in range(3):
        next(first)
    for _ in range(97):
        assert next(first) is made[-1]()
        assert next(second) is made[-4]()
        # Three that the second has not taken, and one in the hands of its maker.
        assert alive() <= 5
    assert len(list(second)) == 3 and list(first) == [] and len(made) == 100


ALL_AT_ONCE = [[[0, 1, 2, 3]]]
ONE_BY_ONE = [[[0], [1], [], [2], [3]]]
UNEVEN_RANKS = [[[3, 0], [2]], [[1], []]]  # dp=2: three pairs here, one and an empty one there


@pytest.fixture(scope="module")
def single() -> list:
    return run_distributed(gradients, 1, (1, 1), [ALL_AT_ONCE, ONE_BY_ONE], "float32")


def test_micro_batches_do_not_change_the_gradient(single):
    """Unequal and empty micro-batches: one division by the pairs of the global batch."""
    [results] = single
    assert results[0]["sums"]["num_pairs"] == results[1]["sums"]["num_pairs"] == 3  # weight 0
    for name, expected in results[0]["grads"].items():
        torch.testing.assert_close(results[1]["grads"][name], expected, rtol=1e-4, atol=1e-7)
    assert results[1]["norm"] == pytest.approx(results[0]["norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "plan", "sequence_parallel"),
    [
        ((1, 1), UNEVEN_RANKS, False),
        ((2, 1), ONE_BY_ONE, False),
        ((2, 1), ONE_BY_ONE, True),  # rows of 96 tokens: all response tokens lie on rank 0, if any
        ((2, 1), ALL_AT_ONCE, True),
        ((1, 2), ONE_BY_ONE, False),
    ],
    ids=["dp2", "tp2", "sp2-empty", "sp2", "pp2"],
)
def test_the_layout_does_not_change_the_gradient(single, layout, plan, sequence_parallel):
    """Also holds random weights to be a function of seed and tensor name alone."""
    ranks = run_distributed(gradients, 2, layout, [plan], "float32", sequence_parallel)
    expected = single[0][0]
    found = merged(ranks, 0)
    assert found.keys() == expected["grads"].keys()
    for name, gradient in expected["grads"].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    for rank in ranks:
        assert rank[0]["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for name, value in expected["sums"].items():
            assert rank[0]["sums"][name] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_the_norm_is_that_of_the_whole_gradient(single):
    result = single[0][0]
    norm = torch.stack([g.double().norm() for g in result["grads"].values()]).norm()
    assert result["norm"] == pytest.approx(norm.item(), rel=1e-6)


def logps_and_gradients(sequence_parallel: bool, picks: list[int]) -> dict:
    """tp=2: the response tokens `picks` of one row, in that order, and gradients of their sum."""
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training, zero_grad
    from reinforcer_tp.mcore.schedule import Stage, forward_backward, forward_logps
    from reinforcer_tp.mcore.topology import init_topology
    from reinforcer_tp.mcore.weights import RandomReader, full_tensors, load_weights

    topology = init_topology(2, 1, seed=0)
    overrides = ["policy.model_name=unused", "policy.precision=float32"]
    overrides += [f"policy.megatron_cfg.sequence_parallel={sequence_parallel}"]
    config = load_config(None, overrides)
    model = build_model(LlamaConfig(**SHAPE), config.policy, topology)
    load_weights(model, RandomReader(model.shape, seed=11), topology)
    training = build_training(model, config.policy, topology, total_steps=10)
    stage = Stage(model=model, modules=training.ddp, topology=topology, kernel_impl="auto")
    batch = build_packed_batch(make_pairs(), divisible_by=2)
    picked = replace(batch, response_index=batch.response_index[picks], labels=batch.labels[picks])
    zero_grad(training)
    forward_backward(stage, [picked], lambda logps, entropies, batch: (weighted_sum(logps), {}))
    whole = dict(full_tensors(model, topology, of=lambda p: p.main_grad))
    return {
        "all": forward_logps(stage, [batch])[0],
        "picked": forward_logps(stage, [picked])[0],
        "grads": {n: g.clone() for n, g in whole.items() if g is not None},
    }


def weighted_sum(logps: torch.Tensor) -> torch.Tensor:
    return (logps * torch.sin(1.7 * torch.arange(len(logps)))).sum()


def test_response_tokens_of_a_split_sequence_may_repeat_in_any_order():
    """Two labels on one hidden row, of rank 1 before rank 0: each comes out in its own place."""
    picks = [30, 2, 2, 41, 0, 30, 17]
    split = run_distributed(logps_and_gradients, 2, True, picks)
    whole = run_distributed(logps_and_gradients, 2, False, picks)
    for rank in (0, 1):
        expected = whole[0]["all"]
        torch.testing.assert_close(split[rank]["all"], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(split[rank]["picked"], expected[picks], rtol=1e-5, atol=1e-6)
        for name, gradient in split[rank]["grads"].items():
            torch.testing.assert_close(gradient, whole[rank]["grads"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bit_gradients_are_near(single, precision):
    [results] = run_distributed(gradients, 1, (1, 1), [ONE_BY_ONE], precision)
    expected = single[0][0]
    assert results[0]["norm"] == pytest.approx(expected["norm"], rel=0.03)
    assert results[0]["sums"]["loss"] == pytest.approx(expected["sums"]["loss"], rel=0.02)


def weights_after_steps(overlaps: bool, tied: bool) -> dict:
    """dp=2, every parameter a bucket of its own: three steps, a validation after each, the end."""
    from functools import partial

    from reinforcer_tp.loop import SUMS, loss_function
    from reinforcer_tp.mcore import optim
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.schedule import Stage, forward_backward, reduce_metrics
    from reinforcer_tp.mcore.topology import init_topology
    from reinforcer_tp.mcore.weights import RandomReader, full_tensors, load_weights

    small_buckets = partial(optim.DistributedDataParallelConfig, bucket_size=1)
    topology = init_topology(1, 1, seed=0)
    ddp = "policy.megatron_cfg.distributed_data_parallel_config"
    config = load_config(
        None,
        [
            "policy.model_name=unused",
            "policy.precision=float32",
            "policy.max_total_sequence_length=64",
            "policy.megatron_cfg.optimizer.lr=0.01",
            f"{ddp}.overlap_param_gather={overlaps}",
            f"{ddp}.overlap_grad_reduce={overlaps}",
        ],
    )
    hf_config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    model = build_model(hf_config, config.policy, topology)
    load_weights(model, RandomReader(model.shape, seed=11), topology)
    with mock.patch.object(optim, "DistributedDataParallelConfig", small_buckets):
        training = optim.build_training(model, config.policy, topology, total_steps=10)
    assert not overlaps or len(training.ddp[0].bucket_groups) > 5
    stage = Stage(model=model, modules=training.ddp, topology=topology, kernel_impl="auto")
    pairs = make_pairs()[topology.dp_rank :: 2]
    reference = [torch.full((len(p.chosen) + len(p.rejected),), -4.0) for p in pairs]
    batches = [build_packed_batch(pairs, reference_logps=reference)]
    losses = []
    for _ in range(3):
        optim.zero_grad(training)
        forward_backward(stage, batches, loss_function(config))
        optim.optimizer_step(training)
        optim.gather_weights(training)
        [report] = forward_backward(stage, batches, loss_function(config), forward_only=True)
        local = {n: float(report[n]) for n in SUMS}
        losses.append(reduce_metrics(local, SUMS, topology)["loss"])
    weights = {n: w.clone() for n, w in full_tensors(model, topology)}
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize("tied", [False, True])
def test_overlapped_gathering_of_weights_changes_nothing(tied):
    """Validation, checkpoints and the head must never see weights of the step before."""
    plain = run_distributed(weights_after_steps, 2, False, tied)
    overlapped = run_distributed(weights_after_steps, 2, True, tied)
    for rank in (0, 1):
        assert overlapped[rank]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-6)
        for name, expected in plain[0]["weights"].items():
            torch.testing.assert_close(overlapped[rank]["weights"][name], expected)
