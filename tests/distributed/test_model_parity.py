"""Every model family equals transformers: log-probs, gradients, and weights there and back.

The independent side is transformers' own model in plain torch, two sequences a pair.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from reinforcer_tp.config import load_config
from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.tokenized import TokenizedPair
from tests.distributed.judge import sequence_logps
from tests.distributed.spawn import run_distributed

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,  # prime: padded under tp=2
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 8}),
    "llama3": ("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
}
LAYOUTS = {  # name -> (tp, pp, sequence parallel)
    "tp1": (1, 1, False),
    "tp2": (2, 1, False),
    "tp2_sp": (2, 1, True),
    "pp2": (1, 2, False),
}


def make_pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 131, (count,), generator=generator).tolist()

    sizes = [(5, 9, 4), (40, 30, 38), (1, 1, 2)]
    return [
        TokenizedPair(prompt=ids(p), chosen=ids(c), rejected=ids(r), weight=1.0, row=i)
        for i, (p, c, r) in enumerate(sizes)
    ]


def token_weights(count: int) -> torch.Tensor:
    """Upstream gradients of mixed sign and size, one a response token."""
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7) + 0.2


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, dict]:
    """Random folders of every family, with transformers' log-probs and gradients."""
    made = {}
    for name, (model_type, overrides) in FAMILIES.items():
        torch.manual_seed(3)
        config = AutoConfig.for_model(model_type, **(_COMMON | overrides))
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                mean = 1.0 if parameter.dim() == 1 else 0.0
                parameter.normal_(mean, 0.15)  # biases and norms that matter, too
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        logps = torch.cat(
            [
                sequence_logps(model, pair.prompt, response)
                for pair in make_pairs()
                for response in (pair.chosen, pair.rejected)
            ]
        )
        (logps * token_weights(len(logps))).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        made[name] = {"folder": str(folder), "logps": logps.detach(), "grads": grads}
    return made


def run_families(folders: dict[str, str], layout: tuple, export_root: str) -> dict:
    """In one spawned rank: log-probs and whole gradients of every family, and its export."""
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training, zero_grad
    from reinforcer_tp.mcore.schedule import Stage, forward_backward, forward_logps
    from reinforcer_tp.mcore.topology import init_topology
    from reinforcer_tp.mcore.weights import (
        SafetensorsReader,
        check_weights,
        export_hf,
        full_tensors,
        load_weights,
    )

    tp, pp, sequence_parallel = layout
    topology = init_topology(tp, pp, seed=0)
    config = load_config(
        None,
        [
            "policy.model_name=unused",
            "policy.precision=float32",
            f"policy.megatron_cfg.sequence_parallel={sequence_parallel}",
            f"policy.megatron_cfg.pipeline_model_parallel_size={pp}",
        ],
    )
    results = {}
    for name, folder in folders.items():
        model = build_model(AutoConfig.from_pretrained(folder), config.policy, topology)
        reader = SafetensorsReader(folder)
        check_weights(reader, model.shape)
        load_weights(model, reader, topology)
        batch = build_packed_batch(make_pairs(), divisible_by=tp)
        stage = Stage(model=model, modules=model.chunks, topology=topology, kernel_impl="auto")
        logps = forward_logps(stage, [batch])

        training = build_training(model, config.policy, topology, total_steps=10)
        zero_grad(training)
        stage = Stage(model=model, modules=training.ddp, topology=topology, kernel_impl="auto")

        def weighted_sum(logps, entropies, batch):
            # Megatron divides by the number of pairs.
            return (logps * token_weights(len(logps))).sum() * batch.num_pairs, {}

        forward_backward(stage, [batch], weighted_sum)
        grads = dict(full_tensors(model, topology, of=lambda p: p.main_grad))
        export_hf(
            model, topology, Path(export_root) / name, lambda folder: None, max_file_bytes=100_000
        )
        results[name] = {
            "logps": logps[0] if logps else None,
            "grads": {n: g.clone() for n, g in grads.items() if g is not None},
        }
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_equals_transformers(families, layout, tmp_path):
    tp, pp, _ = LAYOUTS[layout]
    folders = {name: family["folder"] for name, family in families.items()}
    ranks = run_distributed(
        run_families, tp * pp, folders, LAYOUTS[layout], str(tmp_path), timeout_s=240
    )
    for name, family in families.items():
        logps = [rank[name]["logps"] for rank in ranks if rank[name]["logps"] is not None]
        assert len(logps) == tp  # the last stage's tensor-parallel ranks
        for one in logps:
            error = (one - family["logps"]).abs().max().item()
            assert error < 2e-5, (name, error)
        grads = {n: g for rank in ranks for n, g in rank[name]["grads"].items()}
        assert grads.keys() == family["grads"].keys()
        for tensor, expected in family["grads"].items():
            difference = (grads[tensor] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert difference < 3e-5, (name, tensor, difference.item())
        original, exported = read_folder(Path(family["folder"])), read_folder(tmp_path / name)
        assert exported.keys() == original.keys(), name
        for tensor, values in original.items():
            assert torch.equal(values, exported[tensor]), (name, tensor)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors
