"""Writes values.json: losses and gradients that TRL 1.16's own code gives for fixed inputs.

Runs in an environment of its own, since TRL is no dependency of this project:

    python -m venv /tmp/trl
    /tmp/trl/bin/pip install trl==1.16.0 torch --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/trl/bin/python tests/trl_values/record.py

Inputs are per-token log-probs of policy and reference, which stand in for the models: the trainer
objects are made without their constructors and given only what their loss reads. Losses are TRL's
means over pairs, gradients are with respect to the policy's per-token log-probs. Everything runs
in float64 but what TRL itself puts into float32: the alpha divergence (it knows no float64 there)
and ORPO (it casts).
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

OUTPUT = Path(__file__).parent / "values.json"
PROMPT = 2  # tokens of each prompt; their number changes nothing
BATCHES = {  # response tokens of each sequence (chosen, rejected, ...), lowest log-prob
    "near": ([5, 3, 2, 6, 4, 4, 1, 7], 0.3),
    "far": ([6, 2, 3, 5, 7, 7, 4, 1], 12.0),
}
SIMPLE = ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down", "sppo_hard", "nca_pair", "bco_pair")
DPO_CASES = [
    *({"loss_type": [name]} for name in (*SIMPLE, "discopop", "sigmoid_norm")),
    *({"loss_type": [name], "beta": 0.7} for name in (*SIMPLE, "discopop", "sigmoid_norm")),
    {"loss_type": ["discopop"], "discopop_tau": 0.5},
    {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.2},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["robust"], "label_smoothing": 0.3},
    *({"loss_type": [name], "ld_alpha": 0.4} for name in (*SIMPLE, "sigmoid_norm")),
    {"loss_type": ["sigmoid"], "ld_alpha": 0.0},
    *(
        {"loss_type": [name], "f_divergence_type": kind}
        for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "discopop")
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    {
        "loss_type": ["sigmoid"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.5,
    },
    {
        "loss_type": ["sigmoid"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.0,
    },
    {"loss_type": ["robust"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
    {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "f_divergence_type": "js_divergence"},
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    {"loss_type": ["hinge", "apo_zero", "nca_pair"], "loss_weights": [1.0, 0.5, 2.0]},
    {"loss_type": ["sigmoid", "ipo"]},
    {"loss_type": ["robust", "sppo_hard"], "loss_weights": [1.0, 0.1], "label_smoothing": 0.2},
]
DPO_DEFAULTS = {
    "beta": 0.1,
    "loss_weights": None,
    "label_smoothing": 0.0,
    "discopop_tau": 0.05,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
}
CPO_CASES = [
    {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.0},
    {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4, "label_smoothing": 0.1},
]
ORPO_CASES = [{"beta": 0.1}, {"beta": 1.0}]


def make_batch(lengths: list[int], scale: float, seed: int) -> dict[str, list]:
    """Per-token log-probs in [-scale, 0] of the sequences end to end, rounded for the file."""
    generator = torch.Generator().manual_seed(seed)
    draws = -scale * torch.rand(2, sum(lengths), generator=generator, dtype=torch.float64)
    policy, reference = [[round(x, 4) for x in row] for row in draws.tolist()]
    return {"lengths": lengths, "policy": policy, "reference": reference}


class Layout:
    """Where TRL wants the tokens: rows (chosen of all pairs, then rejected), after the prompt."""

    def __init__(self, lengths: list[int]):
        order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]
        width = PROMPT + max(lengths)
        self.completion_mask = torch.zeros(len(lengths), width, dtype=torch.int64)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        self.index = torch.full((len(lengths), width - 1), -1)  # of a token, -1 = none
        for row, sequence in enumerate(order):
            end = PROMPT + lengths[sequence]
            self.completion_mask[row, PROMPT:end] = 1
            self.index[row, PROMPT - 1 : end - 1] = starts[sequence] + torch.arange(
                lengths[sequence]
            )

    def place(self, values: Tensor) -> Tensor:  # (N,) -> (2B, width - 1), 0 elsewhere
        return torch.where(self.index >= 0, values[self.index.clamp(min=0)], 0)

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean log-prob of each chosen and each rejected response."""
        count = (self.index >= 0).sum(1)
        return (self.place(values).sum(1) / count).chunk(2)


class Model(torch.nn.Module):
    """Answers with given log-probs, whatever it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor):
        super().__init__()
        nothing = torch.zeros_like(log_probs).detach()
        self.outputs = SimpleNamespace(
            log_probs=log_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            log_sum_sq_probs=nothing,
        )

    def forward(self, **_):
        return self.outputs


class OneProcess:
    """The part of accelerate's Accelerator that the losses use."""

    device = torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def bare(trainer: type, **attributes):
    """A trainer without its constructor, with these attributes."""
    made = object.__new__(trainer)
    made.accelerator = OneProcess()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def dpo(case: dict, policy: Tensor, reference: Tensor, layout: Layout) -> tuple[Tensor, dict]:
    args = SimpleNamespace(**DPO_DEFAULTS | case, gradient_checkpointing_kwargs=None)
    model = Model(layout.place(policy))
    trainer = bare(
        DPOTrainer,
        args=args,
        model=model,
        ref_model=Model(layout.place(reference)),
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        ld_alpha=args.ld_alpha,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = layout.completion_mask
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    metrics = {
        name: values[0]
        for name, values in trainer._metrics["train"].items()
        if name.startswith("rewards/")
    }
    return loss, metrics


def rewards_of(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    return {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
    }


def cpo(case: dict, policy: Tensor, _reference: Tensor, layout: Layout) -> tuple[Tensor, dict]:
    losses, *rewards = bare(CPOTrainer, alpha=0.0, **case).cpo_loss(*layout.means(policy))
    return losses.mean(), rewards_of(*rewards)


def orpo(case: dict, policy: Tensor, _reference: Tensor, layout: Layout) -> tuple[Tensor, dict]:
    """ORPO's odds ratio term: TRL subtracts the mean of what odds_ratio_loss gives."""
    trainer = bare(ORPOTrainer, **case)
    losses, *rewards = trainer.odds_ratio_loss(*layout.means(policy))[:3]
    return -losses.mean(), rewards_of(*rewards)


def record(run, case: dict, name: str, batch: dict) -> dict:
    in_float32 = run is orpo or case.get("f_divergence_type") == "alpha_divergence"
    dtype = torch.float32 if in_float32 else torch.float64
    policy = torch.tensor(batch["policy"], dtype=dtype, requires_grad=True)
    reference = torch.tensor(batch["reference"], dtype=dtype)
    loss, metrics = run(case, policy, reference, Layout(batch["lengths"]))
    (gradient,) = torch.autograd.grad(loss, policy)
    digits = 9 if in_float32 else 15
    return {
        "trainer": run.__name__,
        "args": case if run is not dpo else {**DPO_DEFAULTS, **case},
        "batch": name,
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss.item(),
        "gradient": [float(f"{x:.{digits}g}") for x in gradient.tolist()],
        "metrics": metrics,
    }


def main() -> None:
    batches = {
        name: make_batch(lengths, scale, seed)
        for seed, (name, (lengths, scale)) in enumerate(BATCHES.items())
    }
    runs = [(dpo, case) for case in DPO_CASES]
    runs += [(cpo, case) for case in CPO_CASES] + [(orpo, case) for case in ORPO_CASES]
    cases = []
    for run, case in runs:
        for name, batch in batches.items():
            recorded = record(run, case, name, batch)
            if math.isfinite(recorded["loss"]):
                cases.append(recorded)
            else:  # discopop's exponential overflows in TRL
                print(f"left out, TRL gives {recorded['loss']}: {recorded['args']} {name}")
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(case) for case in cases)
    header = json.dumps({"versions": versions, "batches": batches})[:-1]
    OUTPUT.write_text(f'{header}, "cases": [\n{lines}\n]}}\n')
    print(f"{OUTPUT}: {len(cases)} cases, {OUTPUT.stat().st_size / 1000:.0f} kB, {versions}")


if __name__ == "__main__":
    main()
