"""The losses against values that TRL 1.16's own code gave (tests/trl_values/record.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reinforcer_tp.loss import LossOptions, dpo_loss
from reinforcer_tp.preference_losses import LOSSES

RECORDED = json.loads(
    (Path(__file__).resolve().parents[1] / "trl_values" / "values.json").read_text()
)
CASES = RECORDED["cases"]
NOT_IN_TRL = {"rpo"}  # removed from TRL; sigmoid and an SFT term


def name_of(case: dict) -> str:
    args = {k: v for k, v in case["args"].items() if v is not None}
    return f"{case['trainer']}-{case['batch']}-" + "-".join(map(str, args.values()))


def losses_of(case: dict) -> tuple[tuple[str, float], ...]:
    if case["trainer"] == "orpo":
        return (("orpo", 1.0),)
    names = case["args"]["loss_type"]
    names = [names] if isinstance(names, str) else names
    return tuple(zip(names, case["args"].get("loss_weights") or [1.0] * len(names), strict=True))


def tolerance(case: dict) -> float:
    """Relative error allowed: TRL computed in float64, but for three things.

    ORPO is cast to float32. exo_pair takes the logarithm of a float32 epsilon. The alpha divergence
    runs in float32, in which sums of log-probs around 40 round by 4e-6 and the difference of two
    exponentials of them loses another digit: float32 in another order of sums errs by 2.6e-5.
    """
    if case["args"].get("f_divergence_type") == "alpha_divergence":
        return 5e-5
    if case["dtype"] == "float32":
        return 5e-6
    return 1e-6 if "exo_pair" in case["args"]["loss_type"] else 1e-12


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_gradient_and_rewards_are_those_of_trl(case):
    batch, args = RECORDED["batches"][case["batch"]], dict(case["args"])
    args.pop("loss_type", None), args.pop("loss_weights", None)
    options = LossOptions(losses=losses_of(case), **args)
    lengths = torch.tensor(batch["lengths"])
    num_pairs = len(lengths) // 2
    policy = torch.tensor(batch["policy"], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(batch["reference"], dtype=torch.float64)
    sequence_id = torch.repeat_interleave(torch.arange(2 * num_pairs), lengths)
    loss, metrics = dpo_loss(
        policy,
        reference if case["trainer"] == "dpo" else None,
        sequence_id,
        lengths,
        torch.ones(num_pairs),
        torch.zeros(num_pairs),
        options,
    )
    loss.backward()
    bar = tolerance(case)
    assert metrics["preference_loss"].item() / num_pairs == pytest.approx(case["loss"], rel=bar)
    assert loss.item() == pytest.approx(metrics["preference_loss"].item(), rel=1e-6)  # float32
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    error = (policy.grad / num_pairs - expected).abs().max()
    assert error <= bar * expected.abs().max()
    if options.losses[0][0] == "sigmoid_norm":
        return  # our rewards are those that the loss compares, per token; TRL's are sums
    for name, value in case["metrics"].items():
        assert metrics[name].item() / num_pairs == pytest.approx(value, rel=max(bar, 1e-6)), name


def test_every_loss_that_trl_has_is_recorded():
    recorded = {name for case in CASES for name, _ in losses_of(case)}
    assert recorded == set(LOSSES) - NOT_IN_TRL
    assert RECORDED["versions"]["trl"] == "1.16.0"
