"""The log-prob operator inside training: which one runs, what it keeps, and that losses agree."""

import json
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.distributed.spawn import run_distributed
from tests.integration.harness import read_metrics, run_train

STEPS = 20
MEGATRON = "policy.megatron_cfg"
ONLY_TRAINING = [
    "checkpointing.enabled=false",
    "checkpointing.export_hf=false",
    "logger.tensorboard_enabled=false",
]


def materialised_head(hidden, weight, labels, *, vocab_size, return_entropy, **unused):
    """Independent of the operator: all logits, log_softmax, autograd's own gradients."""
    logps = (hidden.float() @ weight[:vocab_size].float().t()).log_softmax(-1)
    chosen = logps.gather(1, labels[:, None])[:, 0]
    return (chosen, -(logps.exp() * logps).sum(-1).detach()) if return_entropy else chosen


def train_here(log_dir: str, overrides: list[str], is_materialised: bool) -> dict:
    """In a spawned rank: train.py's own main with the operator, or the head above in its place."""
    from reinforcer_tp.mcore import schedule, topology
    from reinforcer_tp.train import main

    head = materialised_head if is_materialised else schedule.vocab_parallel_linear_logprob
    calls = set()

    def spy(*args, cache_budget_bytes, impl, **kwargs):
        calls.add((impl, torch.is_grad_enabled(), cache_budget_bytes))
        return head(*args, cache_budget_bytes=cache_budget_bytes, impl=impl, **kwargs)

    steps = [f"dpo.max_num_steps={STEPS}", f"dpo.val_period={STEPS}", "dpo.val_at_start=false"]
    steps += ["dpo.val_batches=1", "policy.precision=float32"]
    with (
        mock.patch.object(schedule, "vocab_parallel_linear_logprob", spy),
        mock.patch.object(topology, "destroy_topology", lambda: None),  # the process group is lent
    ):
        folders = [f"logger.log_dir={log_dir}", f"reference.store_dir={log_dir}.store"]
        status = main([*ONLY_TRAINING, *steps, *overrides, *folders])
    assert status == 0
    lines = read_metrics(Path(log_dir)) if torch.distributed.get_rank() == 0 else []
    steps = [line for line in lines if "train/loss" in line]
    losses, entropies = ([step[f"train/{n}"] for step in steps] for n in ("loss", "entropy"))
    return {"losses": losses, "entropies": entropies, "calls": calls}


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Relative to `expected`, over all steps."""
    assert len(losses) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses of the default run with the materialised head, and a function for other runs."""

    def run(name: str, world_size: int, *overrides: str, is_materialised: bool = False) -> dict:
        log_dir = tmp_path_factory.mktemp("kernel_impl") / name
        ranks = run_distributed(
            train_here, world_size, str(log_dir), list(overrides), is_materialised, timeout_s=300
        )
        return ranks[0]

    return run("materialised", 1, is_materialised=True), run


SP2 = [f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("name", "world_size", "mib", "overrides"),
    [
        ("strict", 1, 0, ["policy.kernel_impl=torch", "policy.kernel_cache_mib=0"]),
        ("cached", 1, 512, ["policy.kernel_impl=torch"]),
        ("cached-sp2", 2, 512, ["policy.kernel_impl=torch", *SP2]),
    ],
)
def test_losses_of_training_are_those_of_materialised_logits(
    trained, name, world_size, mib, overrides
):
    expected, run = trained
    losses = expected["losses"]
    assert losses[-1] < 0.2 * losses[0]  # the weights do move
    result = run(name, world_size, *overrides)
    assert largest_difference(result["losses"], losses) < 1e-5
    assert largest_difference(result["entropies"], expected["entropies"]) < 1e-5
    # The reference sweep and validation keep nothing.
    assert result["calls"] == {("torch", True, mib * 2**20), ("torch", False, 0)}


def test_triton_trains_alike_under_the_interpreter(tmp_path):
    """Through the command line; few steps, since the interpreter is slow."""
    overrides = [*ONLY_TRAINING, "dpo.max_num_steps=2", "dpo.val_period=0", "data.shuffle=false"]
    overrides += ["policy.train_global_batch_size=4", "policy.precision=float32"]
    losses = {}
    for impl in ("triton", "torch"):
        result = run_train(
            [*overrides, f"policy.kernel_impl={impl}"],
            log_dir=tmp_path / impl,
            nproc=None,
            env={"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.describe()
        losses[impl] = [step["loss"] for step in result.train_steps().values()]
    assert len(losses["torch"]) == 2
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)


def test_triton_without_a_gpu_is_refused_before_the_run_but_not_by_check(tmp_path):
    run = partial(run_train, ["policy.kernel_impl=triton"], nproc=None, timeout_s=60)
    result = run(log_dir=tmp_path / "run", env={"TRITON_INTERPRET": "0"})
    assert result.returncode == 78, result.describe()
    [line] = [line for line in result.stderr.splitlines() if "policy.kernel_impl=triton" in line]
    for part in ("needs a CUDA device", "policy.kernel_impl=auto", "TRITON_INTERPRET=1"):
        assert part in line
    assert "Traceback" not in result.stderr
    left = {path.name for path in result.log_dir.iterdir()}
    assert left == {"attempts", "heartbeat"}  # of a run there is nothing yet

    checked = run(log_dir=tmp_path / "check", flags=["--check"])  # a login node has no GPU
    assert checked.returncode == 0, checked.describe()
    assert "kernel_impl: triton" in checked.stdout


def test_a_label_that_the_model_does_not_have_is_refused(random_llama, random_rows, tmp_path):
    """Ids with a hole: the tokenizer has few enough tokens, yet one lies beyond the vocabulary."""
    folder = tmp_path / "model"
    shutil.copytree(random_llama, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."] = 5000  # ends every rejected response
    file.write_text(json.dumps(tokenizer))
    result = run_train(
        [
            *ONLY_TRAINING,
            f"policy.model_name={folder}",
            "policy.max_total_sequence_length=256",
            "data.dataset_name=auto",
            f"data.train_data_path={random_rows['random']}",
        ],
        log_dir=tmp_path / "run",
        nproc=None,
        timeout_s=60,
    )
    assert result.returncode == 65, result.describe()
    assert "error[65]: the pair of row 0 holds token id 5000" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in result.log_dir.iterdir()} == {"attempts", "heartbeat"}
