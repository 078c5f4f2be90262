"""Plans beside what really happened: memory of real CPU runs, and the clusters that it is for."""

import json
import os
import subprocess
import sys
import time

import pytest
from transformers import LlamaConfig

from tests.integration.harness import REPOSITORY, run_train
from tests.integration.random_model import make_tokenizer

MOST_S = 120.0  # that a plan may take on two cores


def plan(*argv, timeout_s: float = 240.0):
    """(exit code, stdout, stderr, seconds)."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    command = [sys.executable, "-m", "reinforcer_tp.plan", *map(str, argv)]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    return run.returncode, run.stdout, run.stderr, time.monotonic() - begin


def make_words() -> list[str]:
    text = "the cat sat on a mat, looked at the moon and ran over a hill"
    return text.split()


def make_model(folder, width: int):
    """A Llama of 52 (width 512) or 119 million parameters (768), a tokenizer, and pairs."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=width, intermediate_size=width * 11 // 4,
        num_hidden_layers=12, num_attention_heads=width // 64, num_key_value_heads=4,
        head_dim=64, vocab_size=32 * width, max_position_embeddings=1024,
        tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer().save_pretrained(folder)
    words = make_words()
    rows = [
        {
            "prompt": " ".join(words[i % 7 :] * 2),
            "chosen": " ".join(words[: 4 + i % 8]),
            "rejected": " ".join(words[i % 5 :]),
        }
        for i in range(64)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "width, nproc, overrides",
    [
        (512, 1, ["policy.precision=float32"]),
        (512, 1, ["policy.precision=float32", "reference.mode=resident",
                  "policy.megatron_cfg.activation_checkpointing=true"]),
        (768, 2, ["policy.precision=float32",
                  "policy.megatron_cfg.pipeline_model_parallel_size=2"]),
        (768, 1, ["policy.precision=bfloat16"]),
    ],
    ids=["float32", "resident-recompute", "pp2", "bfloat16"],
)  # fmt: skip
def test_cpu_peak_is_within_a_tenth(tmp_path, width, nproc, overrides):
    """Resident memory of a real run over what it held before there was a model."""
    model = tmp_path / "model"
    model.mkdir()
    make_model(model, width)
    run = run_train(
        [f"policy.model_name={model}", "policy.load_weights=false", "data.dataset_name=auto",
         f"data.train_data_path={model / 'pairs.jsonl'}", "data.val_data_path=null",
         "policy.train_global_batch_size=8", "policy.micro_batch_tokens=600",
         "policy.max_total_sequence_length=256", "dpo.val_period=0", "dpo.max_num_steps=2",
         "checkpointing.enabled=false", "checkpointing.export_hf=false",
         f"reference.store_dir={tmp_path / 'store'}" if "reference.mode=resident" not in overrides
         else "reference.store_dir=null", *overrides],
        log_dir=tmp_path / "run", nproc=nproc, config=REPOSITORY / "configs" / "dpo.yaml",
    )  # fmt: skip
    assert run.returncode == 0, run.describe()
    code, out, err, _ = plan("--compare", tmp_path / "run", "--gpu", "cpu", "--json")
    assert code == 0, err
    found = json.loads(out)
    before = run.metrics[0]["memory/before_model_gib"]
    measured = max(line["memory/peak_gib"] for line in run.metrics) - before
    assert found["measured"]["peak_gib"] == pytest.approx(measured)
    assert found["ratio"]["peak_gib"] == pytest.approx(1.0, abs=0.1), found


@pytest.mark.parametrize(
    "name, gpus, parameters",
    [("dpo_llama70b", 64, 70_553_706_496), ("dpo_llama405b", 1024, 405_853_388_800)],
)
def test_big_clusters_are_planned_in_two_minutes(name, gpus, parameters):
    config = f"configs/{name}.yaml"
    code, out, err, seconds = plan("--config", config, "--gpus", gpus, "--gpu", "h100", "--json")
    assert code == 0, out + err
    assert seconds < MOST_S
    found = json.loads(out)
    assert found["fits"] and found["layout"]["world_size"] == gpus
    tp = found["layout"]["tensor_model_parallel_size"]
    held = tp * sum(stage["parameters"] for stage in found["stages"])
    norms = held - parameters  # whole on each tensor-parallel rank
    sizes = json.loads((REPOSITORY / "configs/models" / MODEL_OF[name]).read_text())
    layers, width = sizes["num_hidden_layers"], sizes["hidden_size"]
    assert norms == (tp - 1) * (2 * layers + 1) * width


MODEL_OF = {
    "dpo_llama70b": "meta-llama--Llama-3.3-70B-Instruct.json",
    "dpo_llama405b": "meta-llama--Llama-3.1-405B-Instruct.json",
}
