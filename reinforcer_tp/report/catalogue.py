"""Which charts the report has, in their order: plain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One metric of a chart; colour and dash are those of a page of one run."""

    metric: str  # its name in metrics.jsonl
    label: str
    color: int  # of the page's palette
    dash: str = "solid"
    points: bool = False  # few values, each of which is marked; else raw and smooth


@dataclass(frozen=True)
class Chart:
    """At most four lines over steps."""

    key: str
    section: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    absent: str  # why there may be no values
    note: str = ""


_NO_LOG = "metrics.jsonl has no such values"
_NO_REFERENCE = "reference.mode=none, or metrics.jsonl has no such values"


def _both(metric: str, label: str = "", color: int = 0) -> tuple[Line, Line]:
    """Train and validation."""
    space = " " * bool(label)
    return (
        Line(f"train/{metric}", f"{label}{space}train", color),
        Line(f"validation/{metric}", f"{label}{space}validation", color + 4, "dash", points=True),
    )


def _sides(metric: str) -> tuple[Line, ...]:
    """Chosen and rejected; `metric` has {} for the side."""
    return (
        *_both(metric.format("chosen"), "chosen", 0),
        *_both(metric.format("rejected"), "rejected", 1),
    )


CHARTS = (
    Chart("loss", "Learning", "Loss", "loss", _both("loss"), _NO_LOG),
    Chart(
        *("accuracy", "Learning", "Accuracy", "share of pairs"),
        _both("rewards/accuracies", color=2),
        _NO_LOG,
        "Pairs whose chosen response has the higher reward.",
    ),
    Chart(
        *("margin", "Learning", "Reward margin", "reward"),
        _both("rewards/margins", color=3),
        _NO_LOG,
        "Reward of the chosen minus that of the rejected response.",
    ),
    Chart(
        *("rewards", "Learning", "Rewards", "reward"),
        _sides("rewards/{}"),
        _NO_LOG,
        "Log-probability over the reference's, times beta.",
    ),
    Chart(
        *("preference", "Learning", "Preference loss", "loss"),
        _both("preference_loss"),
        _NO_LOG,
        "Before its weight, dpo.preference_loss_weight.",
    ),
    Chart(
        *("sft", "Learning", "SFT loss", "loss"),
        _both("sft_loss", color=1),
        _NO_LOG,
        "Before its weight, dpo.sft_loss_weight; recorded also where that is 0.",
    ),
    Chart(
        *("drift", "Distance from the reference", "Displacement", "nats a token"),
        _sides("health/{}_drift"),
        _NO_REFERENCE,
        "Mean change of a token's log-probability. Chosen below 0: they became less likely.",
    ),
    Chart(
        *("shares", "Distance from the reference", "Displaced and decided pairs"),
        "share of pairs",
        (*_both("health/chosen_down", "chosen fell", 0), *_both("health/saturated", "decided", 2)),
        _NO_REFERENCE,
        "Decided: the probability of the chosen response is above 0.99, so the pair teaches "
        "little.",
    ),
    Chart(
        *("logps", "Distance from the reference", "Log-probabilities", "nats a response"),
        _sides("logps/{}"),
        _NO_LOG,
    ),
    Chart(
        *("kl", "Distance from the reference", "KL (k3 estimate)", "nats a token"),
        _sides("kl/{}_k3"),
        "the reference's log-probabilities are not known for each token",
    ),
    Chart(
        *("entropy", "Distance from the reference", "Entropy", "nats a token"),
        _both("entropy", color=2),
        _NO_LOG,
    ),
    Chart(
        *("length", "Distance from the reference", "Length bias", "correlation"),
        _both("health/length_bias", color=3),
        _NO_LOG,
        "Of the reward margin with how much longer the chosen response is.",
    ),
    Chart(
        *("gradient", "Optimizer", "Gradient norm", "before clipping"),
        (Line("train/grad_norm", "gradient norm", 0),),
        _NO_LOG,
    ),
    Chart(
        *("lr", "Optimizer", "Learning rate", "learning rate"),
        (Line("train/lr", "learning rate", 2, points=False),),
        _NO_LOG,
    ),
    Chart(
        *("skipped", "Optimizer", "Skipped steps", "steps so far"),
        (Line("train/skipped_steps", "skipped", 1),),
        "dpo.on_nonfinite is not skip",
    ),
    Chart(
        *("pairs_per_s", "Speed", "Pairs per second", "pairs/s"),
        (Line("perf/pairs_per_s", "all devices", 0),),
        _NO_LOG,
    ),
    Chart(
        *("tokens_per_s", "Speed", "Tokens per second", "tokens/s"),
        (
            Line("perf/tokens_per_s", "tokens", 0),
            Line("perf/padded_tokens_per_s", "with padding", 1, "dash"),
        ),
        _NO_LOG,
        "A shared prompt counts once.",
    ),
    Chart(
        *("mfu", "Speed", "Model FLOP utilisation", "share of the peak"),
        (Line("perf/mfu", "MFU", 3),),
        "the peak rate of this device is not known",
    ),
    Chart(
        *("tflops", "Speed", "TFLOP/s per device", "TFLOP/s"),
        (Line("perf/tflops_per_gpu", "TFLOP/s", 2),),
        _NO_LOG,
    ),
    Chart(
        *("memory", "Memory and padding", "Peak memory", "GiB"),
        (Line("memory/peak_gib", "rank 0", 0),),
        _NO_LOG,
        "Of the device with CUDA, of the process without.",
    ),
    Chart(
        *("padding", "Memory and padding", "Padding", "share of the slots"),
        (Line("train/padding_fraction", "padding", 1),),
        _NO_LOG,
    ),
    Chart(
        *("batch", "Memory and padding", "Tokens in a step", "tokens"),
        (Line("train/num_tokens", "tokens", 0),),
        _NO_LOG,
    ),
)

# perf/step_s and what it consists of; the rest is "other".
STEP_S = "perf/step_s"
TIME_PARTS = (
    Line("perf/compute_s", "compute", 0),
    Line("perf/optimizer_s", "optimizer", 2),
    Line("perf/reference_s", "reference", 1),
    Line("perf/data_wait_s", "data wait", 3),
)
OTHER_COLOR = 8
LENGTH_PARTS = (("prompt", 3, "dot"), ("chosen", 0, "solid"), ("rejected", 1, "dash"))
SECTIONS = (
    *("Learning", "Distance from the reference", "Optimizer", "Speed", "Memory and padding"),
    "Data",
)
EXTRA_METRICS = {  # in tables, or in no chart on purpose
    *("train/num_pairs", "validation/num_pairs", "perf/validation_s", "perf/reference_tokens"),
    *("perf/sweep_s", "memory/before_model_gib"),
}
