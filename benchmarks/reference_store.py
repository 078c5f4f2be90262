"""An epoch that reads its reference from the store, beside one that runs it again each step.

    python -m benchmarks.reference_store [--model embedded 20m] [--rounds 3]

Runs of the real train.py in one process on the embedded pairs, without validation or checkpoints:
`store` with everything in the store, `cold` with an empty one (the sweep counts), `resident` with a
second copy that runs every step, as trainers do that keep nothing. Ways take turns, and no time is
told unless their losses agree. An epoch is the sum of its steps, and what preparing the reference
took before the first. Rows are appended to benchmarks/results/reference_store. Exit code: 0, 1
losses differ or a run failed, 3 the bar was missed: `store` is at least 1.2 times faster than
`resident`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.measure import RESULTS, append_rows, default_device, machine, statistics
from reinforcer_tp.embedded import ensure_embedded

BAR = 1.2
SAME = {"float32": 1e-5, "bfloat16": 2e-2}  # losses of every step
TRAIN = Path(__file__).resolve().parents[1] / "reinforcer_tp" / "train.py"
MODELS = {  # random Llamas, and learning rates at which losses of both ways can be compared
    "embedded": None,
    "20m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
        "max_position_embeddings": 512, "architectures": ["LlamaForCausalLM"],
    },
}  # fmt: skip
WAYS = ("resident", "store", "cold")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    codes = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            codes.append(run_case(model, args, Path(folder)))
    return next((code for code in (1, 3) if code in codes), 0)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_store")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", choices=SAME, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way")
    parser.add_argument("--steps", type=int, default=30, help="of an epoch, 32 pairs each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "reference_store")
    return parser.parse_args(argv)


def run_case(model: str, args: argparse.Namespace, folder: Path) -> int:
    overrides = [
        f"policy.precision={args.precision}",
        f"dpo.max_num_steps={args.steps}",
        "policy.megatron_cfg.optimizer.lr=1e-5",
        *("dpo.val_period=0", "dpo.val_at_start=false", "checkpointing.enabled=false"),
        *("checkpointing.export_hf=false", "logger.tensorboard_enabled=false"),
        *_model(model, folder),
    ]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    epoch(["reference.mode=store", f"reference.store_dir={folder}/store"], overrides, folder, args)
    for round_ in range(args.rounds):
        for way in WAYS:
            own = {
                "resident": ["reference.mode=resident"],
                "store": [f"reference.store_dir={folder}/store"],
                "cold": [f"reference.store_dir={folder}/cold{round_}"],
            }[way]
            metrics = epoch(own, overrides, folder, args)
            losses[way] = [step["train/loss"] for step in metrics]
            spent = metrics[0]["perf/sweep_s"] + sum(step["perf/step_s"] for step in metrics)
            seconds[way].append(spent)
    differences = [np.abs(np.subtract(losses[way], losses["resident"])).max() for way in WAYS]
    if max(differences) > SAME[args.precision]:
        print(f"{model}: losses differ by {differences}: no time is reported")
        return 1
    return _report(model, args, seconds)


def epoch(own: list[str], overrides: list[str], folder: Path, args: argparse.Namespace) -> list:
    """Metrics of each step of a new run."""
    log_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = [sys.executable, str(TRAIN), *overrides, *own, f"logger.log_dir={log_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"train.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]


def _model(model: str, folder: Path) -> list[str]:
    """Overrides that name the model; `folder` gets its config.json."""
    shape = MODELS[model]
    if shape is None:
        return []
    LlamaConfig(**shape).save_pretrained(folder / "model")
    return [
        f"policy.model_name={folder / 'model'}",
        f"policy.tokenizer.name={ensure_embedded().model}",
        "policy.load_weights=false",
    ]


def _report(model: str, args: argparse.Namespace, seconds: dict[str, list[float]]) -> int:
    medians = {way: float(np.median(samples)) for way, samples in seconds.items()}
    speed_up = medians["resident"] / medians["store"]
    row = {"benchmark": "reference_store", "model": model, "precision": args.precision} | {
        "steps": args.steps,
        "pairs_a_step": 32,
        "epoch": {way: statistics(samples) for way, samples in seconds.items()},
        "speed_up": speed_up,
        "speed_up_with_sweep": medians["resident"] / medians["cold"],
    }
    torch.set_num_threads(args.threads)  # what the runs had, for the row
    print(
        f"{model} {args.precision}, {args.steps} steps: resident {medians['resident']:.2f} s, "
        f"store {medians['store']:.2f} s ({speed_up:.2f}x faster, bar {BAR}: "
        f"{'met' if speed_up >= BAR else 'missed'}), store with its sweep {medians['cold']:.2f} s"
    )
    print(f"appended to {append_rows(args.results, [machine(default_device()) | row])}")
    return 0 if speed_up >= BAR else 3


if __name__ == "__main__":
    sys.exit(main())
