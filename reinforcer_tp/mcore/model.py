"""A Hugging Face config -> Megatron's config, layer spec and a GPTModel of hidden states.

Legend: T packed tokens, D hidden, V vocabulary (Vp rows of it on this tensor-parallel rank).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.autograd.function import once_differentiable

from reinforcer_tp.fp8 import RECIPES
from reinforcer_tp.mcore.attention import (
    PackedAttention,
    PackedAttentionParams,
    packed_attention_params,
)
from reinforcer_tp.mcore.extensions import choose_layer_spec, has_weight_gradient_kernel
from reinforcer_tp.mcore.shape import ModelShape, model_shape, rope_frequencies
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.pipeline_layout import stage_layers

DTYPES = {
    "float64": torch.float64,  # tests only; the config does not offer it
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def transformer_config(
    shape: ModelShape,
    megatron: Any,
    *,
    dtype: torch.dtype,
    fp8: str | None = None,
    topology: Topology,
) -> TransformerConfig:
    """Megatron's config. `megatron` is the config section `policy.megatron_cfg`, `fp8` its key."""
    assert megatron.pipeline_model_parallel_size == topology.pp_size
    assert megatron.virtual_stages == topology.vpp_size
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # torch.compile would make these anew for the lengths of rows. Nothing here is timed yet.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=has_weight_gradient_kernel(dtype, topology.device),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        perform_initialization=False,  # every weight is loaded or drawn by mcore/weights.py
        use_cpu_initialization=topology.device.type == "cpu",
        calculate_per_token_loss=True,  # the contract of mcore/schedule.py
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        sequence_parallel=megatron.sequence_parallel,
        **_pipeline_settings(shape, megatron, topology),
        **_recompute_settings(megatron),
        **(RECIPES[fp8].settings if fp8 in RECIPES else {}),
    )


def _pipeline_settings(shape: ModelShape, megatron: Any, topology: Topology) -> dict[str, Any]:
    if topology.pp_size == 1:
        return {}
    # Megatron is always told the layers of every stage, so that there is one rule for them, ours.
    stages = [["decoder"] * count for count in stage_layers(megatron, shape.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    settings: dict[str, Any] = {"pipeline_model_parallel_layout": stages}
    if topology.vpp_size > 1:
        settings["virtual_pipeline_model_parallel_size"] = topology.vpp_size
        # Batched messages between two ranks are matched by their order alone: with two stages the
        # previous and the next rank are the same, and activations would arrive as gradients.
        # Megatron-LM's own default for interleaving, at any number of stages.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return settings


def _recompute_settings(megatron: Any) -> dict[str, Any]:
    if not megatron.activation_checkpointing:
        return {}
    if megatron.recompute_granularity == "selective":
        modules = list(megatron.recompute_modules)
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {
        "recompute_granularity": "full",
        "recompute_method": megatron.recompute_method,
        "recompute_num_layers": megatron.recompute_num_layers,
    }


class RMSNorm(torch.nn.Module):
    """Megatron's own torch norm refuses sequence parallelism; this one marks its weight for it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        # finalize_model_grads sums gradients of weights so marked over the tp group.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNormOnCpu.apply(x, self.weight, self.eps)


class _RMSNormOnCpu(torch.autograd.Function):
    """F.rms_norm, which on a CPU is a dozen operations that each keep a float32 copy of x.

    y = x r w with r = (mean x^2 + eps)^-1/2, in float32 at least; x and r are kept.
    dx = r (g w - x r mean(g w x r)), dw = sum over tokens of g x r
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x: (..., D)
        wide = torch.promote_types(x.dtype, torch.float32)
        x32 = x.to(wide)
        r = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        r.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x32 * r).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        normal = x * r  # in r's type
        along = grad * normal
        grad_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (along @ weight.to(r.dtype)).div_(-x.shape[-1])[..., None]
        grad_x = along.copy_(grad).mul_(weight).addcmul_(normal, mean).mul_(r)
        return grad_x.to(x.dtype), grad_weight, None


def block_spec(kind: str, config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The modules of a chunk's layers: Megatron's local layout with our norm and attention.

    "te" puts Transformer Engine's linears and norm in the same places, so the names of the
    parameters are the same for both.
    """
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    norm: type = RMSNorm
    attention = spec.submodules.self_attention.submodules
    mlp = spec.submodules.mlp.submodules
    if kind == "te":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )

        norm = TENorm
        attention.linear_qkv = TEColumnParallelLinear
        attention.linear_proj = TERowParallelLinear
        mlp.linear_fc1 = TEColumnParallelLinear
        mlp.linear_fc2 = TERowParallelLinear
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


class HiddenStateModel(GPTModel):
    """A GPTModel that takes packed rows and returns the hidden states after the final norm.

    The head is not applied: `output_weight()` goes to the fused operator instead.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.post_process and self.output_layer.weight is not None:
            # Called for its weight alone: the call runs the hook in which DDP waits until the
            # weight's shards are gathered (overlap_param_gather).
            self.output_layer.forward = lambda: self.output_layer.weight

    def _preprocess(
        self, input_ids, position_ids, decoder_input=None, padding_mask=None, **unused
    ) -> tuple:
        # Positions enter in attention.py, as cos and sin of the batch's own position ids.
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return decoder_input, None, None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, **unused) -> Tensor:  # (T[/tp], 1, D)
        return hidden_states

    def output_weight(self) -> Tensor:  # (Vp, D)
        """This rank's rows of the output embedding; the input embedding where that is the same."""
        if self.output_layer.weight is None:
            return self.shared_embedding_or_output_weight()
        return self.output_layer()


@dataclass(frozen=True, kw_only=True)
class PolicyModel:
    """The part of the network that this rank holds, and what is needed to run it."""

    chunks: tuple[HiddenStateModel, ...]  # several with an interleaved pipeline; else one
    config: TransformerConfig
    shape: ModelShape
    inverse_frequencies: Tensor  # (E/2,) float32, on the model's device
    rope_factor: float
    stage_layers: tuple[int, ...]  # layers of every stage of the pipeline, as a token passes them

    @property
    def head(self) -> HiddenStateModel:
        """The chunk with the output embedding, on the last pipeline rank."""
        return self.chunks[-1]

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of all chunks; names of the second chunk begin with `chunk1.`, and so on."""
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield f"chunk{index}.{name}" if index else name, parameter

    def attention_params(self, batch: Any) -> PackedAttentionParams:
        """Rope tables and segments of one `PackedBatch` of the host, on the model's device."""
        on_cuda = self.inverse_frequencies.device.type == "cuda"
        tp_size = self.config.tensor_model_parallel_size
        return packed_attention_params(
            batch,
            inverse_frequencies=self.inverse_frequencies,
            rope_factor=self.rope_factor,
            has_kernel=on_cuda and self.config.params_dtype.itemsize == 2,
            num_heads=self.shape.num_heads // tp_size,
            num_kv_heads=self.shape.num_kv_heads // tp_size,
        )


def build_model(hf_config: Any, policy: Any, topology: Topology) -> PolicyModel:
    """Builds this rank's chunks with uninitialised weights; `mcore/weights.py` fills them.

    `hf_config` is transformers' config object, `policy` the config section.
    """
    shape = model_shape(hf_config)
    config = transformer_config(
        shape,
        policy.megatron_cfg,
        dtype=DTYPES[policy.precision],
        fp8=policy.fp8,
        topology=topology,
    )
    kind = choose_layer_spec(policy.layer_spec, topology.device)
    layers = stage_layers(policy.megatron_cfg, shape.num_layers)
    chunks = []
    for vp_stage in range(topology.vpp_size):
        stage = vp_stage * topology.pp_size + topology.pp_rank
        chunk = HiddenStateModel(
            config=config,
            transformer_layer_spec=block_spec(kind, config, layers[stage]),
            vocab_size=shape.padded_vocab_size(topology.tp_size),
            max_sequence_length=shape.max_positions,
            pre_process=stage == 0,
            post_process=stage == len(layers) - 1,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="none",
            vp_stage=vp_stage if topology.vpp_size > 1 else None,
        )
        _mark_tensor_parallel(chunk)
        chunks.append(chunk.to(topology.device))
    inverse_frequencies, rope_factor = rope_frequencies(hf_config)
    return PolicyModel(
        chunks=tuple(chunks),
        config=config,
        shape=shape,
        inverse_frequencies=inverse_frequencies.to(topology.device),
        rope_factor=rope_factor,
        stage_layers=tuple(layers),
    )


def _mark_tensor_parallel(chunk: HiddenStateModel) -> None:
    """Without it the gradient norm counts the shards of rank 0 only.

    Megatron sets these attributes in its init functions, which perform_initialization=False skips.
    """
    for name, parameter in chunk.named_parameters():
        if hasattr(parameter, "tensor_model_parallel"):
            continue
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            set_tensor_model_parallel_attributes(parameter, True, 1, 1)
        elif "linear_qkv" in name or "linear_fc1" in name or _is_vocab_weight(name):
            stride = 2 if "linear_fc1" in name else 1
            set_tensor_model_parallel_attributes(parameter, True, 0, stride)


def _is_vocab_weight(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")
