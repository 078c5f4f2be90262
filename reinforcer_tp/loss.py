"""The loss of a micro-batch from its response tokens' log-probs: preference terms and an SFT term.

Legend: B pairs, S = 2B sequences (2i is the chosen and 2i + 1 the rejected side of pair i),
N response tokens. The preference losses are in `preference_losses`; weights and averaging as in
NeMo-RL's DPO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcer_tp.preference_losses import (
    REFERENCE_FREE,
    LossOptions,
    Pairs,
    f_divergence_scores,
    preference_losses,
    uses_margins,
    uses_reference,
)

__all__ = [
    "LossOptions",
    "dpo_loss",
    "loss_at_reference",
    "sequence_sums",
    "uses_margins",
    "uses_reference",
]


def sequence_sums(
    logps: Tensor,  # (N,) per-token log-probs
    sequence_id: Tensor,  # (N,) int64 in [0, num_sequences), never decreasing
    num_sequences: int,
) -> Tensor:  # (num_sequences,) float64
    """Sum of each sequence's log-probs, 0 for a sequence without tokens.

    Summed in float64, since the loss takes small differences of sums over thousands of tokens, in
    a fixed order (no atomics), so equal inputs give bitwise equal sums.
    """
    borders = torch.arange(num_sequences + 1, device=sequence_id.device)
    offsets = torch.searchsorted(sequence_id, borders)
    # unsafe=True skips a check of the offsets that would wait for the device.
    return torch.segment_reduce(logps.double(), "sum", offsets=offsets, unsafe=True)


def dpo_loss(
    policy_logps: Tensor,  # (N,) per-token log-probs
    reference_logps: Tensor | None,  # (N,)
    sequence_id: Tensor,  # (N,) int64 in [0, 2B), never decreasing
    response_lengths: Tensor,  # (2B,) response tokens, at least 1
    pair_weights: Tensor,  # (B,) >= 0
    pair_margins: Tensor,  # (B,)
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the pairs' losses, and sums of the metrics over the pairs of weight > 0.

    Per pair: w (preference_loss_weight * sum_i w_i L_i + sft_loss_weight * -logp_chosen).
    `*_average_log_probs` divides log-ratios, or the SFT term, by the sequence's tokens; ld_alpha
    changes the preference losses and rewards alone. Nothing is divided by the number of pairs: the
    caller adds the sums of all micro-batches and ranks, then divides by `num_pairs`.

    reference_logps None: only reference-free losses, or preference_loss_weight 0.

    Returns a float32 scalar with gradient and detached float64 scalars, plus "sequence_logps"
    (2B,), the policy's sums, and "rewards" (B, 2), chosen and rejected: beta times log-ratio
    (divided by tokens where the loss does so: preference_average_log_probs, or sigmoid_norm alone),
    and beta times the mean log-prob without a reference. Rewards, accuracies (ties are wrong) and
    logps are not weighted; logps are sums over all tokens.
    """
    weights = pair_weights.double()
    valid = (weights > 0).double()
    num_sequences = response_lengths.shape[0]
    sums = sequence_sums(policy_logps, sequence_id, num_sequences)
    log_ratio_sums = None
    if reference_logps is not None:
        log_ratios = policy_logps.double() - reference_logps.double()
        log_ratio_sums = _ld_sums(log_ratios, sequence_id, response_lengths, options.ld_alpha)
    pairs = _pairs(sums, log_ratio_sums, response_lengths, pair_margins, options)
    preference = _preference(pairs, weights, options)

    chosen_logps, rejected_logps = sums.view(-1, 2).unbind(1)
    sft = weights * -chosen_logps
    if options.sft_average_log_probs:
        sft = sft / pairs.lengths[:, 0]
    losses = options.preference_loss_weight * preference + options.sft_loss_weight * sft
    rewards = _rewards(pairs, options)
    chosen_rewards, rejected_rewards = rewards.unbind(1)
    per_pair = {
        "loss": losses,
        "preference_loss": preference,
        "sft_loss": sft,
        "rewards/chosen": chosen_rewards * valid,
        "rewards/rejected": rejected_rewards * valid,
        "rewards/margins": (chosen_rewards - rejected_rewards) * valid,
        "rewards/accuracies": (chosen_rewards > rejected_rewards) * valid,
        "logps/chosen": chosen_logps * valid,
        "logps/rejected": rejected_logps * valid,
        "num_pairs": valid,
    }
    metrics = {name: x.detach().sum() for name, x in per_pair.items()}
    per_side = {"sequence_logps": sums.detach(), "rewards": rewards.detach()}
    return losses.sum().float(), metrics | per_side


def loss_at_reference(
    reference_logps: Tensor,  # (N,) per-token log-probs
    sequence_id: Tensor,  # (N,)
    response_lengths: Tensor,  # (2B,)
    pair_weights: Tensor,  # (B,)
    pair_margins: Tensor,  # (B,)
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """What `dpo_loss` must say where the policy is the reference, and how steep it is there.

    Returns two float64 scalars without gradient: the "preference_loss" of `dpo_loss` (a sum over
    pairs, times their weights, not times preference_loss_weight), and the sum over pairs of
    (|dL / d chosen| + |dL / d rejected|) / 2 with respect to the two sides' sums of log-ratios: an
    error of d nats in each sum moves the loss by about d times this.
    """
    weights = pair_weights.double()
    sums = sequence_sums(reference_logps.detach(), sequence_id, response_lengths.shape[0])
    with torch.enable_grad():
        log_ratio_sums = torch.zeros_like(sums).requires_grad_()
        pairs = _pairs(
            sums + log_ratio_sums, log_ratio_sums, response_lengths, pair_margins, options
        )
        loss = _preference(pairs, weights, options).sum()
        (slopes,) = torch.autograd.grad(loss, log_ratio_sums)
    return loss.detach(), 0.5 * slopes.abs().sum()


def _ld_sums(
    values: Tensor,  # (N,) float64
    sequence_id: Tensor,  # (N,)
    lengths: Tensor,  # (2B,)
    ld_alpha: float | None,
) -> Tensor:  # (2B,)
    """Sums over tokens; those beyond the pair's shorter response count ld_alpha (None = 1).

    LD-DPO, arXiv:2409.06411.
    """
    if ld_alpha is not None:
        shared = lengths.view(-1, 2).amin(1).repeat_interleave(2)
        starts = lengths.cumsum(0) - lengths
        position = torch.arange(values.shape[0], device=values.device) - starts[sequence_id]
        values = torch.where(position < shared[sequence_id], values, ld_alpha * values)
    return sequence_sums(values, sequence_id, lengths.shape[0])


def _pairs(
    sums: Tensor,  # (2B,) of the policy's log-probs
    log_ratio_sums: Tensor | None,  # (2B,)
    lengths: Tensor,  # (2B,)
    margins: Tensor,  # (B,)
    options: LossOptions,
) -> Pairs:
    lengths = lengths.double().view(-1, 2)
    log_ratios = scores = None
    if log_ratio_sums is not None:
        log_ratios = log_ratio_sums.view(-1, 2)
        scores = f_divergence_scores(log_ratios, options)
        if options.preference_average_log_probs:
            log_ratios, scores = log_ratios / lengths, scores / lengths
    return Pairs(log_ratios, scores, sums.view(-1, 2) / lengths, lengths, margins.double())


def _preference(pairs: Pairs, weights: Tensor, options: LossOptions) -> Tensor:  # (B,)
    """The weighted preference losses; 0 where there is nothing to compute and no need to."""
    if pairs.scores is None and not {name for name, _ in options.losses} <= set(REFERENCE_FREE):
        assert options.preference_loss_weight == 0, f"no reference for {options.losses}"
        return torch.zeros_like(weights)
    return weights * preference_losses(pairs, options)


def _rewards(pairs: Pairs, options: LossOptions) -> Tensor:  # (B, 2)
    if pairs.log_ratios is None:
        return options.beta * pairs.mean_logps
    if [name for name, _ in options.losses] == ["sigmoid_norm"]:
        return options.beta * pairs.log_ratios / pairs.lengths
    return options.beta * pairs.log_ratios
