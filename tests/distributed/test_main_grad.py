"""The operator under Megatron's real DDP: the weight's gradient arrives in main_grad, once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import embedding

from kernels import vocab_parallel_linear_logprob
from tests.distributed.spawn import run_distributed
from tests.ops.dense import error

V, D, N = 50, 16, 12
MICRO_BATCHES = 3


class TinyModel(torch.nn.Module):
    """Embedding, one matrix, and the head; `tied` as Megatron marks it on a single stage."""

    def __init__(self, tied, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype) / 2)

        self.embedding, self.matrix = parameter(V, D), parameter(D, D)
        self.head = self.embedding if tied else parameter(V, D)
        if tied:
            self.head.zero_out_wgrad = True

    def forward(self, tokens, labels, head):
        hidden = embedding(tokens, self.embedding) @ self.matrix
        return head(hidden, self.head, labels)


def dense(hidden, weight, labels):
    return (hidden @ weight.T).log_softmax(1).gather(1, labels[:, None])[:, 0]


def loss_of(model, step, head):
    generator = torch.Generator().manual_seed(100 + step)
    tokens, labels = torch.randint(0, V, (2, N), generator=generator)
    return (model(tokens, labels, head) * torch.randn(N, generator=generator)).sum()


CASES = {
    (name, tied): {"dtype": dtype, "tied": tied, "reduce_in_fp32": in_fp32, "overlap": overlap}
    for tied in (False, True)
    for name, dtype, in_fp32, overlap in (
        ("float32", torch.float32, False, True),
        ("bfloat16 into float32", torch.bfloat16, True, False),
        ("bfloat16", torch.bfloat16, False, True),
    )
}
BARS = {"float32": 1e-5, "bfloat16 into float32": 2e-2, "bfloat16": 4e-2}


def all_main_grads(cases):
    from reinforcer_tp.mcore.topology import init_topology

    init_topology(1, 1, seed=0)
    return {name: main_grads(**case) for name, case in cases.items()}


def main_grads(*, dtype, tied, reduce_in_fp32, overlap):
    """Gradients by name after three micro-batches under DDP, and whether the head's was fused."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    model = TinyModel(tied, dtype)
    ddp = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=D, num_attention_heads=1),
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=reduce_in_fp32, overlap_grad_reduce=overlap
        ),
        model,
    )
    for _ in range(2):  # the second round starts from zeroed buffers again
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            for step in range(MICRO_BATCHES - 1):
                loss_of(model, step, vocab_parallel_linear_logprob).backward()
        loss_of(model, MICRO_BATCHES - 1, vocab_parallel_linear_logprob).backward()
        ddp.finish_grad_sync()
    grads = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return grads, model.head.grad_added_to_main_grad


def large_norms(sizes):
    """Megatron's gradient norm of random numbers in tensors of these sizes."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    from reinforcer_tp.mcore.topology import init_topology

    group = init_topology(1, 1, seed=0).tp_group
    numbers = large_numbers()
    assert sum(sizes) == len(numbers)
    return get_grad_norm_fp32(list(numbers.split(sizes)), grad_stats_parallel_group=group)


def large_numbers():
    return torch.randn(3_500_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[3_500_000], [1_750_000, 1_750_000], [3_499_999, 1]])
def test_the_gradient_norm_of_a_large_vocabulary(sizes):
    """However tensor parallelism cuts it. torch's own float32 norm is off by more on a CPU."""
    exact = large_numbers().double().norm().item()
    [norm] = run_distributed(large_norms, 1, sizes)
    assert norm == pytest.approx(exact, rel=1e-6)


@pytest.fixture(scope="module")
def results():
    return run_distributed(all_main_grads, 1, CASES)[0]


@pytest.mark.parametrize("name", BARS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_of_three_micro_batches(results, name, tied):
    grads, fused = results[name, tied]
    assert fused
    model = TinyModel(tied, CASES[name, tied]["dtype"]).double()
    for step in range(MICRO_BATCHES):
        loss_of(model, step, dense).backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        assert error(grad, expected[key]) <= BARS[name], key
