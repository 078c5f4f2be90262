"""Every preference loss: values and gradients against its paper's formula, extremes, identities."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from reinforcer_tp.loss import (
    LossOptions,
    dpo_loss,
    loss_at_reference,
    uses_margins,
    uses_reference,
)
from reinforcer_tp.preference_losses import F_DIVERGENCES, LOSSES, REFERENCE_FREE
from tests.unit.loss_formulas import FORMULAS, full_loss, preference_loss

NEEDS_SMOOTHING = ("robust", "exo_pair")
SMOOTHED = ("sigmoid", "sigmoid_norm", "simpo")
ON_SCORE_DIFFERENCE = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")


def options_of(*names: str, **changes) -> LossOptions:
    if not set(names).isdisjoint(NEEDS_SMOOTHING):
        changes = {"label_smoothing": 0.1} | changes
    losses = tuple((name, 1.0) for name in names)
    return LossOptions(**{"losses": losses, "beta": 0.3} | changes)


def variants():
    """Every loss, with the options that it knows."""
    for name in LOSSES:
        yield options_of(name)
        yield options_of(name, beta=2.0, sft_loss_weight=0.3, preference_loss_weight=0.7)
        if name not in REFERENCE_FREE:
            yield options_of(name, ld_alpha=0.4, sft_average_log_probs=True, sft_loss_weight=0.1)
        if name not in (*REFERENCE_FREE, "sigmoid_norm", "ipo"):  # these already average
            yield options_of(name, preference_average_log_probs=True)
        if name in ON_SCORE_DIFFERENCE:
            for kind in F_DIVERGENCES[1:]:
                yield options_of(name, f_divergence_type=kind)
            yield options_of(
                name, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.6
            )
    for name in SMOOTHED:
        yield options_of(name, label_smoothing=0.2)
    yield options_of("discopop", discopop_tau=0.7)
    yield options_of("simpo", simpo_gamma=1.5)
    yield options_of("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    mix = (("hinge", 0.5), ("apo_zero", 2.0), ("simpo", 1.0), ("robust", 0.25))
    yield options_of(losses=mix, label_smoothing=0.1, ld_alpha=0.5)


def name_of(options: LossOptions) -> str:
    changed = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("losses", "beta") and getattr(options, field.name) != field.default
    }
    names = "+".join(name for name, _ in options.losses)
    return "-".join([names, *(f"{key}={value}" for key, value in changed.items())])


def random_batch(num_pairs: int = 4, scale: float = 2.0, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2 * num_pairs,), generator=generator)
    draws = torch.rand(2, int(lengths.sum()), generator=generator, dtype=torch.float64)
    weights = torch.rand(num_pairs, generator=generator) * 2
    weights[1] = 0.0
    return {
        "policy": -scale * draws[0],
        "reference": -scale * draws[1],
        "lengths": lengths,
        "weights": weights,
        "margins": torch.rand(num_pairs, generator=generator),
    }


def run(batch: dict, options: LossOptions, without_reference: bool = False):
    """Loss, metrics and gradient with respect to the policy's log-probs."""
    policy = batch["policy"].clone().requires_grad_()
    lengths = batch["lengths"]
    sequence_id = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    reference = None if without_reference else batch["reference"]
    loss, metrics = dpo_loss(
        policy, reference, sequence_id, lengths, batch["weights"], batch["margins"], options
    )
    loss.backward()
    return loss.item(), metrics, policy.grad


def as_lists(batch: dict) -> list[list]:
    return [batch[key].tolist() for key in ("policy", "reference", "lengths", "weights", "margins")]


def slope(batch: dict, token: int, options: LossOptions, step: float) -> float:
    """Central difference of the independent formula by one token's log-prob."""
    policy, *rest = as_lists(batch)
    ends = []
    for change in (step, -step):
        moved = list(policy)
        moved[token] += change
        ends.append(full_loss(moved, *rest, options))
    return (ends[0] - ends[1]) / (2 * step)


def test_every_loss_has_an_independent_formula():
    assert set(FORMULAS) == set(LOSSES)
    assert set(AT_REFERENCE) == set(LOSSES) - set(REFERENCE_FREE)


@pytest.mark.parametrize("options", variants(), ids=name_of)
def test_value_and_gradient_follow_the_paper(options):
    batch = random_batch()
    loss, metrics, gradient = run(batch, options)
    expected = full_loss(*as_lists(batch), options)
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert loss == pytest.approx(expected, rel=1e-6)  # float32
    bare = preference_loss(*as_lists(batch), options)
    assert metrics["preference_loss"].item() == pytest.approx(bare, rel=1e-12)
    for token in range(len(gradient)):
        expected = slope(batch, token, options, step=1e-5)
        assert gradient[token].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def extreme_batch() -> dict:
    """Log-ratios of +-1e4 in every combination; two tokens beside one, so that averages differ."""
    signs = list(itertools.product((-1e4, -0.1), repeat=4))
    policy, reference = [], []
    for mine_chosen, theirs_chosen, mine_rejected, theirs_rejected in signs:
        policy += [mine_chosen, -0.1, mine_rejected]
        reference += [theirs_chosen, -0.1, theirs_rejected]
    return {
        "policy": torch.tensor(policy, dtype=torch.float64),
        "reference": torch.tensor(reference, dtype=torch.float64),
        "lengths": torch.tensor([2, 1] * len(signs)),
        "weights": torch.ones(len(signs)),
        "margins": torch.zeros(len(signs)),
    }


@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios_give_the_formulas_values_and_gradients(name, beta):
    batch, options = extreme_batch(), options_of(name, beta=beta)
    loss, metrics, gradient = run(batch, options)
    assert metrics["loss"].item() == pytest.approx(full_loss(*as_lists(batch), options), rel=1e-12)
    assert math.isfinite(loss)
    for token in range(len(gradient)):
        expected = slope(batch, token, options, step=1e-3)
        # The difference of sums of about 1e8 (squares) over 2e-3 rounds by 1e-5.
        assert gradient[token].item() == pytest.approx(expected, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("coefficient", [0.5, 3.0])
@pytest.mark.parametrize("kind", F_DIVERGENCES[1:])
@pytest.mark.parametrize("name", ON_SCORE_DIFFERENCE)
def test_extreme_log_ratios_are_finite_with_every_divergence(name, kind, coefficient):
    options = options_of(name, f_divergence_type=kind, f_alpha_divergence_coef=coefficient)
    loss, metrics, gradient = run(extreme_batch(), options)
    assert math.isfinite(loss) and bool(gradient.isfinite().all())
    assert math.isfinite(metrics["loss"].item())


@pytest.mark.parametrize("mean", [0.0, -1e-300, -1e-9])
def test_orpo_takes_responses_of_probability_one(mean):
    batch = random_batch()
    batch["policy"][:] = mean
    loss, _, gradient = run(batch, options_of("orpo"))
    # Both sides are equally certain: log odds ratio 0.
    assert loss == pytest.approx(0.3 * math.log(2) * batch["weights"].sum().item(), rel=1e-6)
    assert bool(gradient.isfinite().all())


LN_2 = math.log(2)
AT_REFERENCE = {  # name -> loss and slope at log-ratio 0, by hand; n tokens on both sides
    "sigmoid": (lambda b, n: LN_2, lambda b, n: b / 2),
    "rpo": (lambda b, n: LN_2, lambda b, n: b / 2),
    "sigmoid_norm": (lambda b, n: LN_2, lambda b, n: b / 2 / n),
    "robust": (lambda b, n: LN_2, lambda b, n: b / 2 / 0.8),
    "hinge": (lambda b, n: 1.0, lambda b, n: b),
    "ipo": (lambda b, n: 1 / (4 * b**2), lambda b, n: 1 / b / n),
    "apo_zero": (lambda b, n: 1.0, lambda b, n: b / 4),
    "apo_down": (lambda b, n: 1.0, lambda b, n: b / 8),
    "sppo_hard": (lambda b, n: 1 / (2 * b**2), lambda b, n: 1 / b),
    "nca_pair": (lambda b, n: 2 * LN_2, lambda b, n: b / 4),
    "bco_pair": (lambda b, n: 2 * LN_2, lambda b, n: b / 2),
    "exo_pair": (
        lambda b, n: -LN_2 - 0.5 * math.log(0.1 * 0.9),
        lambda b, n: b / 4 * math.log(9),
    ),
    "discopop": (
        lambda b, n: 0.5 * LN_2 + 0.5,
        lambda b, n: b * abs((1 - LN_2) / (4 * 0.05) - 0.75),
    ),
}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", AT_REFERENCE)
def test_known_values_where_the_policy_is_the_reference(name, beta):
    value, steepness = AT_REFERENCE[name]
    logps = -torch.rand(12, dtype=torch.float64)
    lengths, weights = torch.tensor([3, 3, 3, 3]), torch.tensor([1.0, 2.0])
    sequence_id = torch.arange(4).repeat_interleave(3)
    options = options_of(name, beta=beta)
    loss, slope = loss_at_reference(logps, sequence_id, lengths, weights, torch.zeros(2), options)
    assert loss.item() == pytest.approx(3 * value(beta, 3), rel=1e-12)
    assert slope.item() == pytest.approx(3 * steepness(beta, 3), rel=1e-12)
    assert not loss.requires_grad and not slope.requires_grad


@pytest.mark.parametrize("options", variants(), ids=name_of)
def test_loss_at_reference_is_the_loss_of_the_reference_as_policy(options):
    batch = random_batch()
    batch["policy"] = batch["reference"]
    _, metrics, gradient = run(
        batch, dataclasses.replace(options, preference_loss_weight=1.0, sft_loss_weight=0.0)
    )
    lengths = batch["lengths"]
    sequence_id = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    loss, slope = loss_at_reference(
        batch["reference"], sequence_id, lengths, batch["weights"], batch["margins"], options
    )
    assert loss.item() == pytest.approx(metrics["preference_loss"].item(), rel=1e-12)
    firsts = lengths.cumsum(0) - lengths  # never in LD's tail
    assert slope.item() == pytest.approx(0.5 * gradient[firsts].abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_margins_and_the_reference_count_where_they_are_said_to(name):
    batch, options = random_batch(), options_of(name)
    loss, _, _ = run(batch, options)
    moved, _, _ = run(batch | {"margins": batch["margins"] + 0.5}, options)
    assert (moved != loss) is uses_margins(name)
    moved, _, _ = run(batch | {"reference": batch["reference"] * 1.5}, options)
    assert (moved != loss) is uses_reference(options)
    if not uses_reference(options):
        assert run(batch, options, without_reference=True)[0] == loss


def test_the_margin_column_by_hand():
    """beta 0.5, log-ratios 3 and 1 give 1; margin 0.25 leaves 0.75."""
    batch = {
        "policy": torch.tensor([-1.0, -2.0]),
        "reference": torch.tensor([-4.0, -3.0]),
        "lengths": torch.tensor([1, 1]),
        "weights": torch.ones(1),
        "margins": torch.tensor([0.25]),
    }
    loss, metrics, _ = run(batch, options_of("sigmoid", beta=0.5))
    assert loss == pytest.approx(math.log1p(math.exp(-0.75)), rel=1e-6)
    assert run(batch, options_of("hinge", beta=0.5))[0] == pytest.approx(0.25)
    assert metrics["rewards/margins"].item() == 1.0  # the reward's own difference


def test_averaged_scores_make_sigmoid_the_length_normalised_one():
    batch = random_batch()
    averaged = run(batch, options_of("sigmoid", preference_average_log_probs=True))
    normalised = run(batch, options_of("sigmoid_norm"))
    assert averaged[0] == normalised[0] and torch.equal(averaged[2], normalised[2])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert averaged[1][name].item() == pytest.approx(normalised[1][name].item())


def test_a_mix_is_the_weighted_sum_of_its_losses():
    batch, names, weights = random_batch(), ("sigmoid", "ipo", "orpo"), (0.8, 0.1, 3.0)
    mix = options_of(losses=tuple(zip(names, weights, strict=True)))
    _, metrics, gradient = run(batch, mix)
    parts = [run(batch, options_of(name)) for name in names]
    value = sum(w * part[1]["loss"].item() for w, part in zip(weights, parts, strict=True))
    assert metrics["loss"].item() == pytest.approx(value, rel=1e-12)
    total = sum(w * part[2] for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(gradient, total, rtol=1e-6, atol=1e-9)
