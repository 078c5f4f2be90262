"""What Transformer Engine and Apex offer on this machine, and what needs them."""

import torch
from megatron.core.utils import get_te_version, is_te_min_version

from reinforcer_tp.config_check import require
from reinforcer_tp.fp8 import RECIPES


def choose_layer_spec(wanted: str, device: torch.device) -> str:
    """`policy.layer_spec`; "auto" is "te" on a GPU where transformer-engine imports, else "local".

    Raises:
        ValueError: "te" without a GPU or the package.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if wanted == "te" and not (HAVE_TE and device.type == "cuda"):
        raise ValueError(
            "policy.layer_spec=te needs a CUDA device and transformer-engine; "
            "install it with pip install 'reinforcer-tp[gpu]' or use policy.layer_spec=local"
        )
    if wanted == "auto":
        return "te" if HAVE_TE and device.type == "cuda" else "local"
    return wanted


def check_fp8(fp8: str | None, device: torch.device) -> None:
    """Raises ConfigError where `policy.fp8` cannot run here.

    Asked when a run starts, not by `--check`, which must pass on a login node without a GPU.
    """
    from megatron.core.extensions import transformer_engine as engine

    if fp8 not in RECIPES:
        return
    what, needed = f"policy.fp8={fp8}", RECIPES[fp8].engine
    require(
        device.type == "cuda",
        f"{what} needs a CUDA device and this machine shows none; start it on a machine with a "
        "GPU, or use policy.fp8=off",
    )
    require(
        engine.HAVE_TE,
        f"{what} needs transformer-engine >= {needed}, which cannot be imported; install it with "
        "pip install 'reinforcer-tp[gpu]', or use policy.fp8=off",
    )
    require(
        is_te_min_version(needed),
        f"{what} needs transformer-engine >= {needed}, got {get_te_version()}; "
        "install a newer one with pip install 'reinforcer-tp[gpu]', or use policy.fp8=off",
    )
    manager = engine.FP8GlobalStateManager
    is_blockwise = fp8 == "blockwise"
    ask = manager.is_fp8_block_scaling_available if is_blockwise else manager.is_fp8_available
    is_there, reason = ask()
    other = "policy.fp8=hybrid or off" if is_blockwise else "policy.fp8=off"
    require(is_there, f"{what} does not run on this GPU with this CUDA: {reason} Use {other}")


def has_weight_gradient_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Apex is there to add weight gradients to `main_grad` inside their product.

    Megatron asks for it with Transformer Engine's own kernel too (tensor_parallel/layers.py).
    """
    from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

    return _grad_accum_fusion_available and device.type == "cuda" and dtype.itemsize == 2
