"""The real trainer, in every layout, against DPO written in plain torch and transformers.

Both follow the same rows for eight steps; every number that a user can see must agree at every
step. The judge works in float64, so that only the trainer's own float32 rounding is measured.
"""

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch

from tests.integration.harness import RunResult, run_train
from tests.integration.oracle import OracleConfig, run_oracle
from tests.integration.overrides import trainer_overrides

NUM_STEPS = 8
BATCH_SIZE = 8  # pairs; 44 rows make five batches an epoch, so step 6 begins the second one
RELATIVE_TOLERANCE = 1e-4
SMALLEST_REWARD = 0.05  # rewards start at 0: their errors are judged against at least this
RELATIVE_METRICS = ("loss", "preference_loss", "sft_loss", "logps/chosen", "logps/rejected")
REWARD_METRICS = ("rewards/margins", "rewards/chosen", "rewards/rejected")

TP2 = "policy.megatron_cfg.tensor_model_parallel_size=2"
SEQUENCE_PARALLEL = "policy.megatron_cfg.sequence_parallel=true"
PP2 = "policy.megatron_cfg.pipeline_model_parallel_size=2"
FIRST_STAGE = "policy.megatron_cfg.num_layers_in_first_pipeline_stage=3"
FOUR_STAGES = "policy.megatron_cfg.pipeline_model_parallel_layout=Et|tt|t|tL"
RECOMPUTE = "policy.megatron_cfg.activation_checkpointing=true"
ONE_PAIR = "policy.train_micro_batch_size=1"


@dataclass(frozen=True)
class Layout:
    """How the same numbers are computed: number of processes and overrides."""

    nproc: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "tp1-in-full": Layout(1, ("data.share_prompts=false",)),
    "tp2-sequence-parallel": Layout(2, (TP2, SEQUENCE_PARALLEL, "policy.train_micro_batch_size=3")),
    "pp2-vpp2-common-starts": Layout(
        2, (PP2, FOUR_STAGES, "policy.train_micro_batch_size=2", "data.share_prefix=response")
    ),
    "pp2-recompute": Layout(2, (PP2, FIRST_STAGE, RECOMPUTE, ONE_PAIR)),
    "dp2-token-budget": Layout(2, ("policy.micro_batch_tokens=600",)),
    "dp2-plain-optimizer": Layout(
        2, (ONE_PAIR, "policy.megatron_cfg.optimizer.use_distributed_optimizer=false")
    ),
    "tp2-pp2-sequence-parallel": Layout(
        4, (TP2, PP2, FIRST_STAGE, SEQUENCE_PARALLEL, "policy.train_micro_batch_size=2")
    ),
    "dp2-tp2-sequence-parallel": Layout(
        4, (TP2, SEQUENCE_PARALLEL, "policy.micro_batch_tokens=300", RECOMPUTE)
    ),
}

UNDER_TORCHRUN = ("dp2-token-budget", "tp2-pp2-sequence-parallel")  # the others are forked

# Adam hides a factor common to all gradients: bounds lie among the norms, some steps are clipped.
VARIANTS = {
    "plain": {"lr": 1e-4},
    "averaged-with-sft": {
        "lr": 3e-4,
        "max_grad_norm": 0.5,
        "weight_decay": 1.0,
        "sft_loss_weight": 0.1,
        "preference_average_log_probs": True,
        "sft_average_log_probs": True,
    },
    "sft-summed": {
        "lr": 1e-4,
        "sft_loss_weight": 0.1,
        "preference_loss_weight": 0.5,
        "max_grad_norm": 6.5,
        "eps": 1e-6,
    },
    "schedule-no-clipping": {
        "lr": 3e-4,
        "min_lr": 1e-5,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 2,
        "lr_warmup_init": 1e-6,
        "lr_decay_iters": 7,
        "max_grad_norm": None,
    },
    "two-losses": {"lr": 1e-4, "losses": (("ipo", 0.1), ("apo_zero", 0.9))},
}

CASES = [
    ("stories", "plain", "tp1-in-full"),
    ("stories", "plain", "pp2-recompute"),
    ("stories", "averaged-with-sft", "dp2-token-budget"),
    ("random", "sft-summed", "tp2-sequence-parallel"),
    ("random", "averaged-with-sft", "pp2-vpp2-common-starts"),
    ("random", "two-losses", "tp2-pp2-sequence-parallel"),
    ("random", "schedule-no-clipping", "dp2-tp2-sequence-parallel"),
    ("random-weighted", "sft-summed", "dp2-plain-optimizer"),
]


@pytest.fixture(scope="session")
def oracle_config(request):
    """name of the source -> what the oracle needs to know about it; assets only when asked for."""

    def configure(source: str) -> OracleConfig:
        if source == "stories":
            assets = request.getfixturevalue("assets")
            return OracleConfig(
                model=str(assets / "stories260k"),
                chat_template=str(assets / "stories260k.chat_template.jinja"),
                data=request.getfixturevalue("polite_rows"),
                dtype=torch.float64,
            )
        return OracleConfig(
            model=request.getfixturevalue("random_llama"),
            data=request.getfixturevalue("random_rows")[source],
            dtype=torch.float64,
        )

    return configure


@pytest.fixture(scope="session")
def expected_of():
    """Each variant's expected history, computed once."""
    histories: dict[OracleConfig, list[dict[str, float]]] = {}

    def compute(config: OracleConfig) -> list[dict[str, float]]:
        if config not in histories:
            histories[config] = run_oracle(config)
        return histories[config]

    return compute


@pytest.mark.parametrize("source,variant,layout", CASES, ids=["/".join(case) for case in CASES])
def test_eight_steps_are_the_same(source, variant, layout, oracle_config, expected_of, tmp_path):
    config = replace(
        oracle_config(source), num_steps=NUM_STEPS, batch_size=BATCH_SIZE, **VARIANTS[variant]
    )
    expected = expected_of(config)
    plan = LAYOUTS[layout]
    result = run_train(
        [*trainer_overrides(config), *plan.overrides],
        log_dir=tmp_path / "run",
        nproc=plan.nproc,
        fork=layout not in UNDER_TORCHRUN,
    )
    assert result.returncode == 0, result.describe()
    differences = compare(result, expected)
    assert not differences, "\n".join(differences) + "\n" + result.describe()
    if "weighted" not in source and variant != "two-losses":
        assert_starts_at_ln2(result, config.beta)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_eight_steps_on_a_gpu(precision, oracle_config, expected_of, tmp_path):
    """NCCL, and in bfloat16 the varlen kernel and (where installed) Transformer Engine."""
    config = replace(oracle_config("random"), num_steps=NUM_STEPS, batch_size=BATCH_SIZE, lr=1e-4)
    expected = expected_of(config)
    result = run_train(
        [*trainer_overrides(config), f"policy.precision={precision}"],
        log_dir=tmp_path / "run",
        env={"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")},
    )
    assert result.returncode == 0, result.describe()
    if precision == "float32":
        differences = compare(result, expected)
        assert not differences, "\n".join(differences)
        return
    steps = result.train_steps()
    assert steps[1]["preference_loss"] == pytest.approx(math.log(2.0), abs=1e-2)
    for step, want in enumerate(expected, start=1):
        for name in ("logps/chosen", "logps/rejected"):
            assert steps[step][name] == pytest.approx(want[name], rel=2e-2)


def test_first_step_is_ln2_at_a_large_beta(oracle_config, tmp_path):
    """A large beta magnifies any difference between the policy's and the reference's forward."""
    config = replace(oracle_config("random"), beta=5.0, num_steps=1)
    plan = LAYOUTS["tp2-sequence-parallel"]
    result = run_train(
        [*trainer_overrides(config), *plan.overrides],
        log_dir=tmp_path / "run",
        nproc=plan.nproc,
        fork=True,
    )
    assert result.returncode == 0, result.describe()
    assert_starts_at_ln2(result, config.beta)


def assert_starts_at_ln2(result: RunResult, beta: float) -> None:
    tolerance = 1e-5 * max(1.0, beta / 0.1)
    first = result.train_steps()[1]
    assert first["preference_loss"] == pytest.approx(math.log(2.0), abs=tolerance)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=tolerance)


def compare(result: RunResult, expected: list[dict[str, float]]) -> list[str]:
    """One line for every number that is off; empty when the run is the same."""
    steps = result.train_steps()
    if sorted(steps) != list(range(1, len(expected) + 1)):
        return [f"steps in metrics.jsonl: {sorted(steps)}; expected 1 to {len(expected)}"]
    differences = []
    for step, want in enumerate(expected, start=1):
        got = steps[step]
        scales = {name: abs(want[name]) for name in (*RELATIVE_METRICS, "grad_norm")}
        scales |= {name: max(abs(want[name]), SMALLEST_REWARD) for name in REWARD_METRICS}
        tolerances = {name: RELATIVE_TOLERANCE * scale for name, scale in scales.items()}
        tolerances |= {"lr": 1e-6 * want["lr"], "num_pairs": 0.0}
        if step > 1:  # margins of the first step are rounding, and so is their sign
            tolerances["rewards/accuracies"] = 1e-6
        for name, tolerance in tolerances.items():
            error = abs(got[name] - want[name])
            if not error <= tolerance:
                differences.append(
                    f"step {step} {name}: got {got[name]:.9g}, expected {want[name]:.9g}, "
                    f"off by {error:.2e}, allowed {tolerance:.2e}"
                )
    return differences
