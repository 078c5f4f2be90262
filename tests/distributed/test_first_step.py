"""The first-step gate on what a model really computes: it passes for the policy's own log-probs
under every loss, and not for another model's or another mask's.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reinforcer_tp.preference_losses import LOSSES, REFERENCE_FREE
from tests.distributed.reference_cases import (
    ALONE,
    LAYOUTS,
    alone,
    attempt,
    config_of,
    judge,
    make_pairs,
    open_layout,
    open_model,
    write_model,
)
from tests.distributed.spawn import run_distributed

CASES = {  # overrides of each configuration besides beta
    **{name: [f"dpo.preference_loss={name}"] for name in LOSSES if name not in REFERENCE_FREE},
    "cdpo": ["dpo.label_smoothing=0.1"],
    "averages": ["dpo.preference_average_log_probs=true"],
    "ld": ["dpo.ld_alpha=0.5"],
    "forward_kl": ["dpo.f_divergence_type=forward_kl"],
    "js": ["dpo.f_divergence_type=js_divergence"],
    "alpha": ["dpo.f_divergence_type=alpha_divergence"],
    "steep": ["dpo.reference_policy_kl_penalty=2.0"],
    "mixed": ["dpo.preference_loss=[sigmoid,bco_pair,simpo]", "dpo.loss_weights=[1.0,0.5,0.2]"],
    "sft": ["dpo.sft_loss_weight=0.3"],
}
CASES["rpo"] += ["dpo.rpo_alpha=1.0"]
CASES["robust"] += ["dpo.label_smoothing=0.1"]
CASES["exo_pair"] += ["dpo.label_smoothing=0.001"]
SUBTLE = 7  # index of the pair with a small mistake
BETA = "dpo.reference_policy_kl_penalty=0.1"
BFLOAT16 = "policy.precision=bfloat16"


def shifted(pair):
    """The pair whose responses begin one token early, as an error in the mask has it."""
    return replace(
        pair, prompt=pair.prompt[:-1], chosen=pair.prompt[-1:] + pair.chosen[:-1],
        rejected=pair.prompt[-1:] + pair.rejected[:-1],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {n: write_model(root / n, seed) for n, seed in (("model", 3), ("other", 4))}


@pytest.fixture(scope="module")
def references(folders) -> dict[str, list[np.ndarray]]:
    """float32 of what transformers says in float64: right, and wrong in several ways."""
    pairs = make_pairs()
    right = judge(folders["model"], pairs)
    lengths = [len(pair.prompt) for pair in pairs]
    early = [shifted(pair) if n > 1 else pair for pair, n in zip(pairs, lengths, strict=True)]
    found = {
        "right": right,
        "other": judge(folders["other"], pairs),
        "shifted": judge(folders["model"], early),
        "subtle": [v - 0.005 * (i == SUBTLE) for i, v in enumerate(right)],
        "common": [v - 30.0 / _own_length(pair) for v, pair in zip(right, pairs, strict=True)],
    }
    chosen = len(pairs[SUBTLE].chosen)
    found["subtle"][SUBTLE][chosen:] = right[SUBTLE][chosen:]
    return {name: [v.astype(np.float32) for v in values] for name, values in found.items()}


@pytest.fixture(scope="module")
def found(folders, references, tmp_path_factory) -> dict[str, list[dict]]:
    """Layout -> per rank (precision, loss, reference) -> line or error."""
    folder = tmp_path_factory.mktemp("alone")
    swept = run_distributed(_sweep_by_two, 2, folders)[0]
    return {
        "alone": [alone(_run_gates, folder, folders["model"], references, swept)],
        "pp2": run_distributed(_run_pipeline, 2, folders["model"], references, swept),
    }


def _own_length(pair) -> np.ndarray:  # (C + R,)
    """For each response token the tokens of its response."""
    lengths = [len(pair.chosen), len(pair.rejected)]
    return np.repeat(lengths, lengths).astype(float)


def _sweep_by_two(folders: dict[str, str]) -> dict[str, dict[int, np.ndarray]]:
    """What each model's log-probs are in bfloat16 on two tensor-parallel ranks."""
    topology, config = open_layout(LAYOUTS["tp2_sp"]), config_of(LAYOUTS["tp2_sp"], BFLOAT16)
    stages = {name: open_model(config, folder, topology) for name, folder in folders.items()}
    found = {name: packed_otherwise(stage, config) for name, stage in stages.items()}
    return {"right": found["model"], "other": found["other"]}


def _run_pipeline(*args) -> dict:
    return _run_gates(open_layout(LAYOUTS["pp2"]), *args, LAYOUTS["pp2"])


def _run_gates(topology, folder: str, references: dict, swept: dict, layout=ALONE) -> dict:
    in_bfloat16 = {name: swept[name] for name in ("right", "other")}
    in_bfloat16["shifted"] = references["shifted"]
    results = {}
    for precision, by_name in (("float32", references), ("bfloat16", in_bfloat16)):
        cases = {
            (loss, name): (overrides, values)
            for loss, overrides in CASES.items()
            for name, values in by_name.items()
            if loss == "sigmoid" or name in ("right", "other")
        }
        stage = open_model(config_of(layout, f"policy.precision={precision}"), folder, topology)
        found = gates(stage, precision, layout, cases)
        results |= {(precision, *case): text for case, text in found.items()}
    return results


def gates(stage, precision: str, layout, cases: dict, *, forward_only: bool = True) -> dict:
    """Case -> the gate's line about a first step with its loss against its reference.

    One pass of the model serves all: the loss function reports every case.
    """
    from reinforcer_tp.first_step import check_first_step
    from reinforcer_tp.loop import loss_function
    from reinforcer_tp.loss import LossOptions
    from reinforcer_tp.mcore.schedule import forward_backward

    base = [f"policy.precision={precision}", BETA]
    configs = {case: config_of(layout, *base, *cases[case][0]) for case in cases}
    batches = {
        case: batches_of(stage, configs[case], values) for case, (_, values) in cases.items()
    }
    losses = {case: loss_function(config) for case, config in configs.items()}
    first = next(iter(cases))
    places = {batch.rows: i for i, batch in enumerate(batches[first])}

    def every_loss(logps, entropies, batch):
        position = places[batch.rows]
        found = {c: losses[c](logps, entropies, batches[c][position]) for c in cases}
        return found[first][0], {case: report for case, (_, report) in found.items()}

    reports = forward_backward(stage, batches[first], every_loss, forward_only=forward_only)
    again = None if precision == "float32" else swept_again(stage, configs[first])
    return {
        case: attempt(
            lambda case=case: check_first_step(
                batches[case],
                [report[case] for report in reports],
                LossOptions(**configs[case].dpo.loss_options),
                stage.topology,
                precision=precision,
                swept_again=lambda: again,
            )
        )
        for case in cases
    }


def swept_again(stage, config) -> dict[int, np.ndarray]:
    """Row -> the policy's sums in the packing that the gate compares with."""
    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.tokenized import TokenizedSet
    from reinforcer_tp.first_step import sweep_alone

    pairs = TokenizedSet.from_pairs(make_pairs())
    cut = micro_batching(config, stage.model.shape, stage.topology)
    return sweep_alone(stage, pairs, range(len(pairs)), cut)


def batches_of(stage, config, values=None, **changes) -> tuple:
    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.micro_batches import micro_batches
    from reinforcer_tp.data.tokenized import TokenizedSet

    pairs = TokenizedSet.from_pairs(make_pairs())
    cut = replace(micro_batching(config, stage.model.shape, stage.topology), **changes)
    reads = values is not None and stage.topology.is_last_stage
    reference = values.__getitem__ if reads else None
    return micro_batches(pairs, range(len(pairs)), cut, reference).batches


def packed_otherwise(stage, config) -> dict[int, np.ndarray]:
    """The stage's own log-probs, every pair in a row of its own."""
    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.tokenized import TokenizedSet
    from reinforcer_tp.reference.sweep import sweep_reference

    pairs = TokenizedSet.from_pairs(make_pairs())
    cut = micro_batching(config, stage.model.shape, stage.topology)
    cut = replace(cut, max_tokens=None, max_pairs=1, share="nothing")
    return sweep_reference(stage, pairs, range(len(pairs)), cut)


@pytest.mark.parametrize("layout", ["alone", "pp2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", CASES)
def test_the_policys_own_log_probs_pass_and_another_models_do_not(found, layout, precision, loss):
    """Own means in 32 bits transformers' in float64, in 16 those of another layout and packing.

    The pairs have weights from 0 to 2 and margins. Every rank says the same.
    """
    for name in ("right", "other"):
        texts = {rank[precision, loss, name] for rank in found[layout]}
        assert len(texts) == 1
        text = texts.pop()
        assert text.startswith("first step: " if name == "right" else "FirstStepError: "), text
        numbers = re.search(r"log-ratios of (\S+) nats .*; two packings differ by (\S+[0-9])", text)
        if precision == "float32":
            assert numbers is None, text
            continue
        log_ratios, noise = map(float, numbers.groups())
        assert noise < 0.05 and (0 < log_ratios < 0.1) == (name == "right"), text


@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_an_error_names_the_pair_that_is_furthest_off(found, references, layout):
    pairs = make_pairs()
    for name in ("other", "shifted", "subtle"):
        error = found[layout][0]["float32", "sigmoid", name]
        ratios = []
        for pair, right, wrong in zip(pairs, references["right"], references[name], strict=True):
            chosen, rejected = np.split(right.astype(float) - wrong, [len(pair.chosen)])
            ratios.append((chosen.sum(), rejected.sum()))
        by_token = [
            (p.weight > 0) * max(abs(c) / len(p.chosen), abs(r) / len(p.rejected))
            for (c, r), p in zip(ratios, pairs, strict=True)
        ]
        worst = int(np.argmax(by_token))
        stated = re.search(
            r"source row (\d+): log-ratio (\S+) over .*, (\S+) over .*; (\d+)", error
        )
        assert int(stated[1]) == pairs[worst].row
        assert float(stated[2]) == pytest.approx(ratios[worst][0], abs=2e-3)
        assert float(stated[3]) == pytest.approx(ratios[worst][1], abs=2e-3)
        assert int(stated[4]) == sum(x > 1e-3 for x in by_token)
    assert f"source row {pairs[SUBTLE].row}: " in error and "; 1 pairs" in error


@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_what_no_mean_loss_shows_is_seen(found, layout):
    """30 nats more on both sides of every pair cancel out of the loss."""
    for rank in found[layout]:
        error = rank["float32", "sigmoid", "common"]
        assert error.startswith("FirstStepError: "), error
        off, log_ratios = map(
            float, re.search(r"off by (\S+), .*log-ratios of (\S+) nats", error).groups()
        )
        assert off < 1e-5 and log_ratios == pytest.approx(30, rel=1e-2)


@pytest.mark.parametrize("layout", ["alone", "pp2"])
def test_a_shifted_mask_is_seen_in_16_bits_too(found, layout):
    """Where the loss hardly shows it: what it adds and takes away cancels out."""
    for rank in found[layout]:
        error = rank["bfloat16", "sigmoid", "shifted"]
        assert error.startswith("FirstStepError: "), error
        got, expected = map(float, re.search(r"loss (\S+), (\S+) expected", error).groups())
        assert abs(got - expected) < 0.02


def _run_first_steps(folders: dict[str, str]) -> SimpleNamespace:
    """A first step in bfloat16 on two data-parallel ranks, without the gate and with it."""
    from reinforcer_tp.loop import loss_function
    from reinforcer_tp.mcore.optim import build_training, gather_weights, optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import forward_backward
    from reinforcer_tp.mcore.weights import full_tensors

    topology = open_layout(LAYOUTS["dp2"])
    config = config_of(LAYOUTS["dp2"], BFLOAT16, BETA, "policy.megatron_cfg.optimizer.lr=1e-2")
    steps = []
    for is_checked in (False, True):
        stage = open_model(config, folders["model"], topology)
        values = packed_otherwise(stage, config)
        training = build_training(stage.model, config.policy, topology, total_steps=10)
        assert training.ddp[0].ddp_config.overlap_param_gather
        stage = replace(stage, modules=training.ddp)
        zero_grad(training)
        if is_checked:
            cases = {"sigmoid": ([], values)}
            line = gates(stage, "bfloat16", LAYOUTS["dp2"], cases, forward_only=False)["sigmoid"]
        else:
            batches = batches_of(stage, config, values)
            forward_backward(stage, batches, loss_function(config))
        _, norm = optimizer_step(training)
        gather_weights(training)
        weights = {n: w.clone() for n, w in full_tensors(stage.model, topology) if w is not None}
        steps.append((norm, weights))
    return SimpleNamespace(line=line, plain=steps[0], checked=steps[1])


def test_the_gates_own_sweep_changes_no_gradient(folders):
    for rank in run_distributed(_run_first_steps, 2, folders):
        (norm, weights), (checked_norm, checked_weights) = rank.plain, rank.checked
        assert rank.line.startswith("first step: ")
        assert norm == checked_norm > 0
        assert weights.keys() == checked_weights.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, checked_weights[name]), name
