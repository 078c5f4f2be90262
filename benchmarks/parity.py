"""Is a contender right? Its log-probs and gradients against float64, and the bars for ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.contenders import Inputs

BLOCK_BYTES = 256 * 2**20  # of the (rows, V) float64 logits that exist at once
NUM_COLUMNS = 256  # rows of dweight that are compared


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Float64 results for the operands as rounded to their dtype."""

    logps: Tensor  # (N,)
    logit_max: Tensor  # (N,) largest |z| of each row
    rows: Tensor  # which tokens dhidden is known for, all if they fit in BLOCK_BYTES
    dhidden: Tensor  # (len(rows), D)
    columns: Tensor  # which vocab rows dweight is known for
    dweight: Tensor  # (len(columns), D)


@dataclass(frozen=True, kw_only=True)
class Errors:
    logp_max: float  # largest error of a log-prob
    logp_of_bar: float  # largest share of its row's bar
    dhidden_median: float  # over rows, of |error| / |row| in 2-norms
    dhidden_p99: float
    dweight_p99: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1e}" for name, value in asdict(self).items())


@torch.no_grad()
def exact_results(inputs: Inputs) -> Exact:
    hidden, weight, grad = inputs.hidden.double(), inputs.weight.double(), inputs.grad.double()
    n, v, labels = len(hidden), len(weight), inputs.labels
    block = max(BLOCK_BYTES // (8 * v), 1)
    parts = [_row_stats(h @ weight.T, y) for h, y in zip(hidden.split(block), labels.split(block))]
    odds, lse, logit_max = (torch.cat(part) for part in zip(*parts))

    rows = _spread(n, block, labels.device)
    dz = -(hidden[rows] @ weight.T).sub_(lse[rows, None]).exp_() * grad[rows, None]
    dz.scatter_(1, labels[rows, None], (odds.sigmoid() * grad)[rows, None])
    columns = _spread(v, NUM_COLUMNS, labels.device)
    dz_columns = -(hidden @ weight[columns].T).sub_(lse[:, None]).exp_() * grad[:, None]
    hit = labels[:, None] == columns
    dz_columns = torch.where(hit, (odds.sigmoid() * grad)[:, None], dz_columns)
    return Exact(
        logps=-torch.logaddexp(odds, torch.zeros_like(odds)),
        logit_max=logit_max,
        rows=rows,
        dhidden=dz @ weight,
        columns=columns,
        dweight=dz_columns.T @ hidden,
    )


def _row_stats(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-odds against the label, log-sum-exp, largest |z|); the label is kept out of the sum,
    so that a confident one keeps its digits."""
    lse, logit_max = z.logsumexp(1), z.abs().amax(1)
    target = z.gather(1, labels[:, None])
    rest = z.scatter_(1, labels[:, None], -torch.inf).logsumexp(1)
    return rest - target[:, 0], lse, logit_max


def _spread(size: int, count: int, device) -> Tensor:
    """At most `count` indices, evenly spread, the first and the last among them."""
    return torch.linspace(0, size - 1, min(size, count), device=device, dtype=torch.float64).long()


def errors_of(exact: Exact, logps: Tensor, dhidden: Tensor, dweight: Tensor) -> Errors:
    error = (logps.detach().double() - exact.logps).abs()
    bar = torch.where(exact.logit_max <= 30, 1e-5, 2e-6 * exact.logit_max)
    return Errors(
        logp_max=float(error.max()),
        logp_of_bar=float((error / bar).max()),
        dhidden_median=_row_error(dhidden[exact.rows], exact.dhidden, 0.5),
        dhidden_p99=_row_error(dhidden[exact.rows], exact.dhidden, 0.99),
        dweight_p99=_row_error(dweight[exact.columns], exact.dweight, 0.99),
    )


def _row_error(actual: Tensor, expected: Tensor, quantile: float) -> float:
    relative = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(relative.quantile(quantile))


def failures(errors: Errors, plain: Errors | None, dtype: torch.dtype) -> list[str]:
    """Which bars ours misses, in words. `plain` are the errors of materialised logits (None:
    they did not fit)."""
    found = []
    # "not <=" also catches NaN.
    if not errors.logp_of_bar <= 1:
        found.append(
            f"logp: max error {errors.logp_max:.2e}, {errors.logp_of_bar:.3g} times its bar "
            "(1e-5 where max|z| <= 30, else 2e-6 max|z|)"
        )
    bars = {"dhidden_p99": 5e-3, "dweight_p99": 5e-3}
    if dtype == torch.float32 and plain is not None:
        # The plain form's 99th percentile is that of confident tokens, where it has few digits
        # left; its median is that of the others.
        own = {name: 2 * getattr(plain, name) for name in (*bars, "dhidden_median")}
        bars = {name: min(bar, 5e-3) for name, bar in own.items()}
    for name, bar in bars.items():
        error = getattr(errors, name)
        if not error <= bar:
            found.append(f"{name.replace('_', ' ')} row error {error:.2e}; the bar is {bar:.2e}")
    return found


def is_something_else(errors: Errors) -> bool:
    """Whether a rival does not compute per-token log-probs and their gradients at all. Its
    confident tokens are not looked at: where logits are rounded they are off by any amount."""
    return not (
        errors.logp_max <= 0.5 and errors.dhidden_median <= 0.1 and errors.dweight_p99 <= 0.1
    )
