"""The judge is judged: each part of the oracle against another route to the same number."""

import math
from dataclasses import replace

import pytest
import torch

from tests.integration.oracle import (
    OracleConfig,
    OraclePair,
    backward_batch,
    batch_rows,
    clip_gradients,
    learning_rate,
    load_model,
    load_pairs,
    make_optimizer,
    pair_logps,
    pair_loss,
    response_logp,
    run_oracle,
)
from tests.integration.random_model import make_random_llama, make_rows, write_jsonl


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> OracleConfig:
    folder = tmp_path_factory.mktemp("oracle")
    return OracleConfig(
        model=make_random_llama(folder / "model"),
        data=write_jsonl(folder / "pairs.jsonl", make_rows(20)),
        dtype=torch.float64,
        batch_size=4,
        num_steps=3,
    )


def test_sequence_logp_is_transformers_own_label_loss(config):
    model = load_model(config)
    for pair in load_pairs(config)[:4]:
        ids = torch.tensor([pair.prompt + pair.chosen])
        labels = ids.clone()
        labels[:, : len(pair.prompt)] = -100
        mean_nll = model(input_ids=ids, labels=labels).loss
        expected = -mean_nll.double() * len(pair.chosen)  # transformers takes it in float32
        torch.testing.assert_close(
            response_logp(model, pair.prompt, pair.chosen), expected, rtol=1e-6, atol=0
        )


def test_some_borders_of_the_rows_fall_inside_a_token(config):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows, pairs = make_rows(20), load_pairs(config)
    shorter = 0
    for row, pair in zip(rows, pairs):
        text = tokenizer.decode(pair.prompt + pair.rejected)
        assert text == "<s>" + row["prompt"] + row["rejected"] + "</s>"
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in pair.prompt[1:] + pair.chosen + pair.rejected
        assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id
        shorter += len(pair.prompt) < len(tokenizer(row["prompt"])["input_ids"])
    assert 0 < shorter < len(pairs), "the rows should have both kinds of border"


@pytest.mark.parametrize("average", [False, True])
def test_pair_loss_by_hand(average):
    """Eq. 7 of arXiv:2305.18290 in plain floats; averaging divides each side by its own length."""
    config = OracleConfig(
        model="",
        data="",
        beta=0.5,
        preference_loss_weight=2.0,
        sft_loss_weight=0.25,
        preference_average_log_probs=average,
        sft_average_log_probs=average,
    )
    pair = OraclePair(prompt=[1], chosen=[2, 3], rejected=[4, 5, 6, 7], weight=3.0)
    policy, reference = (-3.0, -8.0), (-5.0, -7.0)
    loss, metrics = pair_loss(
        pair, tuple(map(torch.tensor, policy)), tuple(map(torch.tensor, reference)), config
    )
    chosen, rejected = (2.0 / 2, -1.0 / 4) if average else (2.0, -1.0)
    preference = 3.0 * math.log(1.0 + math.exp(-0.5 * (chosen - rejected)))
    sft = 3.0 * (3.0 / 2 if average else 3.0)
    assert float(metrics["preference_loss"]) == pytest.approx(preference, rel=1e-6)
    assert float(metrics["sft_loss"]) == pytest.approx(sft, rel=1e-6)
    assert float(loss) == pytest.approx(2.0 * preference + 0.25 * sft, rel=1e-6)
    assert float(metrics["rewards/chosen"]) == pytest.approx(0.5 * chosen)
    assert float(metrics["rewards/rejected"]) == pytest.approx(0.5 * rejected)
    assert float(metrics["rewards/margins"]) == pytest.approx(0.5 * (chosen - rejected))
    assert bool(metrics["rewards/accuracies"])


def test_gradient_is_the_slope_of_the_loss(config):
    """Central difference along the gradient itself; one pair of the batch has weight 0."""
    config = replace(config, sft_loss_weight=0.1)
    model, pairs = load_model(config), load_pairs(config)[:4]
    pairs[1] = replace(pairs[1], weight=0.0)
    with torch.no_grad():
        batch = [(p, tuple(x + 0.3 for x in pair_logps(model, p))) for p in pairs]
    first = backward_batch(model, batch, config)
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = clip_gradients(model, None)
    step, losses = 1e-3, []
    for direction in (step, -2 * step):  # from the middle to +step, then on to -step
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.add_(gradient, alpha=direction / norm)
        losses.append(backward_batch(model, batch, config)["loss"])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm, rel=1e-4)
    assert first["num_pairs"] == 3
    assert first["logps/chosen"] == pytest.approx(
        sum(float(r[0]) - 0.3 for p, r in batch if p.weight) / 3, rel=1e-6
    )


def test_first_step_is_ln2_and_weights_scale_it(config):
    history = run_oracle(config)
    weights = [pair.weight for pair in load_pairs(config)[:4]]
    counted = sum(weight > 0 for weight in weights)
    expected = math.log(2.0) * sum(weights) / counted
    assert history[0]["preference_loss"] == pytest.approx(expected, rel=1e-12)
    assert history[0]["rewards/margins"] == 0.0
    assert history[-1]["rewards/margins"] != 0.0


@pytest.mark.parametrize("decay_1d", [False, True])
def test_first_adamw_step_in_closed_form(config, decay_1d):
    """With zero state AdamW moves by lr * (g / (|g| + eps) + decay * p); g after clipping."""
    config = replace(config, decay_1d=decay_1d, lr=0.01, max_grad_norm=0.5)
    model = load_model(config)
    with torch.no_grad():
        batch = [(p, pair_logps(model, p)) for p in load_pairs(config)[:4]]
    backward_batch(model, batch, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    assert norm > config.max_grad_norm
    assert clip_gradients(model, config.max_grad_norm) == pytest.approx(norm, rel=1e-12)
    make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        gradient = gradients[name] * config.max_grad_norm / (norm + 1e-6)
        decay = config.weight_decay if decay_1d or parameter.dim() > 1 else 0.0
        move = gradient / (gradient.abs() + config.eps) + decay * before[name]
        torch.testing.assert_close(parameter, before[name] - config.lr * move, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_schedule_is_megatrons(style, warmup):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = OracleConfig(
        model="",
        data="",
        lr=1e-3,
        min_lr=1e-5,
        lr_decay_style=style,
        lr_warmup_iters=warmup,
        lr_warmup_init=1e-7,
        lr_decay_iters=7,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=config.lr_decay_iters,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    for step in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-12)
        scheduler.step(1)


def test_batches_wrap_and_drop_the_rest():
    assert [batch_rows(7, 3, step) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
