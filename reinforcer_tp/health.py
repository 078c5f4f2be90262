"""How a run is doing: sums of each micro-batch, metrics of a step, and hints in plain words.

Legend: B pairs, S = 2B sequences (2i is the chosen and 2i + 1 the rejected side of pair i),
N response tokens, d = log-prob under the policy minus log-prob under the reference.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from reinforcer_tp.loss import sequence_sums

# What health_sums returns: counts and sums over the pairs of weight > 0, or over their tokens.
SUMS = (
    "health/pairs",
    "health/margin",
    "health/margin_squared",
    "health/length",  # chosen minus rejected response tokens
    "health/length_squared",
    "health/margin_length",
    "health/saturated",
    "health/reference_pairs",  # those with a reference
    "health/chosen_down",
    "health/chosen_d",
    "health/rejected_d",
    "health/chosen_tokens",
    "health/rejected_tokens",
    "health/k3_pairs",  # those with a reference for every token
    "health/chosen_k3",
    "health/rejected_k3",
    "health/entropy",
    "health/entropy_tokens",
)

# A pair is saturated when sigmoid(reward margin) is above this: its gradient is under 1 % of what
# it was at the start.
SATURATED_PROBABILITY = 0.99
# exp(-d) of the k3 estimate overflows; below this d one token would be most of any mean anyway.
MIN_K3_LOG_RATIO = -20.0
# Losses whose rewards are means over tokens, and those that ask for more than the difference.
_PER_TOKEN = {"sigmoid_norm", "ipo", "simpo", "orpo"}
_HOLD_CHOSEN = {"apo_zero", "nca_pair", "bco_pair", "sppo_hard"}
_SMOOTHED = {"sigmoid", "rpo", "sigmoid_norm", "simpo"}  # take dpo.label_smoothing as cDPO does

# Below this share of its mean square a variance is rounding: a correlation would be noise.
_MIN_VARIANCE = 1e-12


@torch.no_grad()
def health_sums(
    policy_logps: Tensor,  # (N,) per token
    entropies: Tensor | None,  # (N,) nats, of the policy's distribution at each response token
    reference_logps: Tensor | None,  # (N,) per token; None = reference-free
    sequence_id: Tensor,  # (N,) int64 in [0, 2B), never decreasing
    response_lengths: Tensor,  # (2B,) response tokens, at least 1
    pair_weights: Tensor,  # (B,) >= 0
    rewards: Tensor,  # (B, 2) chosen and rejected, as the loss has them
    *,
    token_reference: bool = True,
) -> dict[str, Tensor]:
    """The sums `SUMS` of one micro-batch as float64 scalars; what does not apply is 0.

    `token_reference=False` says that only sums of `reference_logps` over a sequence mean
    something. Pairs of weight 0 do not count. Never waits for the device.

    k3 of a token is exp(-d) - 1 + d (http://joschu.net/blog/kl-approx.html), at least 0, with d
    clamped from below at MIN_K3_LOG_RATIO. Its mean is unbiased for the KL divergence only on the
    policy's own samples; on preference data it is a distance to the reference.
    """
    is_valid = pair_weights > 0  # (B,)
    num_sequences = response_lengths.shape[0]

    def by_pair(logps: Tensor) -> tuple[Tensor, Tensor]:  # (N,) -> (B,) chosen, (B,) rejected
        sums = sequence_sums(logps, sequence_id, num_sequences).view(-1, 2)
        # where, not *: a NaN of a pair of weight 0 stays out.
        return torch.where(is_valid[:, None], sums, 0.0).unbind(1)

    lengths = (response_lengths.view(-1, 2) * is_valid[:, None]).double()  # (B, 2)
    rewards = torch.where(is_valid[:, None], rewards.double(), 0.0)
    per_pair = _margin_terms(rewards[:, 0] - rewards[:, 1], lengths[:, 0] - lengths[:, 1])
    per_pair["health/pairs"] = is_valid
    if reference_logps is not None:
        d = policy_logps.double() - reference_logps.double()
        chosen_d, rejected_d = by_pair(d)
        per_pair["health/reference_pairs"] = is_valid
        per_pair["health/chosen_down"] = chosen_d < 0
        per_pair["health/chosen_d"], per_pair["health/rejected_d"] = chosen_d, rejected_d
        per_pair["health/chosen_tokens"], per_pair["health/rejected_tokens"] = lengths.unbind(1)
    if reference_logps is not None and token_reference:
        d = d.clamp(min=MIN_K3_LOG_RATIO)
        k3 = by_pair(torch.expm1(-d) + d)
        per_pair["health/chosen_k3"], per_pair["health/rejected_k3"] = k3
        per_pair["health/k3_pairs"] = is_valid
    if entropies is not None:
        per_pair["health/entropy"] = torch.add(*by_pair(entropies))
        per_pair["health/entropy_tokens"] = lengths.sum(1)
    zeros = torch.zeros_like(lengths[:, 0])
    table = torch.stack([per_pair.get(name, zeros).double() for name in SUMS])
    return dict(zip(SUMS, table.sum(1).unbind(), strict=True))


def _margin_terms(margins: Tensor, length_differences: Tensor) -> dict[str, Tensor]:
    """(B,) both, 0 for a pair that does not count."""
    limit = math.log(SATURATED_PROBABILITY / (1 - SATURATED_PROBABILITY))
    return {
        "health/margin": margins,
        "health/margin_squared": margins * margins,
        "health/length": length_differences,
        "health/length_squared": length_differences * length_differences,
        "health/margin_length": margins * length_differences,
        "health/saturated": margins > limit,
    }


def health_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from `SUMS` added over all its micro-batches and ranks.

    health/chosen_down      share of pairs whose chosen log-prob is below the reference's
    health/chosen_drift     mean d per chosen token, nats; likewise health/rejected_drift
    health/length_bias      Pearson correlation of reward margin with chosen - rejected tokens
    health/saturated        share of pairs with sigmoid(reward margin) > SATURATED_PROBABILITY
    kl/chosen_k3            mean k3 per chosen token, nats; likewise kl/rejected_k3
    entropy                 mean per response token, nats

    A metric that nothing was counted for, or whose variance is rounding, is left out.
    """
    s = {name.removeprefix("health/"): sums[name] for name in SUMS}
    metrics: dict[str, float] = {}
    if s["pairs"] > 0:
        metrics["health/saturated"] = s["saturated"] / s["pairs"]
        if (correlation := _correlation(s)) is not None:
            metrics["health/length_bias"] = correlation
    if s["reference_pairs"] > 0:
        metrics["health/chosen_down"] = s["chosen_down"] / s["reference_pairs"]
        for side in ("chosen", "rejected"):
            tokens = s[f"{side}_tokens"]
            metrics[f"health/{side}_drift"] = s[f"{side}_d"] / tokens
            if s["k3_pairs"] > 0:
                metrics[f"kl/{side}_k3"] = s[f"{side}_k3"] / tokens
    if s["entropy_tokens"] > 0:
        metrics["entropy"] = s["entropy"] / s["entropy_tokens"]
    return metrics


def _correlation(s: Mapping[str, float]) -> float | None:
    n = s["pairs"]
    margin, length = s["margin"] / n, s["length"] / n
    squares = s["margin_squared"] / n, s["length_squared"] / n
    variances = squares[0] - margin**2, squares[1] - length**2
    if any(v <= _MIN_VARIANCE * q for v, q in zip(variances, squares, strict=True)):
        return None
    covariance = s["margin_length"] / n - margin * length
    # Square roots apart: the product of two small variances may underflow.
    correlation = covariance / math.sqrt(variances[0]) / math.sqrt(variances[1])
    return min(max(correlation, -1.0), 1.0)


class HealthWatch:
    """Says in plain words when a mean over the last WINDOW steps looks wrong, and what may help.

    A condition speaks once, and again only after it was absent for WINDOW steps.
    """

    WINDOW = 10  # steps: one odd batch says nothing
    CHOSEN_DOWN = 0.5  # share of pairs: more fall than rise
    CHOSEN_DRIFT = -0.1  # nats a token: each chosen token lost 10 % of its probability
    LENGTH_BIAS = 0.5  # |correlation|: length explains a quarter of the margins' variance
    LENGTH_BIAS_PAIRS = 64  # in the window; of fewer pairs chance alone gives such a correlation
    SATURATED = 0.9  # share of pairs: a tenth of the batch still teaches
    CHOSEN_K3 = 1.0  # nats a token, on the responses that the policy should be close on
    ENTROPY_LEFT = 0.25  # share of the first step's entropy

    def __init__(
        self,
        *,
        beta: float,
        sft_loss_weight: float,
        losses: Sequence[str],  # names as in dpo.preference_loss
        averages: bool = False,  # dpo.preference_average_log_probs
    ):
        self._beta = beta
        self._sft_loss_weight = sft_loss_weight
        self._losses = frozenset(losses)
        self._is_per_token = averages or self._losses <= _PER_TOKEN
        self._window: deque[dict[str, float]] = deque(maxlen=self.WINDOW)
        self._first_entropy: float | None = None
        self._absent_steps: dict[str, int] = {}  # of the conditions that spoke

    def hints(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """Lines about step `step` (from 1), whose `metrics` are named with train/; mostly none.

        A step that was skipped, which has no loss, is passed over.
        """
        loss = metrics.get("train/loss", 0.0)
        if loss is None or not math.isfinite(loss):
            return []
        finite = {n: v for n, v in metrics.items() if v is not None and math.isfinite(v)}
        self._window.append(finite)
        if self._first_entropy is None:
            self._first_entropy = finite.get("train/entropy")
        if len(self._window) < self.WINDOW:
            return []
        checks = self._displacement, self._length_bias, self._saturation, self._distance
        texts = {check.__name__: check() for check in (*checks, self._entropy)}
        when = f"step {step}: over the last {self.WINDOW} steps"
        return [f"{when} {text}" for name, text in texts.items() if self._is_news(name, text)]

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had never stopped."""
        return {
            "window": list(self._window),
            "first_entropy": self._first_entropy,
            "absent_steps": self._absent_steps,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_json`."""
        self._window.extend(saved["window"])
        self._first_entropy = saved["first_entropy"]
        self._absent_steps = dict(saved["absent_steps"])

    def _is_news(self, name: str, text: str | None) -> bool:
        if text is not None:
            is_news = name not in self._absent_steps
            self._absent_steps[name] = 0
            return is_news
        absent_steps = self._absent_steps.pop(name, self.WINDOW) + 1
        if absent_steps < self.WINDOW:
            self._absent_steps[name] = absent_steps
        return False

    def _over_window(self, name: str, statistic: Callable[..., float] = fmean) -> float:
        """NaN, which no comparison holds for, unless every step of the window has the metric."""
        values = [metrics.get(f"train/{name}", math.nan) for metrics in self._window]
        return math.nan if any(map(math.isnan, values)) else statistic(values)

    def _displacement(self) -> str | None:
        share = self._over_window("health/chosen_down")
        drift = self._over_window("health/chosen_drift")
        if not (share > self.CHOSEN_DOWN and drift < self.CHOSEN_DRIFT):
            return None
        if "apo_down" in self._losses:  # lowers them on purpose
            return None
        text = (
            "the chosen responses were less likely than under the reference "
            f"({100 * share:.0f} % of pairs, {drift:+.2f} nats a token). "
        )
        fix = "add dpo.sft_loss_weight=0.1"
        if self._sft_loss_weight > 0:
            fix = f"raise dpo.sft_loss_weight (now {self._sft_loss_weight:g})"
        if self._losses & _HOLD_CHOSEN:
            return f"{text}To hold them up {fix}"
        text += "The loss trains only the difference to the rejected ones; to hold the chosen up "
        return f"{text}{fix}, or try dpo.preference_loss=apo_zero"

    def _length_bias(self) -> str | None:
        correlation = self._over_window("health/length_bias")
        num_pairs = self._over_window("num_pairs", sum)
        if not (abs(correlation) > self.LENGTH_BIAS and num_pairs >= self.LENGTH_BIAS_PAIRS):
            return None
        fix = "To take length out set dpo.preference_average_log_probs=true or dpo.ld_alpha=0.5"
        if self._is_per_token:
            fix = "The loss is per token already: see whether the data prefer one length"
        longer = "longer" if correlation > 0 else "shorter"
        return (
            f"reward margins grew with how much {longer} the chosen response is than the rejected "
            f"one (correlation {correlation:+.2f}). {fix}"
        )

    def _saturation(self) -> str | None:
        share = self._over_window("health/saturated")
        # ipo asks for a margin that counts as decided, and goes on teaching there.
        if self._losses == {"ipo"} or not share > self.SATURATED:
            return None
        smoothing = ", or set dpo.label_smoothing=0.1" if self._losses & _SMOOTHED else ""
        return (
            f"{100 * share:.0f} % of pairs were decided (probability of the chosen response above "
            f"{SATURATED_PROBABILITY}) and taught little. Stop earlier (dpo.max_num_steps), or "
            f"lower policy.megatron_cfg.optimizer.lr{smoothing}"
        )

    def _distance(self) -> str | None:
        # The median: one token that the policy gave up can be most of a step's k3.
        distance = self._over_window("kl/chosen_k3", median)
        if not distance > self.CHOSEN_K3:
            return None
        return (
            f"the policy was far from the reference ({distance:.2f} nats a token by k3 on the "
            f"chosen responses). To keep it closer {self._hold_back()}"
        )

    def _entropy(self) -> str | None:
        entropy, first = self._over_window("entropy"), self._first_entropy
        if first is None or not entropy < self.ENTROPY_LEFT * first:
            return None
        return (
            f"the policy was nearly certain of each token (entropy {entropy:.3f} nats, at first "
            f"{first:.3f}), so its samples will hardly vary. To stop that {self._hold_back()}"
        )

    def _hold_back(self) -> str:
        beta = f"dpo.reference_policy_kl_penalty (now {self._beta:g})"
        return f"raise {beta} or lower policy.megatron_cfg.optimizer.lr"
