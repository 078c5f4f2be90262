"""The states of all random generators of this process, as tensors."""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

PREFIX = "random."  # of the names
_TRACKER = f"{PREFIX}tracker."


def get() -> dict[str, Tensor]:
    """torch's (and CUDA's), Megatron's tracker's, Python's and numpy's."""
    version, words, _ = random.getstate()
    _, keys, position, *_ = np.random.get_state()
    states = {
        f"{PREFIX}torch": torch.get_rng_state(),
        f"{PREFIX}python": torch.tensor([version, *words]),
        f"{PREFIX}numpy": torch.tensor([position, *keys.tolist()]),
    }
    if torch.cuda.is_available():
        states[f"{PREFIX}cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    return states | {f"{_TRACKER}{name}": state for name, state in tracked.items()}


def set(states: dict[str, Tensor]) -> None:
    """The inverse of `get`."""
    torch.set_rng_state(states[f"{PREFIX}torch"])
    version, *words = states[f"{PREFIX}python"].tolist()
    random.setstate((version, tuple(words), None))
    position, *keys = states[f"{PREFIX}numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position))
    if torch.cuda.is_available() and f"{PREFIX}cuda" in states:
        torch.cuda.set_rng_state(states[f"{PREFIX}cuda"])
    tracked = {n.removeprefix(_TRACKER): s for n, s in states.items() if n.startswith(_TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)
