"""TRL's half of vs_trl: a DPOTrainer run whose every step is written down as it ends.

    python -P trl_run.py SETTINGS.json

Runs under the Python of TRL's own environment and imports nothing of this project. The settings
are those of `benchmarks.vs_trl_runs.trl_settings`. Into `folder` go: steps.jsonl, a line a step
(step, loss, grad_norm, lr, the mean log-probs of both sides, and `pairs`: the token ids that the
model was given), and run.json (seconds of the precompute, versions).
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = Path(settings["folder"])
    seen: list[dict] = []
    trainer = RecordedTrainer(
        model=settings["model"],
        args=arguments(settings),
        train_dataset=load_dataset(
            "json", data_files=settings["data"], split="train", cache_dir=str(folder / "cache")
        ),
        seen=seen,
    )
    with (folder / "steps.jsonl").open("w", encoding="utf-8") as file:
        trainer.add_callback(StepWriter(file, seen, settings["accumulation"]))
        trainer.train()
    packages = ("trl", "torch", "transformers", "datasets", "accelerate")
    run = {
        "precompute_s": trainer.precompute_s,
        "versions": {name: metadata.version(name) for name in packages},
        "threads": torch.get_num_threads(),
        "optimizer": str(trainer.args.optim),
        "attention": trainer.model.config._attn_implementation,
        "weights": str(trainer.model.dtype),
    }
    (folder / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")


def arguments(settings: dict) -> DPOConfig:
    """The pairs in the order of the file, a constant learning rate, and nothing but training."""
    optimizer = settings["optimizer"]
    return DPOConfig(
        output_dir=str(Path(settings["folder"]) / "output"),
        use_cpu=True,
        model_init_kwargs={"dtype": settings["weights"]},
        bf16=settings["autocast"],
        gradient_checkpointing=settings["checkpointing"],
        per_device_train_batch_size=settings["micro_batch_pairs"],
        gradient_accumulation_steps=settings["accumulation"],
        precompute_ref_log_probs=settings["precompute"],
        max_steps=settings["steps"],
        max_length=settings["max_length"],
        beta=settings["beta"],
        train_sampling_strategy="sequential",
        learning_rate=optimizer["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=optimizer["weight_decay"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["eps"],
        max_grad_norm=optimizer["max_grad_norm"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class RecordedTrainer(DPOTrainer):
    """DPOTrainer that says what its model was given and how long the precompute took."""

    def __init__(self, *args, seen: list[dict], **kwargs):
        self.seen, self.precompute_s = seen, 0.0
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, *args, **kwargs):
        begin = time.perf_counter()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.precompute_s += time.perf_counter() - begin
        return dataset

    def compute_loss(self, model, inputs, *args, **kwargs):
        pairs = given_pairs(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.seen.append({"loss": loss.item(), "pairs": pairs})
        return loss


def given_pairs(inputs: dict) -> list[dict]:
    """Each pair's two sides as (ids, number of those that are prompt), without padding. `inputs`
    are all chosen sides, then all rejected ones."""
    sides = []
    for ids, kept, completion in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
    ):
        sides.append([ids[kept].tolist(), int((kept & ~completion).sum())])
    chosen, rejected = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    return [{"chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True)]


class StepWriter(TrainerCallback):
    """A line for each optimizer step, from what the trainer logs."""

    def __init__(self, file, seen: list[dict], accumulation: int):
        self.file, self.seen, self.accumulation = file, seen, accumulation

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" not in logs:  # the summary at the end
            return
        batches = self.seen[-self.accumulation :]
        line = {
            "step": state.global_step,
            "loss": sum(batch["loss"] for batch in batches) / len(batches),
            "grad_norm": float(logs["grad_norm"]),
            "lr": logs["learning_rate"],
            "logps_chosen": logs["logps/chosen"],
            "logps_rejected": logs["logps/rejected"],
            "pairs": [pair for batch in batches for pair in batch["pairs"]],
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


if __name__ == "__main__":
    main(sys.argv[1])
