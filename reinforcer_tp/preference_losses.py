"""The menu of preference losses: pure functions from a micro-batch's pairs to one loss a pair.

Names and conventions are TRL's (1.16) where it has the loss. Legend: B pairs, r = policy minus
reference log-prob of a response (its log-ratio), s = the f-divergence's map of r (s = r for the
reverse KL), delta = s_chosen - s_rejected, a = mean log-prob of a response's tokens under the
policy, m = the pair's margin, e = label_smoothing. All float64; finite with finite gradients for
log-ratios up to +-1e4 and far beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(80) still fits float32 and bfloat16; TRL clamps the alpha divergence there.
_MAX_EXPONENT = 80.0
# The square of more would overflow the float32 loss; only exponential scores ever get there.
_MAX_IPO_DELTA = 1e17
# Closest to 0 that a mean log-prob counts as: nearer, 1 - p is below float32's resolution.
_MAX_MEAN_LOGP = -(2.0**-24)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What decides the loss of a pair; the values are checked where the configuration is read."""

    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # name in LOSSES, weight; summed
    beta: float  # of arXiv:2305.18290; the scale of each loss's rewards
    preference_loss_weight: float = 1.0  # factor of that sum
    sft_loss_weight: float = 0.0  # factor of the chosen side's negative log-likelihood
    preference_average_log_probs: bool = False  # divide log-ratios by the response's tokens
    sft_average_log_probs: bool = False  # likewise the SFT term
    label_smoothing: float = 0.0  # share of pairs taken for wrongly labelled, below 0.5
    discopop_tau: float = 0.05  # temperature of discopop's blend, in (0, 1]
    simpo_gamma: float = 0.5  # target reward margin of simpo
    ld_alpha: float | None = None  # weight of tokens beyond the shorter response; None = 1
    f_divergence_type: str = "reverse_kl"  # in F_DIVERGENCES
    f_alpha_divergence_coef: float = 0.5  # alpha of alpha_divergence


@dataclass(frozen=True)
class Pairs:
    """What the losses read. Columns: chosen, rejected. Without a reference r and s are None."""

    log_ratios: Tensor | None  # (B, 2) r; per token with preference_average_log_probs
    scores: Tensor | None  # (B, 2) s; likewise
    mean_logps: Tensor  # (B, 2) a
    lengths: Tensor  # (B, 2) response tokens
    margins: Tensor  # (B,) m


def f_divergence_scores(log_ratios: Tensor, options: LossOptions) -> Tensor:
    """s = f'(exp(r)), up to a constant, for the divergence f of policy and reference.

    reverse_kl: r; forward_kl: 1 - exp(-r); js_divergence: log 2 + log sigmoid(r);
    alpha_divergence: (exp((alpha - 1) r) - 1) / (alpha - 1), r at alpha = 1. Exponents stop
    at 80, where the gradient ends. arXiv:2309.16240.
    """
    kind, alpha = options.f_divergence_type, options.f_alpha_divergence_coef
    if kind == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=_MAX_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=_MAX_EXPONENT)) / (alpha - 1)
    assert kind in F_DIVERGENCES, kind
    return log_ratios


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """DPO: -log sigmoid(beta delta - m). Eq. 7, arXiv:2305.18290.

    m: ODPO's offset, arXiv:2402.10571. With label smoothing (conservative DPO,
    Eq. 3 of https://ericmitchell.ai/cdpo.pdf): -(1 - e) log sigmoid(x) - e log sigmoid(-x).
    """
    return _smoothed(_logits(pairs, options), options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> Tensor:
    """`sigmoid` of scores divided by their response's tokens. arXiv:2411.15124 (Tulu 3)."""
    logits = options.beta * _difference(pairs.scores / pairs.lengths) - pairs.margins
    return _smoothed(logits, options.label_smoothing)


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """Unbiased under labels flipped with probability e. arXiv:2403.00409.

    (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e), x = beta delta - m.
    """
    x, smoothing = _logits(pairs, options), options.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(x) + smoothing * F.logsigmoid(-x)
    return losses / (1 - 2 * smoothing)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """max(0, 1 - (beta delta - m)). arXiv:2309.06657 (RSO), from SLiC."""
    return torch.relu(1 - _logits(pairs, options))


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """(delta' - 1 / (2 beta))^2, delta' of scores per token. Eq. 17, arXiv:2310.12036.

    The paper writes sums over tokens; the mean over tokens is TRL's convention, so that
    one beta fits responses of any length.
    """
    delta = _difference(pairs.scores / pairs.lengths)
    return (delta.clamp(-_MAX_IPO_DELTA, _MAX_IPO_DELTA) - 1 / (2 * options.beta)) ** 2


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected). Eq. 7, arXiv:2408.06266, plus 1."""
    chosen, rejected = _rewards(pairs, options)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, options: LossOptions) -> Tensor:
    """sigmoid(beta r_chosen) + 1 - sigmoid(beta (r_chosen - r_rejected)). Eq. 8 there, plus 1."""
    chosen, rejected = _rewards(pairs, options)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def sppo_hard(pairs: Pairs, options: LossOptions) -> Tensor:
    """(r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2.

    Eq. 4.7, arXiv:2405.00675, with eta = 1 / beta and a win probability of 1 for the chosen side.
    """
    target = 1 / (2 * options.beta)
    return (pairs.log_ratios[:, 0] - target) ** 2 + (pairs.log_ratios[:, 1] + target) ** 2


def nca_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-d)) / 2, c and d = beta r of the sides.

    NCA with two responses. arXiv:2402.05369.
    """
    chosen, rejected = _rewards(pairs, options)
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def bco_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta r_chosen) - log sigmoid(-beta r_rejected). arXiv:2404.04656.

    A binary classifier of the two sides, without the paper's reward shift, as in TRL.
    """
    chosen, rejected = _rewards(pairs, options)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def exo_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """Reverse KL of sigmoid(beta delta) to the label 1 - e. Eq. 16, arXiv:2402.00856.

    q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid(beta delta).
    """
    x = options.beta * _difference(pairs.scores)
    chosen = F.logsigmoid(x) - math.log1p(-options.label_smoothing)
    rejected = F.logsigmoid(-x) - math.log(options.label_smoothing)
    return torch.sigmoid(x) * chosen + torch.sigmoid(-x) * rejected


def discopop(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(x) (1 - g) + exp(-x) g, g = sigmoid(x / tau), x = beta delta.

    Log-ratio modulated loss, Eq. 5, arXiv:2406.08414. exp(-x) g as one exponential, which for
    tau <= 1 never exceeds 1.
    """
    x, tau = options.beta * _difference(pairs.scores), options.discopop_tau
    exponential = torch.exp(-x + F.logsigmoid(x / tau))
    return -F.logsigmoid(x) * torch.sigmoid(-x / tau) + exponential


def simpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """-log sigmoid(beta (a_chosen - a_rejected) - gamma - m). Eq. 6, arXiv:2405.14734.

    No reference. gamma is the paper's and not divided by beta. Smoothed labels as in `sigmoid`.
    """
    logits = options.beta * _difference(pairs.mean_logps) - options.simpo_gamma - pairs.margins
    return _smoothed(logits, options.label_smoothing)


def orpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """-beta log sigmoid(log odds_chosen - log odds_rejected), odds = p / (1 - p), p = exp(a).

    No reference. Eq. 4 and 7, arXiv:2403.07691; beta is its lambda, the SFT term is the caller's.
    """
    mean_logps = pairs.mean_logps.clamp(max=_MAX_MEAN_LOGP)
    log_odds = mean_logps - torch.log(-torch.expm1(mean_logps))
    return -options.beta * F.logsigmoid(_difference(log_odds))


LOSSES: dict[str, Callable[[Pairs, LossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "rpo": sigmoid,  # with an SFT term, arXiv:2404.19733
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "simpo": simpo,
    "orpo": orpo,
}
REFERENCE_FREE = ("simpo", "orpo")
WITH_MARGINS = ("sigmoid", "rpo", "sigmoid_norm", "robust", "hinge", "simpo")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def uses_reference(options: LossOptions) -> bool:
    """Whether the loss reads reference log-probs at all."""
    names = {name for name, _ in options.losses}
    return options.preference_loss_weight > 0 and not names <= set(REFERENCE_FREE)


def uses_margins(name: str) -> bool:
    """Whether the loss of this name subtracts the pairs' margins."""
    return name in WITH_MARGINS


def preference_losses(pairs: Pairs, options: LossOptions) -> Tensor:  # (B,) float64
    """The weighted sum of the chosen losses of each pair."""
    return sum(weight * LOSSES[name](pairs, options) for name, weight in options.losses)


def _difference(sides: Tensor) -> Tensor:  # (B, 2) -> (B,) chosen - rejected
    return sides[:, 0] - sides[:, 1]


def _logits(pairs: Pairs, options: LossOptions) -> Tensor:
    return options.beta * _difference(pairs.scores) - pairs.margins


def _rewards(pairs: Pairs, options: LossOptions) -> tuple[Tensor, Tensor]:
    return (options.beta * pairs.log_ratios).unbind(1)


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
