"""Direct Preference Optimization in plain torch and transformers: the judge of the real trainer.

Nothing here is shared with the package under test. Every sequence goes through the Hugging Face
model alone (no packing, no padding, no attention mask), its log-probs come from `log_softmax` of
the materialised logits, and a global batch is a plain Python loop over its pairs.

Batches follow the file (`data.shuffle=false`): batch k holds rows k*B .. (k+1)*B - 1 of the epoch,
every epoch starts again at row 0, and the last partial batch of an epoch is dropped.
"""

import gzip
import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What determines the numbers of a run; sizes count pairs."""

    model: str  # folder in Hugging Face format
    data: str  # .jsonl or .jsonl.gz with prompt, chosen, rejected: all strings or all messages
    chat_template: str | None = None  # Jinja text or the path of a .jinja file; rows of messages
    num_steps: int = 8
    batch_size: int = 8  # pairs
    dtype: torch.dtype = torch.float32
    beta: float = 0.1  # strength of the KL penalty
    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # (name in LOSSES, weight)
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False
    lr: float = 1e-4
    min_lr: float = 0.0
    lr_decay_style: str = "constant"  # constant | linear | cosine
    lr_warmup_iters: int = 0
    lr_warmup_init: float = 0.0
    lr_decay_iters: int = 8
    weight_decay: float = 0.1
    decay_1d: bool = False  # torch decays norm weights and biases too, Megatron's default does not
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # None = no clipping


@dataclass(frozen=True, kw_only=True)
class OraclePair:
    """Token ids of one pair; both responses continue the same prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float  # multiplies both loss terms; 0 = not counted


def run_oracle(config: OracleConfig) -> list[dict[str, float]]:
    """Train `config.num_steps` steps and return the metrics of each, first step first."""
    return train_oracle(config)[1]


def train_oracle(config: OracleConfig) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """Train `config.num_steps` steps; the trained model and the metrics of each step.

    Names are those of metrics.jsonl without `train/`; `grad_norm` is before clipping and `lr` is
    the rate that the step used.
    """
    pairs = load_pairs(config)
    model = load_model(config)
    with torch.no_grad():
        reference = [pair_logps(model, pair) for pair in pairs]
    optimizer = make_optimizer(model, config)
    history = []
    for step in range(config.num_steps):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = batch_rows(len(pairs), config.batch_size, step)
        batch = [(pairs[row], reference[row]) for row in rows]
        metrics = backward_batch(model, batch, config)
        metrics["grad_norm"] = clip_gradients(model, config.max_grad_norm)
        metrics["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(metrics)
    return model, history


def load_pairs(config: OracleConfig) -> list[OraclePair]:
    """Tokenize every row of the file in file order."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    opener = gzip.open if config.data.endswith(".gz") else open
    with opener(config.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return [tokenize_row(row, tokenizer) for row in rows]


def read_template(template: str) -> str:
    if not template.endswith(".jinja"):
        return template
    with open(template, encoding="utf-8") as file:
        return file.read()


def tokenize_row(row: dict, tokenizer) -> OraclePair:
    """Rows of messages go through the template and get no EOS; strings are raw text plus EOS.

    Where the prompt's ids are not a prefix of both full sequences, the prompt ends at the shorter
    of the two longest common prefixes.
    """
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [
            tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
            for side in ("chosen", "rejected")
        ]
    else:
        prompt = render(tokenizer, row["prompt"], add_generation_prompt=True)
        sides = [render(tokenizer, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    border = min(common_prefix_length(prompt, side) for side in sides)
    return OraclePair(
        prompt=sides[0][:border],
        chosen=sides[0][border:],
        rejected=sides[1][border:],
        weight=float(row.get("weight", 1.0)),
    )


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def common_prefix_length(left: list[int], right: list[int]) -> int:
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


def load_model(config: OracleConfig) -> torch.nn.Module:
    # Dropout is off in the trainer; `eval` switches off whatever a config might ask for.
    model = AutoModelForCausalLM.from_pretrained(config.model, attn_implementation="eager")
    return model.to(config.dtype).eval()


def response_logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Sum over the response's tokens of log p(token | everything before it), a scalar."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    predictions = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return predictions.gather(-1, torch.tensor(response)[:, None]).sum()


def pair_logps(model: torch.nn.Module, pair: OraclePair) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        response_logp(model, pair.prompt, pair.chosen),
        response_logp(model, pair.prompt, pair.rejected),
    )


def make_optimizer(model: torch.nn.Module, config: OracleConfig) -> torch.optim.AdamW:
    decayed, plain = [], []
    for parameter in model.parameters():
        (decayed if config.decay_1d or parameter.dim() > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, config: OracleConfig) -> float:
    """Rate of the step that comes after `step` finished ones (Megatron's OptimizerParamScheduler).

    Warmup is linear from `lr_warmup_init` (which the first step uses) and reaches `lr` after
    `lr_warmup_iters` steps; decay then ends at `min_lr` after `lr_decay_iters` steps in all.
    """
    if config.lr_warmup_iters > 0 and step <= config.lr_warmup_iters:
        share = step / config.lr_warmup_iters
        return config.lr_warmup_init + share * (config.lr - config.lr_warmup_init)
    if config.lr_decay_style == "constant":
        return config.lr
    if step > config.lr_decay_iters:
        return config.min_lr
    done = (step - config.lr_warmup_iters) / (config.lr_decay_iters - config.lr_warmup_iters)
    share = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.min_lr + share[config.lr_decay_style] * (config.lr - config.min_lr)


def batch_rows(num_rows: int, batch_size: int, step: int) -> list[int]:
    """Rows of the global batch after `step` finished ones, without shuffling."""
    start = step % (num_rows // batch_size) * batch_size
    return list(range(start, start + batch_size))


def backward_batch(
    model: torch.nn.Module,
    batch: list[tuple[OraclePair, tuple[torch.Tensor, torch.Tensor]]],
    config: OracleConfig,
) -> dict[str, float]:
    """Accumulate the gradient of the batch's loss; return its metrics, means over counted pairs."""
    num_pairs = sum(pair.weight > 0 for pair, _ in batch)
    totals: dict[str, float] = {"num_pairs": num_pairs}
    for pair, reference in batch:
        if pair.weight == 0:
            continue
        loss, metrics = pair_loss(pair, pair_logps(model, pair), reference, config)
        (loss / num_pairs).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value.item() / num_pairs
    return totals


# (beta, policy minus reference log-prob of chosen and rejected, their tokens) -> loss
LOSSES = {
    "sigmoid": lambda beta, c, r, lengths: -F.logsigmoid(beta * (c - r)),  # arXiv:2305.18290
    "ipo": lambda beta, c, r, lengths: (  # arXiv:2310.12036, means over tokens
        (c / lengths[0] - r / lengths[1] - 1 / (2 * beta)) ** 2
    ),
    "apo_zero": lambda beta, c, r, lengths: (  # arXiv:2408.06266
        1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)
    ),
}


def pair_loss(
    pair: OraclePair,
    policy: tuple[torch.Tensor, torch.Tensor],
    reference: tuple[torch.Tensor, torch.Tensor],
    config: OracleConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted preference and SFT loss of one pair, and what it reports."""
    ratios = [new - old for new, old in zip(policy, reference)]
    lengths = (len(pair.chosen), len(pair.rejected))
    if config.preference_average_log_probs:
        ratios = [ratio / length for ratio, length in zip(ratios, lengths)]
    chosen_reward, rejected_reward = (config.beta * ratio for ratio in ratios)
    preference_loss = pair.weight * sum(
        weight * LOSSES[name](config.beta, *ratios, lengths) for name, weight in config.losses
    )
    sft_loss = -policy[0] * pair.weight
    if config.sft_average_log_probs:
        sft_loss = sft_loss / len(pair.chosen)
    loss = config.preference_loss_weight * preference_loss + config.sft_loss_weight * sft_loss
    return loss, {
        "loss": loss,
        "preference_loss": preference_loss,
        "sft_loss": sft_loss,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": chosen_reward > rejected_reward,
        "logps/chosen": policy[0],
        "logps/rejected": policy[1],
    }


def clip_gradients(model: torch.nn.Module, max_norm: float | None) -> float:
    """Scale gradients to `max_norm` (Megatron's rule, 1e-6 in the divisor); the norm before it."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    if max_norm is not None and max_norm / (norm + 1e-6) < 1.0:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm
