"""A prompt laid out once gives what transformers gives for two sequences a pair, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reinforcer_tp.config import load_config
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from tests.distributed.judge import sequence_logps
from tests.distributed.spawn import run_distributed

VOCAB = 131
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,  # prime: padded under tp=2
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}),
}
LAYOUTS = {  # name -> (tp, pp, sequence parallel)
    "tp1": (1, 1, False),
    "tp2_sp": (2, 1, True),
    "pp2": (1, 2, False),
}
SHARES = ("nothing", "prompt", "response")
BETA, SFT = 0.3, 0.2


def make_pairs() -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    def pair(prompt: int, chosen: int, rejected: int, common: int = 0, weight: float = 1.0):
        begin = ids(common)
        return TokenizedPair(
            prompt=ids(prompt), chosen=begin + ids(chosen), rejected=begin + ids(rejected),
            weight=weight, row=len(made),
        )  # fmt: skip

    made: list[TokenizedPair] = []
    for arguments in (
        (5, 9, 4),
        (40, 30, 38, 0, 0.5),
        (1, 1, 2),  # a prompt and a response of one token
        (7, 1, 1),
        (6, 4, 3, 5),  # responses that begin alike
        (9, 0, 6, 4, 2.0),  # the chosen response is the start of the other
        (9, 5, 0, 4),
        (3, 2, 2, 8, 0.0),  # of no weight: in the row, but in no mean
    ):
        made.append(pair(*arguments))
    return made


def reference_logps() -> dict[int, torch.Tensor]:
    return {
        i: -3.0 - torch.sin(torch.arange(len(p.chosen) + len(p.rejected)) * 1.3 + i)
        for i, p in enumerate(make_pairs())
    }


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict[str, dict]:
    """Random folders, and transformers' log-probs, loss, gradients and their norm in float64."""
    return {name: _judge(name, tmp_path_factory.mktemp(name)) for name in MODELS}


def _judge(name: str, folder) -> dict:
    torch.manual_seed(3)
    model_type, overrides = MODELS[name]
    config = AutoConfig.for_model(model_type, **(_COMMON | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.float().save_pretrained(folder)
    model.double()
    pairs, references = make_pairs(), reference_logps()
    loss, logps = torch.zeros((), dtype=torch.float64), []
    for i, pair in enumerate(pairs):
        chosen = sequence_logps(model, pair.prompt, pair.chosen)
        rejected = sequence_logps(model, pair.prompt, pair.rejected)
        sides = references[i].double().split([len(chosen), len(rejected)])
        margin = (chosen - sides[0]).sum() - (rejected - sides[1]).sum()
        preference = torch.log1p(torch.exp(-BETA * margin))
        loss = loss + pair.weight * (preference - SFT * chosen.sum())
        logps += [chosen.detach(), rejected.detach()]
    loss = loss / sum(pair.weight > 0 for pair in pairs)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    return {
        "folder": str(folder),
        "logps": torch.cat(logps),
        "loss": loss.item(),
        "norm": norm.item(),
        "grads": grads,
    }


def run_shares(folders: dict[str, str], layout: tuple) -> dict:
    """In one spawned rank: what a training step computes, for every model and way of sharing."""
    from dataclasses import replace

    from reinforcer_tp.batches import micro_batching
    from reinforcer_tp.data.micro_batches import micro_batches
    from reinforcer_tp.loop import SUMS, local_sums, loss_function
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training, optimizer_step, zero_grad
    from reinforcer_tp.mcore.schedule import (
        forward_backward,
        forward_logps,
        open_stage,
        reduce_metrics,
    )
    from reinforcer_tp.mcore.topology import init_topology
    from reinforcer_tp.mcore.weights import SafetensorsReader, full_tensors, load_weights

    tp, pp, sequence_parallel = layout
    topology = init_topology(tp, pp, seed=0)
    pairs, references = TokenizedSet.from_pairs(make_pairs()), reference_logps()
    results = {}
    for name, folder in folders.items():
        for share in SHARES:
            overrides = _overrides(share, sequence_parallel)
            overrides += [f"policy.megatron_cfg.pipeline_model_parallel_size={pp}"]
            config = load_config(None, overrides)
            model = build_model(AutoConfig.from_pretrained(folder), config.policy, topology)
            load_weights(model, SafetensorsReader(folder), topology)
            cut = micro_batching(config, model.shape, topology)
            stage = open_stage(model, config.policy, topology)
            part = micro_batches(pairs, range(len(pairs)), cut, references.__getitem__)
            logps = {}
            for batch, found in zip(part.batches, forward_logps(stage, part.batches), strict=False):
                sizes = batch.response_lengths.view(-1, 2).sum(1).tolist()
                logps |= dict(zip(batch.rows, found.split(sizes), strict=True))

            training = build_training(model, config.policy, topology, total_steps=10)
            stage = replace(stage, modules=training.ddp)
            zero_grad(training)
            reports = forward_backward(stage, part.batches, loss_function(config))
            sums = reduce_metrics(local_sums(reports), SUMS, topology)
            grads = dict(full_tensors(model, topology, of=lambda p: p.main_grad))
            grads = {n: g.clone() for n, g in grads.items() if g is not None}
            _, norm = optimizer_step(training)
            results[name, share] = {
                "logps": torch.cat([logps[i] for i in range(len(pairs))]) if logps else None,
                "loss": sums["loss"] / sums["num_pairs"],
                "norm": norm,
                "grads": grads,
                "tokens": part.num_tokens,
                "micro_batches": len(part.batches),
            }
    return results


def _overrides(share: str, sequence_parallel: bool) -> list[str]:
    return [
        "policy.model_name=unused",
        "policy.precision=float32",
        "policy.micro_batch_tokens=160",
        f"policy.megatron_cfg.sequence_parallel={sequence_parallel}",
        f"dpo.reference_policy_kl_penalty={BETA}",
        f"dpo.sft_loss_weight={SFT}",
        f"data.share_prompts={share != 'nothing'}",
        f"data.share_prefix={'response' if share == 'response' else 'prompt'}",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharing_changes_no_number(judged, layout):
    tp, pp, _ = LAYOUTS[layout]
    folders = {name: expected["folder"] for name, expected in judged.items()}
    ranks = run_distributed(run_shares, tp * pp, folders, LAYOUTS[layout], timeout_s=240)
    for case in ranks[0]:
        name, _ = case
        expected = judged[name]
        for rank in ranks:
            result = rank[case]
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5), case
            assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5), case
            if result["logps"] is not None:
                assert (result["logps"] - expected["logps"]).abs().max() < 2e-5, case
        grads = {n: g for rank in ranks for n, g in rank[case]["grads"].items()}
        assert grads.keys() == expected["grads"].keys()
        for tensor, grad in grads.items():
            difference = (grad - expected["grads"][tensor]).norm()
            assert difference <= 1e-4 * expected["grads"][tensor].norm(), (case, tensor)
    tokens = {share: ranks[0]["llama", share]["tokens"] for share in SHARES}
    prompts = sum(len(pair.prompt) for pair in make_pairs())
    assert tokens["prompt"] == tokens["nothing"] - prompts
    # Of the responses that begin alike 5, 3 + 1, 3 and 8 tokens are laid out once.
    assert tokens["response"] == tokens["prompt"] - 5 - 4 - 3 - 8
    assert ranks[0]["llama", "nothing"]["micro_batches"] > 1
