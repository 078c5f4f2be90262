"""Model FLOPs of a step; the rates they are read against are peak_rates.py's."""

from reinforcer_tp.data.packing import PairCost
from reinforcer_tp.mcore.shape import ModelShape


def pair_cost(shape: ModelShape) -> PairCost:
    """FLOPs of forward and backward (3x forward); recompute is not counted.

    Forward takes 2 FLOPs a weight for each token, in the head for response tokens only, and
    2 * 2 * head_dim * heads a layer for each key that a query sees.
    """
    d = shape.hidden_size
    queries = shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    layer_weights = d * (2 * queries + 2 * keys) + 3 * d * shape.ffn_hidden_size
    return PairCost(
        token=3.0 * 2 * shape.num_layers * layer_weights,
        response_token=3.0 * 2 * d * shape.vocab_size,
        visible_key=3.0 * 4 * shape.num_layers * queries,
    )
