"""What a process of the self-test measures, and when two layouts agree. Imports no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far a layout may be from the baseline: float32 sums in another order differ by less."""

    # Of any response token, absolute; below -10 relative to a tenth of it, since float32 resolves
    # large logits no finer.
    logps: float = 2e-5
    loss: float = 1e-5  # relative
    grad_norm: float = 1e-5  # relative
    gradient: float = 1e-4  # of each parameter: norm of the difference / norm of the gradient
    # A gradient below `negligible` of the total norm is what rounding leaves where terms cancel.
    # It is held against `floor` of the total instead: it may differ by 1e-4 * 1e-3 of the total.
    negligible: float = 1e-6
    floor: float = 1e-3


BOUNDS = Bounds()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process knows after its layout has run."""

    loss: float  # mean per pair, over the global batch
    grad_norm: float  # the optimizer's, to which it would clip
    logps: Mapping[int, np.ndarray]  # pair -> (C + R,) of the policy; {} before the last stage
    # Hugging Face name -> norm of (gradient - the baseline's); of the baseline: of its gradient.
    gradients: Mapping[str, float]
    num_micro_batches: int  # of this data-parallel rank
    num_empty: int  # of these without a pair


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The largest deviations of any process of a layout."""

    loss: float
    grad_norm: float
    gradient: float
    gradient_name: str  # Hugging Face name of the parameter with the largest one
    logps: float

    def problems(self) -> tuple[str, ...]:
        """Each bound that is not kept, in words."""
        checks = (
            ("loss", self.loss, BOUNDS.loss),
            ("gradient norm", self.grad_norm, BOUNDS.grad_norm),
            (f"gradient of {self.gradient_name}", self.gradient, BOUNDS.gradient),
            ("log-prob of a token", self.logps, BOUNDS.logps),
        )
        return tuple(
            f"{name} off by {value:.2e}, bound {bound:.0e}"
            for name, value, bound in checks
            if not value <= bound
        )


def compare(found: Sequence[Measured], baseline: Measured) -> Deviation:
    """The largest deviations of the processes of a layout from the baseline.

    What is no number, and a parameter or pair that only one of the two has, is infinitely far off.
    """
    total = math.hypot(*baseline.gradients.values())
    told = {name for measured in found for name in measured.gradients}
    gradients = [(math.inf, name) for name in told ^ baseline.gradients.keys()]
    for measured in found:
        for name in measured.gradients.keys() & baseline.gradients.keys():
            norm = baseline.gradients[name]
            scale = norm if norm >= BOUNDS.negligible * total else BOUNDS.floor * total
            gradients.append((_ratio(measured.gradients[name], scale), name))
    gradient, gradient_name = max(gradients)
    last_stage = [measured.logps for measured in found if measured.logps]
    return Deviation(
        loss=_largest(relative(m.loss, baseline.loss) for m in found),
        grad_norm=_largest(relative(m.grad_norm, baseline.grad_norm) for m in found),
        gradient=gradient,
        gradient_name=gradient_name,
        logps=_largest(_of_logps(logps, baseline.logps) for logps in last_stage),
    )


def relative(value: float, expected: float) -> float:
    return _ratio(abs(value - expected), abs(expected))


def _of_logps(logps: Mapping[int, np.ndarray], expected: Mapping[int, np.ndarray]) -> float:
    if logps.keys() != expected.keys():
        return math.inf
    return _largest(
        float((abs(values - wanted) / np.maximum(abs(wanted) / 10, 1)).max())
        for values, wanted in ((logps[pair], expected[pair].astype(np.float64)) for pair in logps)
    )


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return _number(difference / scale) if scale > 0 else math.inf


def _largest(values: Iterable[float]) -> float:
    return max(map(_number, values), default=math.inf)


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value
