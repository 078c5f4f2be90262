"""Which pairs each step takes and how they are cut: what the configuration says of batches."""

from reinforcer_tp.config import Config
from reinforcer_tp.data.loader import global_batch_rows, steps_per_epoch, validation_batch_rows
from reinforcer_tp.data.micro_batches import MicroBatching
from reinforcer_tp.flops import pair_cost
from reinforcer_tp.fp8 import row_multiple
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.mcore.topology import Topology


def num_steps(config: Config, num_pairs: int) -> int:
    """Optimizer steps of the whole run. Raises ValueError when there is no whole global batch."""
    steps = config.dpo.max_num_epochs * steps_per_epoch(
        num_pairs, config.policy.train_global_batch_size
    )
    limit = config.dpo.max_num_steps
    return steps if limit is None else min(steps, limit)


def train_rows(config: Config, num_pairs: int, step: int) -> list[int]:
    """Indices of the pairs of optimizer step `step` (from 1)."""
    return global_batch_rows(
        num_pairs,
        config.policy.train_global_batch_size,
        seed=config.dpo.seed,
        step=step - 1,
        shuffle=config.data.shuffle,
    )


def validation_batches(config: Config, num_pairs: int) -> list[list[int]]:
    """Indices of the pairs of each validation batch."""
    dpo = config.dpo
    return list(
        validation_batch_rows(num_pairs, dpo.val_global_batch_size, max_batches=dpo.val_batches)
    )


def micro_batching(
    config: Config, shape: ModelShape, topology: Topology, *, is_validation: bool = False
) -> MicroBatching:
    """How this run cuts global batches."""
    policy, megatron = config.policy, config.policy.megatron_cfg
    max_pairs = policy.train_micro_batch_size
    if is_validation and config.dpo.val_micro_batch_size is not None:
        max_pairs = config.dpo.val_micro_batch_size
    return MicroBatching(
        max_tokens=policy.micro_batch_tokens,
        max_pairs=max_pairs,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        divisible_by=row_multiple(policy.fp8)
        * (topology.tp_size if megatron.sequence_parallel else 1),
        equal_rows=topology.pp_size > 1,
        share=config.data.share,
        # Rows of one length cost the same: there the fewest tokens in the longest one count.
        cost=None if topology.pp_size > 1 else pair_cost(shape),
        count_multiple=topology.micro_batch_multiple,
    )
