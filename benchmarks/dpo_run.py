"""DPO of a random Llama by the real train.py on one device: speed, MFU, memory, first loss.

    python -m benchmarks.dpo_run --work FOLDER [--shape llama1b|tiny] [--steps 20]

Nothing is downloaded: the weights are random, the tokenizer is the embedded one, and the pairs are
made here with the lengths of usual preference data. Prints a JSON object; the run stays in
FOLDER/run. Exit code: 0, or 1 where the run failed, a loss was not finite or the first not ln 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.embedded import MODEL_CONFIG, TRAIN_NOUNS, ensure_embedded

ROOT = Path(__file__).parents[1]
LLAMA_1B = ROOT / "configs" / "models" / "meta-llama--Llama-3.2-1B-Instruct.json"
LN2 = math.log(2.0)
LN2_BAR = {"bfloat16": 1e-2, "float32": 1e-5}  # both forwards round alike but for their packing
RECOMPUTE_BELOW_GIB = 60.0  # weights, gradients and AdamW of 1.24 B take 22 GB


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Token lengths are lognormal with these means (and 0.5 in the logarithm)."""

    shape: dict
    prompt_tokens: int
    response_tokens: int
    longest: int  # tokens of prompt + response
    pairs: int  # in a step
    micro_batch_tokens: int


SETTINGS = {
    "llama1b": Setting(shape=json.loads(LLAMA_1B.read_text()), prompt_tokens=400,
                       response_tokens=300, longest=2048, pairs=32, micro_batch_tokens=8192),
    "tiny": Setting(shape=MODEL_CONFIG, prompt_tokens=40, response_tokens=30, longest=200,
                    pairs=4, micro_batch_tokens=400),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo_run", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty or a new folder")
    parser.add_argument("--shape", choices=SETTINGS, default="llama1b")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    args = parser.parse_args(argv)
    setting, work = SETTINGS[args.shape], args.work.resolve()
    config = prepare(setting, work, args.steps)
    code = subprocess.run(
        [sys.executable, "reinforcer_tp/train.py", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    ).returncode
    found = summary(work / "run", args.shape)
    print(json.dumps(found))
    for line in found["wrong"]:
        print(f"FAILED {line}")
    return 1 if code or found["wrong"] else 0


def prepare(setting: Setting, work: Path, steps: int) -> Path:
    """Writes model folder, pairs and configuration into `work`; the configuration's path."""
    embedded, model = Path(ensure_embedded(str(work / "cache")).model), work / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(setting.shape), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, model / name)
    pairs, data = make_pairs(setting, steps * setting.pairs, str(model)), work / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    path = work / "config.yaml"  # JSON is YAML
    content = configuration(setting, steps, work)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def make_pairs(setting: Setting, count: int, tokenizer_folder: str) -> list[dict[str, str]]:
    """Rows of random words with prompt, chosen, rejected of the wanted lengths; seeded."""
    tokenizer, random = load_tokenizer(tokenizer_folder), np.random.default_rng(0)
    words = [f" {noun}" for noun in TRAIN_NOUNS]
    sizes = np.array([len(tokenizer(w, add_special_tokens=False).input_ids) for w in words])

    def text(tokens: int) -> str:
        drawn = random.integers(len(words), size=tokens)  # each is a token at least
        enough = 1 + int(np.searchsorted(np.cumsum(sizes[drawn]), tokens))
        return "".join(words[i] for i in drawn[:enough])

    def length(mean: int, most: float) -> int:
        return int(np.clip(random.lognormal(math.log(mean) - 0.125, 0.5), 8, most))

    pairs = []
    for _ in range(count):
        prompt = length(setting.prompt_tokens, setting.longest * 0.6)
        answers = [length(setting.response_tokens, setting.longest * 0.35) for _ in range(2)]
        chosen, rejected = (text(tokens) for tokens in answers)
        pairs.append({"prompt": text(prompt), "chosen": chosen, "rejected": rejected})
    return pairs


def configuration(setting: Setting, steps: int, work: Path) -> dict:
    """One epoch of `steps` steps, without validation, checkpoints and export."""
    never = {"val_period": 0, "val_at_start": False, "val_at_end": False}
    # The speed is of interest also where the first loss is wrong; `summary` judges it.
    dpo = never | {"max_num_steps": steps, "max_num_epochs": 1, "first_step_check": "warn"}
    gib = device_gib()
    megatron = {
        "activation_checkpointing": gib is not None and gib < RECOMPUTE_BELOW_GIB,
        "optimizer": {"lr": 1e-6, "min_lr": 1e-6},
    }
    policy = {
        "model_name": str(work / "model"),
        "load_weights": False,
        "precision": "float32" if gib is None else "bfloat16",
        "train_global_batch_size": setting.pairs,
        "micro_batch_tokens": setting.micro_batch_tokens,
        "max_total_sequence_length": setting.longest,
        "megatron_cfg": megatron,
    }
    return {
        "dpo": dpo,
        "policy": policy,
        "data": {"dataset_name": "auto", "train_data_path": str(work / "pairs.jsonl")},
        "reference": {"store_dir": str(work / "store")},
        "checkpointing": {"enabled": False, "export_hf": False},
        "logger": {"log_dir": str(work / "run"), "tensorboard_enabled": False},
        "cluster": {"gpus_per_node": 1, "num_nodes": 1},
    }


def device_gib() -> float | None:
    """Memory of the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)


def summary(run: Path, shape: str) -> dict:
    """Medians over the steps but the first, which compiles and allocates; `wrong` says what is."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "perf/step_s" in line]
    losses = [step["train/loss"] for step in steps]
    precision = "float32" if device_gib() is None else "bfloat16"
    rates = ("step_s", "tokens_per_s", "pairs_per_s", "tflops_per_gpu", "mfu", "compute_s")
    found = {key: _median(steps[1:] or steps, f"perf/{key}") for key in rates}
    found |= {
        "what": f"{shape}, {precision}, {len(steps)} steps",
        "shape": shape,
        "precision": precision,
        "num_steps": len(steps),
        "device_gib": device_gib(),
        "peak_gib": max((step["memory/peak_gib"] for step in steps), default=None),
        "sweep_s": steps[0].get("perf/sweep_s") if steps else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "expected_first_loss": LN2,
        "steps": [{"loss": s["train/loss"], "step_s": s["perf/step_s"]} for s in steps],
        "wrong": wrong_losses(losses, precision),
    }
    return found


def _median(steps: list[dict], name: str) -> float | None:
    values = [step[name] for step in steps if step.get(name) is not None]
    return median(values) if values else None


def wrong_losses(losses: list[float | None], precision: str) -> list[str]:
    if not losses:
        return ["the run has left no step"]
    wrong = [
        f"step {step}: the loss is {loss}"
        for step, loss in enumerate(losses, start=1)
        if loss is None or not math.isfinite(loss)
    ]
    if not wrong and abs(losses[0] - LN2) > LN2_BAR[precision]:
        wrong.append(f"the first loss is {losses[0]:.6f}, {LN2:.6f} expected")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
