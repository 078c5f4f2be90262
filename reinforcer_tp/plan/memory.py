"""What a rank holds at its worst moment, from what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcer_tp.plan.layout import Layout
from reinforcer_tp.plan.pipeline import peak_held, units
from reinforcer_tp.plan.probe import ChunkWork, RankWork

GIB = 2**30
SWEEP = "reference sweep"
# With chunks Megatron receives ahead and sends behind: its schedule holds between three messages
# less and six more than the units of work (test_peak_is_that_of_megatrons_schedule).
_MESSAGES_UNDER_WAY = 5


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank; `peak` is the largest of what the moments of a run need."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int
    activations: int  # of all micro-batches in flight, without the head
    head: int  # what log-probs and loss add to that
    moments: dict[str, int]  # name -> bytes held then, all of the above that is there included

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def worst_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)


def rank_memory(work: RankWork, layout: Layout, num_micro_batches: int) -> RankMemory:
    """`num_micro_batches`: of each data-parallel rank in a step."""
    multiple = layout.micro_batch_multiple
    count = max(-(-num_micro_batches // multiple) * multiple, multiple)
    order = list(units(layout, work.pp_rank, count))
    body = peak_held(order, *_saved_and_peaks(work.chunks, with_head=False))
    whole = peak_held(order, *_saved_and_peaks(work.chunks, with_head=True))
    if layout.vpp_size > 1:
        body += _MESSAGES_UNDER_WAY * work.message_bytes
        whole += _MESSAGES_UNDER_WAY * work.message_bytes
    weights = work.parameter_bytes + work.reference_bytes + work.buffer_bytes
    static = weights + work.gradient_bytes + work.optimizer_bytes
    moments = {
        "forward and backward": static + whole,
        "optimizer step": static + work.optimizer.peak_bytes,
        "reduction of gradients": static + work.reduce.peak_bytes,
    }
    if work.reference_bytes:  # runs before each step's forward and backward
        moments["reference forward"] = static + work.sweep.peak_bytes
    else:
        moments[SWEEP] = work.parameter_bytes + work.sweep.peak_bytes
    return RankMemory(
        parameters=work.parameter_bytes,
        gradients=work.gradient_bytes,
        optimizer=work.optimizer_bytes,
        reference=work.reference_bytes,
        buffers=work.buffer_bytes,
        activations=body,
        head=whole - body,
        moments=moments,
    )


def _saved_and_peaks(
    chunks: tuple[ChunkWork, ...], *, with_head: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    saved, peaks = [], []
    for chunk in chunks:
        kept, forward, backward = (
            chunk.forward.saved_bytes,
            chunk.forward.peak_bytes,
            chunk.backward.peak_bytes,
        )
        if with_head and chunk.head_forward is not None:
            forward = max(forward, kept + chunk.head_forward.peak_bytes)
            backward = max(
                chunk.head_backward.peak_bytes, chunk.head_backward.saved_bytes + backward
            )
            kept += chunk.head_forward.saved_bytes
        saved.append(kept)
        peaks.append((forward, backward))
    return saved, peaks
