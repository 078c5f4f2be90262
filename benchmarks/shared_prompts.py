"""A whole training step with the prompt of each pair laid out once, beside one with it twice.

    python -m benchmarks.shared_prompts [--data FILE --tokenizer FOLDER] [--model tiny 100m]

Random Llamas; lengths and packing are those of the data (default: the embedded pairs), token ids
are random. Both ways take turns on one model, and nothing is timed before their loss and gradient
norm agree. The step is everything between two optimizer steps: packing, forward, backward, clipping
and AdamW (at lr 0). Rows are appended to benchmarks/results/shared_prompts. Exit code: 0, 1 numbers
differ, 3 the bar was missed: the speed-up is at least 85 % of the ratio of tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.measure import RESULTS, append_rows, default_device, machine, statistics, take_turns
from reinforcer_tp.batches import micro_batching
from reinforcer_tp.config import load_config
from reinforcer_tp.data.micro_batches import MicroBatches, micro_batches
from reinforcer_tp.data.prepare import prepare_data
from reinforcer_tp.data.tokenized import TokenizedSet
from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.embedded import ensure_embedded
from reinforcer_tp.loop import local_sums, loss_function
from reinforcer_tp.mcore.model import build_model
from reinforcer_tp.mcore.optim import build_training, optimizer_step, zero_grad
from reinforcer_tp.mcore.schedule import forward_backward, open_stage
from reinforcer_tp.mcore.topology import destroy_topology, init_topology
from reinforcer_tp.mcore.weights import RandomReader, load_weights

MODELS = {  # stories260k's shape, and one of 110M parameters
    "tiny": {
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
    },
    "100m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
PAIRS = {"tiny": 128, "100m": 16}
SHARES = ("nothing", "prompt")
BAR = 0.85  # of the ratio of tokens
SAME = {"float32": 1e-5, "bfloat16": 2e-2}  # loss and gradient norm, relative


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    data: str
    precision: str
    pairs: int
    micro_batch_tokens: int


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    lengths, data = _lengths(args)
    topology = init_topology(1, 1, seed=0)
    codes = []
    for model in args.model:
        case = Case(
            model=model,
            data=data,
            precision=args.precision,
            pairs=args.pairs or PAIRS[model],
            micro_batch_tokens=args.micro_batch_tokens,
        )
        codes.append(run_case(case, lengths, topology, args))
    destroy_topology()
    return next((code for code in (1, 3) if code in codes), 0)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="pairs in a file; default: the embedded ones")
    parser.add_argument("--tokenizer", help="folder or hub id; with --data")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, help="of a global batch (default: 128; 100m: 16)")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "shared_prompts", help="where rows are appended"
    )
    args = parser.parse_args(argv)
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer belong together")
    return args


def _lengths(args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """((n, 3) tokens of prompt, chosen, rejected; name of the data)."""
    path, tokenizer, name = args.data, args.tokenizer, args.data
    if path is None:
        embedded = ensure_embedded()
        path, tokenizer, name = embedded.train, embedded.model, "embedded"
    prepared = prepare_data(
        {"dataset_name": "auto", "train_data_path": str(path)},
        tokenizer=load_tokenizer(str(tokenizer), None),
        max_total_sequence_length=2048,
    )
    return prepared.train.lengths(), Path(name).name


def run_case(case: Case, lengths: np.ndarray, topology, args: argparse.Namespace) -> int:
    config = load_config(
        None,
        [
            "policy.model_name=unused",
            f"policy.precision={case.precision}",
            f"policy.micro_batch_tokens={case.micro_batch_tokens}",
            f"policy.train_global_batch_size={case.pairs}",
            "policy.megatron_cfg.optimizer.lr=0",  # the same weights in every step
            "policy.megatron_cfg.optimizer.min_lr=0",
        ],
    )
    shape = MODELS[case.model] | {"architectures": ["LlamaForCausalLM"]}
    model = build_model(LlamaConfig(max_position_embeddings=4096, **shape), config.policy, topology)
    load_weights(model, RandomReader(model.shape, seed=0), topology)
    training = build_training(model, config.policy, topology, total_steps=1000)
    stage = replace(open_stage(model, config.policy, topology), modules=training.ddp)
    pairs, references = _random_pairs(lengths, case.pairs, model.shape.vocab_size)
    cut = micro_batching(config, model.shape, topology)
    parts: dict[str, MicroBatches] = {}

    def step(share: str) -> tuple[float, float]:
        """(loss, gradient norm)."""
        part = parts[share] = micro_batches(
            pairs, range(len(pairs)), replace(cut, share=share), references.__getitem__
        )
        zero_grad(training)
        reports = forward_backward(stage, part.batches, loss_function(config))
        return local_sums(reports)["loss"], optimizer_step(training)[1]

    found, expected = step("prompt"), step("nothing")  # the warm-up as well
    differences = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    if max(differences) > SAME[case.precision]:
        print(f"{case.model}: loss and gradient norm differ by {differences}: no speed is reported")
        return 1
    seconds = take_turns({share: partial(step, share) for share in SHARES}, args.rounds)
    return _report(case, parts, seconds, args.results)


def _random_pairs(
    lengths: np.ndarray, count: int, vocab_size: int
) -> tuple[TokenizedSet, dict[int, np.ndarray]]:
    """Pairs of a random choice of the lengths, and reference log-probs."""
    random = np.random.default_rng(0)
    chosen = lengths[random.choice(len(lengths), count, replace=len(lengths) < count)]
    pairs = TokenizedSet(
        tokens=random.integers(0, vocab_size, int(chosen.sum()), dtype=np.int32),
        lengths=chosen,
        weights=np.ones(count, np.float32),
        rows=np.arange(count),
    )
    level = -np.log(vocab_size)
    references = {
        i: np.full(int(sides.sum()), level, np.float32) for i, sides in enumerate(chosen[:, 1:])
    }
    return pairs, references


def _report(case: Case, parts: dict, seconds: dict[str, list[float]], results: Path) -> int:
    once, twice = parts["prompt"], parts["nothing"]
    token_ratio = twice.num_tokens / once.num_tokens
    speed_up = float(np.median(seconds["nothing"]) / np.median(seconds["prompt"]))
    row = {"benchmark": "shared_prompts", **asdict(case)} | {
        "tokens": {share: part.num_tokens for share, part in parts.items()},
        "micro_batches": {share: len(part.batches) for share, part in parts.items()},
        "step": {share: statistics(samples) for share, samples in seconds.items()},
        "token_ratio": token_ratio,
        "speed_up": speed_up,
    }
    share = speed_up / token_ratio
    medians = {name: np.median(samples) for name, samples in seconds.items()}
    print(
        f"{case.model} {case.precision}, {case.pairs} pairs of {case.data}: "
        f"{twice.num_tokens:,} -> {once.num_tokens:,} tokens ({token_ratio:.2f}x fewer), "
        f"step {medians['nothing']:.3f} -> {medians['prompt']:.3f} s ({speed_up:.2f}x faster), "
        f"{share:.0%} of the ratio (bar {BAR:.0%}: {'met' if share >= BAR else 'missed'})"
    )
    print(f"appended to {append_rows(results, [machine(default_device()) | row])}")
    return 0 if share >= BAR else 3


if __name__ == "__main__":
    sys.exit(main())
