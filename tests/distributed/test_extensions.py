"""What Apex and Transformer Engine do in a step equals what is done without them.

Without a GPU a stand-in takes the place of Apex's kernel; the tests marked `gpu` run the packages.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig

from reinforcer_tp.config import ConfigError, load_config
from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.tokenized import TokenizedPair
from tests.distributed.spawn import run_distributed

MEGATRON = "policy.megatron_cfg"
LAYERS, MICRO_BATCHES, LR = 2, 3, 0.01
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "architectures": ["LlamaForCausalLM"],
}
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_batches() -> list:
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(0, SHAPE["vocab_size"], (count,), generator=generator).tolist()

    def pair(row: int) -> TokenizedPair:
        return TokenizedPair(prompt=ids(20), chosen=ids(30 + row), rejected=ids(25), row=row)

    pairs = [pair(row) for row in range(MICRO_BATCHES)]
    return [
        build_packed_batch(
            [p],
            shared=[len(p.prompt)],
            reference_logps=[torch.full((len(p.chosen) + len(p.rejected),), -5.0)],
            row_length=128,
        )
        for p in pairs
    ]


def step_of(topology, overrides) -> dict:
    """Log-probs, gradients, and the weights after one step of a random model on `topology`."""
    from reinforcer_tp.loop import loss_function
    from reinforcer_tp.mcore.model import build_model
    from reinforcer_tp.mcore.optim import build_training, optimizer_step, zero_grad
    from reinforcer_tp.mcore.optimizer_state import owned_parts
    from reinforcer_tp.mcore.schedule import Stage, forward_backward, forward_logps
    from reinforcer_tp.mcore.weights import RandomReader, load_weights

    base = [f"{MEGATRON}.optimizer.lr={LR}", f"{MEGATRON}.optimizer.weight_decay=0"]
    base += [f"{MEGATRON}.scheduler.lr_warmup_iters=0", "policy.max_grad_norm=null"]
    config = load_config(None, ["policy.model_name=unused", *base, *overrides])
    model = build_model(LlamaConfig(**SHAPE), config.policy, topology)
    load_weights(model, RandomReader(model.shape, seed=11), topology)
    training = build_training(model, config.policy, topology, total_steps=10)
    stage = Stage(model=model, modules=training.ddp, topology=topology, kernel_impl="auto")
    batches = make_batches()
    logps = torch.cat(forward_logps(stage, batches)).cpu()
    zero_grad(training)
    forward_backward(stage, batches, loss_function(config))
    grads = {name: p.main_grad.float().cpu().clone() for name, p in model.named_parameters()}
    owned = {name: owned_parts(training)[p] for name, p in model.named_parameters()}
    before = {name: part.main.detach().clone() for name, part in owned.items()}
    updated, _ = optimizer_step(training)
    assert updated
    moved = {name: (part.main.detach() - before[name]).cpu() for name, part in owned.items()}
    [inner] = {id(part.inner): part.inner for part in owned.values()}.values()
    return {"logps": logps, "grads": grads, "moved": moved, "adam": type(inner).__module__}


def with_stand_in(sequence_parallel: bool) -> tuple[dict, dict, int]:
    """On a rank of tp=2: (gradients without the kernel, with it, how often it was called)."""
    from megatron.core.tensor_parallel import layers

    from reinforcer_tp.mcore import model
    from reinforcer_tp.mcore.topology import init_topology

    calls = []

    def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
        calls.append(main_grad.shape)
        main_grad += grad_output.t() @ total_input

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    topology = init_topology(2, 1, seed=0)
    overrides = ["policy.precision=float32", f"{MEGATRON}.tensor_model_parallel_size=2"]
    overrides += [f"{MEGATRON}.sequence_parallel={str(sequence_parallel).lower()}"]
    without = step_of(topology, overrides)
    with (
        mock.patch.object(model, "has_weight_gradient_kernel", lambda *_: True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
    ):
        fused = step_of(topology, overrides)
    return without["grads"], fused["grads"], len(calls)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weight_gradients_added_by_a_kernel_are_the_same(sequence_parallel):
    """It is asked for each of a layer's four matrices in each micro-batch, and nothing is lost."""
    for without, fused, num_calls in run_distributed(with_stand_in, 2, sequence_parallel):
        assert num_calls == 4 * LAYERS * MICRO_BATCHES
        assert fused.keys() == without.keys()
        for name, expected in without.items():
            assert expected.norm() > 0, name
            assert (fused[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.fixture
def gpu():
    """One process on a GPU."""
    from reinforcer_tp.mcore.topology import destroy_topology, init_topology

    yield init_topology(1, 1, seed=0)
    destroy_topology()


def similar(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.cosine_similarity(first.flatten(), second.flatten(), dim=0).item()


class TestOnAGpu:
    pytestmark = GPU

    def test_apexs_weight_gradients_are_the_same(self, gpu):
        from megatron.core.tensor_parallel import layers

        if not layers._grad_accum_fusion_available:
            pytest.skip("Apex's fused_weight_gradient_mlp_cuda cannot be imported")
        fused = step_of(gpu, ["policy.precision=bfloat16"])
        with mock.patch.object(layers, "_grad_accum_fusion_available", False):
            plain = step_of(gpu, ["policy.precision=bfloat16"])
        assert torch.equal(fused["logps"], plain["logps"])
        for name, expected in plain["grads"].items():  # the kernel rounds less
            assert (fused["grads"][name] - expected).norm() <= 1e-2 * expected.norm(), name

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_the_fused_adam_takes_adams_first_step(self, gpu, precision):
        """-lr g / (|g| + eps), whichever Adam Megatron found."""
        found = step_of(gpu, [f"policy.precision={precision}"])
        if found["adam"].startswith("torch."):
            pytest.skip("neither transformer-engine nor Apex is installed")
        for name, gradient in found["grads"].items():
            expected = -LR * gradient / (gradient.abs() + 1e-8)
            got = found["moved"][name].view_as(gradient)
            assert (got - expected).abs().max() <= 1e-3 * LR, name

    @pytest.mark.parametrize("recompute", ["false", "true"])
    @pytest.mark.parametrize("fp8", ["hybrid", "blockwise"])
    def test_fp8_is_near_bfloat16_and_not_it(self, gpu, fp8, recompute):
        from reinforcer_tp.mcore.extensions import check_fp8

        try:
            check_fp8(fp8, gpu.device)
        except ConfigError as error:
            pytest.skip(str(error))
        keys = ["policy.precision=bfloat16", f"{MEGATRON}.activation_checkpointing={recompute}"]
        plain, quantized = step_of(gpu, keys), step_of(gpu, [*keys, f"policy.fp8={fp8}"])
        difference = (quantized["logps"] - plain["logps"]).abs()
        assert 0 < difference.mean() < 0.3
        for name, expected in plain["grads"].items():
            assert similar(quantized["grads"][name], expected) > 0.9, name
