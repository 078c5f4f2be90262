"""The losses once more, one pair and one token at a time in Python floats, from their papers.

Shares nothing with reinforcer_tp. Names: x = beta * (s_chosen - s_rejected) - margin of a pair,
c and d = beta times the chosen and rejected log-ratio, e = label smoothing.
"""

from __future__ import annotations

import math
from types import SimpleNamespace


def nls(x: float) -> float:
    """-log sigmoid(x)"""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def smoothed(x: float, e: float) -> float:
    return (1 - e) * nls(x) + e * nls(-x)


def exo(x: float, e: float) -> float:
    """KL(model || labels) of two outcomes, log of the model's shares as -nls."""
    return sig(x) * (-nls(x) - math.log(1 - e)) + sig(-x) * (-nls(-x) - math.log(e))


def discopop(x: float, tau: float) -> float:
    g = sig(x / tau)
    exponential = math.exp(-x) * g if x > -300 else 0.0  # exp(|x| (1 - 1 / tau)) is 0 there
    return nls(x) * (1 - g) + exponential


def log_odds(mean_logp: float) -> float:
    """log(p / (1 - p)) with p = exp(mean_logp)"""
    return mean_logp - math.log(-math.expm1(mean_logp))


FORMULAS = {
    "sigmoid": lambda p, o: smoothed(p.x, o.label_smoothing),
    "rpo": lambda p, o: smoothed(p.x, o.label_smoothing),
    "sigmoid_norm": lambda p, o: smoothed(o.beta * p.mean_delta - p.m, o.label_smoothing),
    "robust": lambda p, o: (
        ((1 - o.label_smoothing) * nls(p.x) - o.label_smoothing * nls(-p.x))
        / (1 - 2 * o.label_smoothing)
    ),
    "hinge": lambda p, o: max(0.0, 1 - p.x),
    "ipo": lambda p, o: (p.mean_delta - 1 / (2 * o.beta)) ** 2,
    "apo_zero": lambda p, o: (1 - sig(p.c)) + sig(p.d),
    "apo_down": lambda p, o: sig(p.c) + (1 - sig(p.c - p.d)),
    "sppo_hard": lambda p, o: (
        (p.c / o.beta - 1 / (2 * o.beta)) ** 2 + (p.d / o.beta + 1 / (2 * o.beta)) ** 2
    ),
    "nca_pair": lambda p, o: nls(p.c) + 0.5 * nls(-p.c) + 0.5 * nls(-p.d),
    "bco_pair": lambda p, o: nls(p.c) + nls(-p.d),
    "exo_pair": lambda p, o: exo(p.x + p.m, o.label_smoothing),
    "discopop": lambda p, o: discopop(p.x + p.m, o.discopop_tau),
    "simpo": lambda p, o: smoothed(
        o.beta * (p.a[0] - p.a[1]) - o.simpo_gamma - p.m, o.label_smoothing
    ),
    "orpo": lambda p, o: o.beta * nls(log_odds(p.a[0]) - log_odds(p.a[1])),
}


def f_score(r: float, kind: str, alpha: float) -> float:
    """f'(u) at u = exp(r) (plus a constant) of the divergence"""
    if kind == "forward_kl":
        return 1 - math.exp(min(-r, 80))
    if kind == "js_divergence":
        return math.log(2) - nls(r)  # log(2 u / (1 + u))
    if kind == "alpha_divergence" and alpha != 1:
        return (math.exp(min((alpha - 1) * r, 80)) - 1) / (alpha - 1)
    return r


def pair_terms(policy, reference, margin: float, options) -> SimpleNamespace:
    """policy, reference: the tokens' log-probs of the chosen and of the rejected side."""
    shared = min(len(policy[0]), len(policy[1]))
    tail = 1.0 if options.ld_alpha is None else options.ld_alpha
    sums, scores, means = [], [], []
    for mine, theirs in zip(policy, reference, strict=True):
        ratio = 0.0
        for position, (logp, reference_logp) in enumerate(zip(mine, theirs, strict=True)):
            ratio += (logp - reference_logp) * (1.0 if position < shared else tail)
        score = f_score(ratio, options.f_divergence_type, options.f_alpha_divergence_coef)
        means.append(score / len(mine))
        if options.preference_average_log_probs:
            ratio, score = ratio / len(mine), score / len(mine)
        sums.append(ratio)
        scores.append(score)
    return SimpleNamespace(
        x=options.beta * (scores[0] - scores[1]) - margin,
        mean_delta=means[0] - means[1],
        c=options.beta * sums[0],
        d=options.beta * sums[1],
        a=[sum(side) / len(side) for side in policy],
        m=margin,
    )


def split(tokens: list[float], lengths: list[int]) -> list[list[list[float]]]:
    """Tokens end to end -> per pair (chosen, rejected) lists."""
    sides, start = [], 0
    for length in lengths:
        sides.append(tokens[start : start + length])
        start += length
    return [sides[i : i + 2] for i in range(0, len(sides), 2)]


def preference_loss(policy, reference, lengths, weights, margins, options) -> float:
    """The weighted sum over pairs and losses, not times preference_loss_weight."""
    total = 0.0
    pairs = zip(split(policy, lengths), split(reference, lengths), weights, margins, strict=True)
    for mine, theirs, weight, margin in pairs:
        terms = pair_terms(mine, theirs, margin, options)
        for name, factor in options.losses:
            total += weight * factor * FORMULAS[name](terms, options)
    return total


def full_loss(policy, reference, lengths, weights, margins, options) -> float:
    """The whole loss of a micro-batch, SFT term included."""
    total = options.preference_loss_weight * preference_loss(
        policy, reference, lengths, weights, margins, options
    )
    for (chosen, _), weight in zip(split(policy, lengths), weights, strict=True):
        sft = -sum(chosen) / (len(chosen) if options.sft_average_log_probs else 1)
        total += options.sft_loss_weight * weight * sft
    return total
