"""The sizes of a layout, with the names that a Topology has for them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcer_tp.config import Config
from reinforcer_tp.pipeline_layout import stage_layers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """World size = tp x pp x dp. Stands in for a Topology where only sizes are asked for."""

    world_size: int
    gpus_per_node: int
    tp_size: int
    pp_size: int
    vpp_size: int
    dp_size: int
    stage_layers: tuple[int, ...]  # of each of the pp x vpp chunks, as a token passes them
    dp_rank: int = 0

    @property
    def micro_batch_multiple(self) -> int:
        return self.pp_size if self.vpp_size > 1 else 1

    def chunk_layers(self, pp_rank: int) -> tuple[int, ...]:
        """Layers of each chunk of a pipeline rank."""
        return self.stage_layers[pp_rank :: self.pp_size]

    def text(self) -> str:
        virtual = f" vpp={self.vpp_size}" if self.vpp_size > 1 else ""
        return f"tp={self.tp_size} pp={self.pp_size}{virtual} dp={self.dp_size}"


def layout_of(config: Config, num_layers: int, world_size: int, gpus_per_node: int) -> Layout:
    """The layout of a checked configuration. Raises ConfigError where the layers do not divide."""
    megatron = config.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    return Layout(
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        tp_size=tp,
        pp_size=pp,
        vpp_size=megatron.virtual_stages,
        dp_size=world_size // (tp * pp),
        stage_layers=tuple(stage_layers(megatron, num_layers)),
    )
