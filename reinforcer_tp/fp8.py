"""FP8 matrices (`policy.fp8`): what each choice means, and what it asks of model and layout.

Transformer Engine multiplies the four matrices of every layer in FP8. Weights, gradients,
optimizer, norms, attention, embedding and head are what they are without it. Imports neither torch
nor transformers.
"""

from dataclasses import dataclass
from typing import Any

from reinforcer_tp.config_check import require


@dataclass(frozen=True, kw_only=True)
class Recipe:
    settings: dict[str, str]  # fields of Megatron's TransformerConfig
    row_multiple: int  # a rank's tokens come in multiples of it
    engine: str  # first transformer-engine that has it: megatron/core/fp8_utils.py, get_fp8_recipe


# Both scale by the numbers at hand. Megatron's default ("delayed") scales by those of earlier
# micro-batches: state that a checkpoint does not hold and that a validation would change.
RECIPES = {
    # One scale a tensor; activations and weights in E4M3, gradients in E5M2.
    "hybrid": Recipe(
        settings={"fp8": "hybrid", "fp8_recipe": "tensorwise"}, row_multiple=16, engine="2.2"
    ),
    # One scale for 1 x 128 numbers, 128 x 128 of a weight; all in E4M3. TE multiplies 16 rows as
    # well, but under sequence parallelism it gathers FP8 only where a rank has whole blocks.
    "blockwise": Recipe(
        settings={"fp8": "e4m3", "fp8_recipe": "blockwise"}, row_multiple=128, engine="2.3"
    ),
}
_SIDE = 16  # transformer_engine/pytorch/utils.py, assert_dim_for_fp8_exec, on either operand


def row_multiple(fp8: str | None) -> int:
    """Tokens on a rank come in multiples of this: its part of a row under sequence parallelism."""
    return RECIPES[fp8].row_multiple if fp8 in RECIPES else 1


def check_policy(policy: Any) -> None:
    """Raises ConfigError where other keys of the section `policy` do not go with its fp8."""
    if policy.fp8 not in RECIPES:
        return
    what = f"policy.fp8={policy.fp8}"
    require(
        policy.precision == "bfloat16",
        f"{what} needs policy.precision=bfloat16 for all that is not FP8, got {policy.precision}; "
        "set that, or policy.fp8=off",
    )
    require(
        policy.layer_spec != "local",
        f"{what} needs Transformer Engine's layers, got policy.layer_spec=local; "
        "use policy.layer_spec=auto, or policy.fp8=off",
    )


def check_model(policy: Any, shape: dict) -> None:
    """Raises ConfigError where a rank's matrices have sides that FP8 cannot multiply.

    shape: the content of a Hugging Face config.json, checked.
    """
    if policy.fp8 not in RECIPES:
        return
    tp, heads = policy.megatron_cfg.tensor_model_parallel_size, shape["num_attention_heads"]
    groups = shape.get("num_key_value_heads") or heads
    head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
    sides = {
        "hidden_size": shape["hidden_size"],
        "(num_attention_heads + 2 num_key_value_heads) head_dim": (heads + 2 * groups) * head_dim,
        "num_attention_heads head_dim": heads * head_dim,
        "intermediate_size": shape["intermediate_size"],
    }
    for name, size in sides.items():
        ranks = 1 if name == "hidden_size" else tp
        require(
            size % (_SIDE * ranks) == 0,
            f"policy.fp8={policy.fp8} multiplies matrices whose sides are multiples of {_SIDE}, "
            f"but the model's {name}={size} is {size / ranks:g} on each of {ranks} ranks; "
            + ("lower policy.megatron_cfg.tensor_model_parallel_size, or " if ranks > 1 else "")
            + "use policy.fp8=off",
        )
