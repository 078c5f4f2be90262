"""The DPO loss with an optional SFT term, as pure functions over per-sequence log-prob sums.

Legend: B pairs, S = 2B sequences (2i is the chosen and 2i + 1 the rejected side of pair i),
N response tokens. Source: Eq. 7, arXiv:2305.18290; weights and averaging as in NeMo-RL's DPO.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    policy_logps: Tensor,  # (2B,) sums over response tokens
    reference_logps: Tensor,  # (2B,)
    response_lengths: Tensor,  # (2B,) response tokens, at least 1
    pair_weights: Tensor,  # (B,) >= 0
    *,
    beta: float,
    preference_loss_weight: float,
    sft_loss_weight: float,
    preference_average_log_probs: bool,
    sft_average_log_probs: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the pairs' losses, and sums of the metrics over the pairs of weight > 0.

    Per pair: w (preference_loss_weight * -log sigmoid(beta (r_chosen - r_rejected))
    + sft_loss_weight * -logp_chosen), r = policy - reference log-prob. `*_average_log_probs`
    divides r, or the SFT term, by the sequence's tokens. Nothing is divided by the number of
    pairs: the caller adds the sums of all micro-batches and ranks, then divides by `num_pairs`.

    Returns a float32 scalar with gradient and detached float64 scalars. Rewards are beta * r;
    rewards, accuracies and logps are not weighted; logps are sums over tokens, never averaged.
    """
    weights = pair_weights.double()
    valid = (weights > 0).double()
    policy_logps, lengths = policy_logps.double(), response_lengths.double()
    log_ratios = policy_logps - reference_logps.double()
    if preference_average_log_probs:
        log_ratios = log_ratios / lengths
    chosen_rewards, rejected_rewards = (beta * log_ratios).view(-1, 2).unbind(1)
    margins = chosen_rewards - rejected_rewards
    preference_losses = weights * -F.logsigmoid(margins)

    policy_chosen_logps, policy_rejected_logps = policy_logps.view(-1, 2).unbind(1)
    sft_losses = weights * -policy_chosen_logps
    if sft_average_log_probs:
        sft_losses = sft_losses / lengths.view(-1, 2)[:, 0]

    losses = preference_loss_weight * preference_losses + sft_loss_weight * sft_losses
    per_pair = {
        "loss": losses,
        "preference_loss": preference_losses,
        "sft_loss": sft_losses,
        "rewards/chosen": chosen_rewards * valid,
        "rewards/rejected": rejected_rewards * valid,
        "rewards/margins": margins * valid,
        "rewards/accuracies": (margins > 0) * valid,
        "logps/chosen": policy_chosen_logps * valid,
        "logps/rejected": policy_rejected_logps * valid,
        "num_pairs": valid,
    }
    return losses.sum().float(), {name: x.detach().sum() for name, x in per_pair.items()}
