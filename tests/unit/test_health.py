"""Health sums and metrics against float64 loops over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from reinforcer_tp.health import SUMS, health_metrics, health_sums

BETA = 0.3


@dataclass
class Tokens:
    """Per-token numbers of a batch; `lengths` (2B,) response tokens, chosen first."""

    policy: np.ndarray  # (N,)
    reference: np.ndarray
    entropy: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray  # (B,)

    def pairs(self, chosen: list[int]) -> Tokens:
        """Those pairs, in that order."""
        ends = np.cumsum(self.lengths)
        sequences = [s for i in chosen for s in (2 * i, 2 * i + 1)]
        spans = [np.arange(ends[s] - self.lengths[s], ends[s]) for s in sequences]
        rows = np.concatenate([np.empty(0, int), *spans])
        parts = (self.policy[rows], self.reference[rows], self.entropy[rows])
        return Tokens(*parts, self.lengths[sequences], self.weights[chosen])

    def rewards(self, *, averages, reference) -> np.ndarray:  # (B, 2)
        d = self.policy - (self.reference if reference else 0.0)
        ends = np.cumsum(self.lengths)
        sums = np.array([d[end - n : end].sum() for n, end in zip(self.lengths, ends, strict=True)])
        if averages or not reference:
            sums = sums / self.lengths
        return BETA * sums.reshape(-1, 2)

    def sums(self, *, averages=False, reference=True, entropy=True, **options):
        tensor = torch.from_numpy
        return health_sums(
            tensor(self.policy).float(),
            tensor(self.entropy).float() if entropy else None,
            tensor(self.reference) if reference else None,
            tensor(np.repeat(np.arange(len(self.lengths)), self.lengths)),
            tensor(self.lengths),
            tensor(self.weights).float(),
            tensor(self.rewards(averages=averages, reference=reference)),
            **options,
        )

    def metrics(self, **options) -> dict[str, float]:
        return health_metrics({name: x.item() for name, x in self.sums(**options).items()})


def random_tokens(seed: int, num_pairs: int = 7, scale: float = 2.0) -> Tokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 2 * num_pairs)
    policy = rng.normal(-2, 1, lengths.sum()).astype(np.float32).astype(np.float64)
    reference = policy + scale * rng.normal(0.1, 1, lengths.sum())
    entropy = rng.gamma(1.0, 1.0, lengths.sum()).astype(np.float32).astype(np.float64)
    return Tokens(policy, reference, entropy, lengths, np.ones(num_pairs))


def expected_metrics(batch: Tokens, *, averages: bool, has_reference: bool) -> dict[str, float]:
    """One token and one pair at a time."""
    ends = np.cumsum(batch.lengths)
    d_tokens: dict[str, list[float]] = {"chosen": [], "rejected": []}
    downs, margins, differences, entropies = [], [], [], []
    for i, weight in enumerate(batch.weights):
        if weight == 0:
            continue
        rewards = []
        for side, s in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
            span = range(ends[s] - batch.lengths[s], ends[s])
            d = [batch.policy[t] - has_reference * batch.reference[t] for t in span]
            d_tokens[side] += d
            entropies += [batch.entropy[t] for t in span]
            per_token = averages or not has_reference
            rewards.append(BETA * math.fsum(d) / (len(d) if per_token else 1))
            if side == "chosen":
                downs.append(math.fsum(d) < 0)
        margins.append(rewards[0] - rewards[1])
        differences.append(int(batch.lengths[2 * i]) - int(batch.lengths[2 * i + 1]))
    metrics = {
        "health/saturated": np.mean([1 / (1 + math.exp(-m)) > 0.99 for m in margins]),
        "health/length_bias": np.corrcoef(margins, differences)[0, 1],
        "entropy": np.mean(entropies),
    }
    if has_reference:
        metrics["health/chosen_down"] = np.mean(downs)
        for side, d in d_tokens.items():
            metrics[f"health/{side}_drift"] = np.mean(d)
            metrics[f"kl/{side}_k3"] = np.mean([math.exp(-x) - 1 + x for x in d])
    return metrics


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("averages", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_a_loop(seed, averages, has_reference):
    batch = random_tokens(seed)
    batch.weights[[1, 4]] = 0.0, 2.5  # how much a pair weighs changes nothing, but for 0
    found = batch.metrics(averages=averages, reference=has_reference)
    expected = expected_metrics(batch, averages=averages, has_reference=has_reference)
    assert found == pytest.approx(expected, rel=1e-9)


def test_hand_computed():
    """Two pairs of 2 + 1 and 1 + 2 tokens; d: chosen -1 -1, rejected 2; chosen 3, rejected 0 1."""
    d = np.array([-1.0, -1, 2, 3, 0, 1])
    batch = Tokens(d - 3, np.full(6, -3.0), np.array([1.0, 0, 2, 0, 3, 6]), [2, 1, 1, 2], [1, 1])
    batch = replace(batch, lengths=np.array(batch.lengths), weights=np.array([1.0, 1.0]))
    e = math.e
    assert batch.metrics() == pytest.approx(
        {
            "health/chosen_down": 0.5,
            "health/chosen_drift": 1 / 3,
            "health/rejected_drift": 1.0,
            "health/length_bias": -1.0,  # margins -1.2 and 0.6, length differences 1 and -1
            "health/saturated": 0.0,
            "kl/chosen_k3": (2 * (e - 2) + e**-3 + 2) / 3,
            "kl/rejected_k3": (e**-2 + 1 + 0 + e**-1) / 3,
            "entropy": 2.0,
        }
    )


def test_saturation_starts_at_a_probability_of_99_percent():
    limit = math.log(99) / BETA
    for chosen_d, share in ((limit + 1e-3, 1.0), (limit - 1e-3, 0.0)):
        batch = Tokens(np.array([0.0, 0.0]), np.array([-chosen_d, 0.0]), *np.ones((2, 2)), None)
        batch = replace(batch, lengths=np.array([1, 1]), weights=np.ones(1))
        assert batch.metrics()["health/saturated"] == share


@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3, 4, 5, 6]], [[6], [2, 0, 5], [], [1, 3, 4]]])
def test_any_cut_into_micro_batches_gives_the_same_metrics(cuts):
    batch = random_tokens(3)
    batch.weights[2] = 0.0
    totals = dict.fromkeys(SUMS, 0.0)
    for pairs in cuts:
        for name, value in batch.pairs(pairs).sums().items():
            totals[name] += value.item()
    assert health_metrics(totals) == pytest.approx(batch.metrics(), rel=1e-12)


def test_pairs_of_weight_0_do_not_count():
    batch = random_tokens(4)
    kept = [0, 2, 3, 5, 6]
    others = Tokens(**vars(batch))
    others.weights = np.isin(np.arange(7), kept).astype(float)
    tokens_left_out = ~np.repeat(np.isin(np.arange(14) // 2, kept), batch.lengths)
    for values in (others.policy, others.reference, others.entropy):
        values[tokens_left_out] = np.nan
    for reference in (True, False):
        found = others.metrics(reference=reference)
        assert found == pytest.approx(batch.pairs(kept).metrics(reference=reference), rel=1e-12)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("averages", [True, False])
def test_extremes_are_finite(size, averages):
    batch = random_tokens(5)
    signs = np.where(np.arange(len(batch.policy)) % 3 == 0, -1.0, 1.0)
    batch.policy = batch.reference.astype(np.float32) + size * signs
    metrics = batch.metrics(averages=averages)
    assert len(metrics) == 8
    assert all(math.isfinite(value) for value in metrics.values())
    assert abs(metrics["health/length_bias"]) <= 1


def test_k3_is_never_negative_and_tiny_where_the_policy_is_the_reference():
    batch = random_tokens(6, scale=1e-9)
    metrics = batch.metrics()
    # k3 = d^2 / 2 near 0: exp(-d) - 1 would have lost it to rounding
    d = batch.policy - batch.reference
    is_chosen = np.repeat(np.arange(14) % 2 == 0, batch.lengths)
    assert metrics["kl/chosen_k3"] == pytest.approx(np.mean(d[is_chosen] ** 2) / 2, rel=1e-2, abs=0)
    assert metrics["kl/rejected_k3"] > 0


def test_k3_does_not_grow_below_its_clamp():
    k3 = []
    for d in (-20.0, -200.0):
        batch = Tokens(np.array([d, 0.0]), np.zeros(2), np.zeros(2), np.ones(2, int), np.ones(1))
        k3.append(batch.metrics()["kl/chosen_k3"])
    assert k3[0] == k3[1] == pytest.approx(math.exp(20) - 21)


def test_what_does_not_apply_is_zero_in_sums_and_absent_in_metrics():
    batch = random_tokens(7)
    for options, absent in (
        ({"entropy": False}, {"entropy"}),
        ({"token_reference": False}, {"kl/chosen_k3", "kl/rejected_k3"}),
    ):
        assert set(batch.metrics()) - set(batch.metrics(**options)) == absent
        kept = batch.metrics(**options)
        assert kept == {name: batch.metrics()[name] for name in kept}
    bare = batch.sums(entropy=False, reference=False)
    assert tuple(bare) == SUMS
    assert all(x.dtype == torch.float64 and x.shape == () for x in bare.values())
    assert {name for name, x in bare.items() if x.item() != 0} <= set(SUMS[:7])
    nothing = batch.pairs([]).sums()
    assert {x.item() for x in nothing.values()} == {0.0}
    assert batch.pairs([]).metrics() == {}


def test_no_correlation_without_variance():
    batch = random_tokens(8)
    assert "health/length_bias" not in batch.pairs([3]).metrics()  # one pair
    same = batch.pairs([0, 0, 0])  # neither varies, but sums of squares round
    assert "health/length_bias" not in same.metrics()
    equal = replace(batch, lengths=np.full(14, 4))
    for name in ("policy", "reference", "entropy"):
        setattr(equal, name, np.resize(getattr(batch, name), 56))
    assert "health/length_bias" not in equal.metrics()
    assert "health/saturated" in equal.metrics()


def test_sums_are_made_of_shapes_alone():
    """On the meta device nothing has a value: any wait for one raises."""
    meta = {"device": "meta"}
    sums = health_sums(
        torch.empty(30, requires_grad=True, **meta),
        torch.empty(30, **meta),
        torch.empty(30, dtype=torch.float64, **meta),
        torch.zeros(30, dtype=torch.int64, **meta),
        torch.ones(6, dtype=torch.int64, **meta),
        torch.ones(3, **meta),
        torch.ones(3, 2, **meta),
    )
    assert tuple(sums) == SUMS
    assert not any(x.requires_grad for x in sums.values())
