"""The whole loss against hand-computed numbers, NeMo-RL's published ones, and its formula."""

from __future__ import annotations

import math

import pytest
import torch

from reinforcer_tp.loss import LossOptions, dpo_loss, sequence_sums
from reinforcer_tp.preference_losses import LOSSES


def loss_of_sums(policy, reference, lengths, weights, **options):
    """`dpo_loss` of sequences given by their sums, which one token each carries."""
    return dpo_loss(
        policy, reference, torch.arange(len(lengths)), lengths, weights,
        torch.zeros(len(weights)), LossOptions(**{"beta": 0.1} | options),
    )  # fmt: skip


def mean_loss(policy, reference, lengths, weights, **options):
    """Loss and metrics as means over the pairs of weight > 0, the way the loop reports them."""
    to = lambda x: torch.as_tensor(x, dtype=torch.float64)  # noqa: E731
    loss, sums = loss_of_sums(
        to(policy), to(reference), torch.as_tensor(lengths), to(weights), **options
    )
    count = sums["num_pairs"]
    means = {n: (x / count).item() for n, x in sums.items() if x.dim() == 0}
    return (loss / count).item(), means


# NeMo-RL's unit tests of its DPO loss (test_loss_functions.py), on logits that are all zero: each
# response token has log-prob -ln V. The same numbers in our terms.
def test_nemo_row_1_beta_zero_is_ln_2():
    loss, _ = mean_loss([-2 * math.log(16)] * 2, [0, 0], [2, 2], [1], beta=0.0)
    assert loss == pytest.approx(0.693147, abs=1e-6)


def test_nemo_row_2_adds_the_sft_loss():
    loss, metrics = mean_loss(
        [-2 * math.log(16)] * 2, [0, 0], [2, 2], [1], beta=0.0, sft_loss_weight=0.5
    )
    assert metrics["sft_loss"] == pytest.approx(5.545177, abs=1e-6)
    assert loss == pytest.approx(3.465736, abs=1e-6)


VARYING = [-n * math.log(10) for n in (2, 4, 3, 5)]  # chosen, rejected, chosen, rejected


def test_nemo_row_3_sequences_of_different_lengths():
    loss, metrics = mean_loss(VARYING, [0] * 4, [2, 4, 3, 5], [1, 1], sft_loss_weight=0.5)
    assert metrics["sft_loss"] == pytest.approx(5.756463, abs=1e-6)
    assert metrics["preference_loss"] == pytest.approx(0.489167, abs=1e-6)
    assert loss == pytest.approx(3.367399, abs=1e-6)
    # NeMo-RL reports rewards without beta: -5.756463 and -10.361633.
    assert metrics["rewards/chosen"] == pytest.approx(-0.5756463, abs=1e-6)
    assert metrics["rewards/rejected"] == pytest.approx(-1.0361633, abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.4605170, abs=1e-6)
    assert metrics["rewards/accuracies"] == 1.0
    assert metrics["logps/chosen"] == pytest.approx(-5.756463, abs=1e-6)
    assert metrics["logps/rejected"] == pytest.approx(-10.361633, abs=1e-6)


def test_nemo_row_4_averages_over_tokens():
    loss, metrics = mean_loss(
        VARYING, [0] * 4, [2, 4, 3, 5], [1, 1], sft_loss_weight=0.5,
        preference_average_log_probs=True, sft_average_log_probs=True,
    )  # fmt: skip
    assert metrics["sft_loss"] == pytest.approx(2.302585, abs=1e-6)
    assert metrics["preference_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert loss == pytest.approx(1.844440, abs=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(-5.756463, abs=1e-6)  # a sum all the same


def test_nemo_row_5_the_sft_loss_alone_is_the_nll_of_the_chosen_side():
    """V = 8, two pairs, random logits: loss * pairs / chosen tokens = token mean of the NLL."""
    torch.manual_seed(0)
    lengths = [4, 3, 2, 4]
    logits, labels = torch.randn(13, 8, dtype=torch.float64), torch.randint(0, 8, (13,))
    sequence_id = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logps = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    sums = sequence_sums(logps, sequence_id, 4)
    loss, _ = mean_loss(
        sums, torch.randn(4), lengths, [1, 1], preference_loss_weight=0.0, sft_loss_weight=1.0
    )
    chosen = sequence_id % 2 == 0
    nll = torch.nn.functional.cross_entropy(logits[chosen], labels[chosen]).item()
    assert loss * 2 / chosen.sum().item() == pytest.approx(nll, rel=1e-6)


def plain_formula(policy, reference, lengths, weights, *, beta, wp, ws, avg_p, avg_s):
    """The definition, one pair at a time, in Python floats."""
    total = 0.0
    for i, weight in enumerate(weights):
        c, r = 2 * i, 2 * i + 1
        ratio = [policy[s] - reference[s] for s in (c, r)]
        if avg_p:
            ratio = [x / lengths[s] for x, s in zip(ratio, (c, r), strict=True)]
        preference = math.log1p(math.exp(-beta * (ratio[0] - ratio[1])))
        sft = -policy[c] / (lengths[c] if avg_s else 1)
        total += weight * (wp * preference + ws * sft)
    return total


@pytest.mark.parametrize("avg_p", [False, True])
@pytest.mark.parametrize("avg_s", [False, True])
@pytest.mark.parametrize(("wp", "ws"), [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_loss_and_gradient_follow_the_formula(avg_p, avg_s, wp, ws):
    torch.manual_seed(1)
    policy, reference = -20 * torch.rand(10), -20 * torch.rand(10)
    lengths, weights = torch.randint(1, 9, (10,)), torch.tensor([1.0, 0.0, 2.5, 0.25, 1.0])
    policy = policy.double().requires_grad_()
    options = {"beta": 0.3, "preference_loss_weight": wp, "sft_loss_weight": ws}
    loss, sums = loss_of_sums(
        policy, reference.double(), lengths, weights, **options,
        preference_average_log_probs=avg_p, sft_average_log_probs=avg_s,
    )  # fmt: skip
    loss.backward()

    def formula(values):
        return plain_formula(
            values, reference.tolist(), lengths.tolist(), weights.tolist(),
            beta=0.3, wp=wp, ws=ws, avg_p=avg_p, avg_s=avg_s,
        )  # fmt: skip

    values = policy.tolist()
    assert loss.item() == pytest.approx(formula(values), rel=1e-6)
    assert sums["loss"].item() == pytest.approx(formula(values), rel=1e-12)
    for i in range(10):
        up, down = list(values), list(values)
        up[i], down[i] = values[i] + 1e-5, values[i] - 1e-5
        slope = (formula(up) - formula(down)) / 2e-5
        assert policy.grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_weights_scale_the_losses_but_not_the_other_metrics():
    policy, reference = [-1.0, -2.0, -5.0, -3.0, -7.0, -7.0], [-2.0, -2.0, -4.0, -3.0, 0.0, 0.0]
    _, even = mean_loss(policy[:4], reference[:4], [1] * 4, [1, 1], sft_loss_weight=1.0)
    _, scaled = mean_loss(policy, reference, [1] * 6, [3, 3, 0], sft_loss_weight=1.0)
    for name in ("loss", "preference_loss", "sft_loss"):
        assert scaled[name] == pytest.approx(3 * even[name])
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert scaled[name] == pytest.approx(even[name])
    assert even["rewards/accuracies"] == 0.5  # rewards +0.1 and -0.1: one right, one wrong
    assert scaled["logps/chosen"] == pytest.approx(-3.0)
    assert scaled["num_pairs"] * 2 == 2


def test_a_tie_does_not_count_as_accurate():
    _, metrics = mean_loss([-3.0, -5.0], [-3.0, -5.0], [1, 1], [1])
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["preference_loss"] == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_extreme_margins_neither_overflow_nor_lose_the_gradient(margin):
    policy = torch.tensor([margin, 0.0], requires_grad=True)
    loss, _ = loss_of_sums(policy, torch.zeros(2), torch.ones(2), torch.ones(1), beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(max(-margin, 0.0))
    assert policy.grad.tolist() == ([-1.0, 1.0] if margin < 0 else [0.0, 0.0])


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_add_up_to_the_whole(name):
    """What lets any micro-batching and any number of ranks give one loss; empty parts included."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 5, (12,), generator=generator)
    sequence_id = torch.arange(12).repeat_interleave(lengths)
    policy, reference = -torch.rand(2, int(lengths.sum()), generator=generator)
    weights, margins = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.5]), torch.linspace(0, 1, 6)
    ld_alpha = None if name in ("simpo", "orpo") else 0.5
    options = LossOptions(
        losses=((name, 1.0),), beta=0.1, sft_loss_weight=0.1, label_smoothing=0.1, ld_alpha=ld_alpha
    )

    def part(begin: int, end: int):
        mine = (sequence_id >= 2 * begin) & (sequence_id < 2 * end)
        leaf = policy[mine].requires_grad_()
        loss, sums = dpo_loss(
            leaf, reference[mine], sequence_id[mine] - 2 * begin, lengths[2 * begin : 2 * end],
            weights[begin:end], margins[begin:end], options,
        )  # fmt: skip
        loss.backward()
        return loss.item(), sums, leaf.grad

    whole_loss, whole, whole_gradient = part(0, 6)
    parts = [part(*ends) for ends in ((0, 1), (1, 1), (1, 4), (4, 6))]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in parts]), whole_gradient)
    for key, value in whole.items():
        pieces = [sums[key] for _, sums, _ in parts]
        joined = torch.cat(pieces) if key in ("sequence_logps", "rewards") else sum(pieces)
        torch.testing.assert_close(joined, value)


def test_an_empty_micro_batch_has_a_zero_loss_with_a_gradient():
    logps, none = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss, metrics = loss_of_sums(logps, torch.zeros(0), none, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0 and metrics["num_pairs"].item() == 0.0
    assert logps.grad.shape == (0,)


def test_ld_weights_by_hand():
    """Three chosen tokens beside one rejected: the chosen second and third count a quarter."""
    policy = torch.tensor([-1.0, -2.0, -4.0, -1.0], requires_grad=True)
    reference = torch.tensor([-2.0, -6.0, -8.0, -3.0])
    options = LossOptions(beta=1.0, ld_alpha=0.25, sft_loss_weight=1.0)
    loss, metrics = dpo_loss(
        policy, reference, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]), torch.ones(1),
        torch.zeros(1), options,
    )  # fmt: skip
    loss.backward()
    assert metrics["rewards/chosen"].item() == 1 + 0.25 * (4 + 4)
    assert metrics["rewards/rejected"].item() == 2.0
    assert metrics["preference_loss"].item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert metrics["sft_loss"].item() == 7.0 and metrics["logps/chosen"].item() == -7.0
    assert metrics["sequence_logps"].tolist() == [-7.0, -1.0]
    share = 1 / (1 + math.e)
    expected = [-share - 1, -share / 4 - 1, -share / 4 - 1, share]
    assert policy.grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_without_a_reference():
    policy, lengths = torch.tensor([-6.0, -2.0, -3.0, -8.0]), torch.tensor([3, 2, 1, 4])
    weights = torch.tensor([0.5, 0.0])
    with pytest.raises(AssertionError, match="no reference"):
        loss_of_sums(policy, None, lengths, weights, losses=(("simpo", 1.0), ("sigmoid", 1.0)))
    loss, metrics = loss_of_sums(
        policy, None, lengths, weights, preference_loss_weight=0.0, sft_loss_weight=2.0
    )
    assert loss.item() == 0.5 * 2 * 6
    assert metrics["preference_loss"].item() == 0.0
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * -6 / 3)
    assert metrics["rewards/rejected"].item() == pytest.approx(0.1 * -2 / 2)
    assert metrics["rewards/accuracies"].item() == 0.0 and metrics["num_pairs"].item() == 1.0


def test_sequence_sums_and_their_gradient():
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sequence_sums(logps, torch.tensor([0, 0, 2, 2, 3]), 5)
    assert sums.tolist() == [3.0, 0.0, 12.0, 16.0, 0.0]
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert logps.grad.tolist() == [1.0, 1.0, 3.0, 3.0, 4.0]


def test_sequence_sums_do_not_round_long_sequences():
    """The float32 sum of 30,000 log-probs is off by 1e-2; the loss wants differences of 1e-4."""
    logps = -3 * torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    sums = sequence_sums(logps, torch.zeros(30_000, dtype=torch.int64), 1)
    assert sums.item() == pytest.approx(math.fsum(logps.tolist()), rel=1e-13)
