"""Operators of the model's head. Imports torch only; importable without a GPU.

There is deliberately no `__version__`: transformers looks for another package of this name.
"""

from kernels.linear_logprob import vocab_parallel_linear_logprob

__all__ = ["vocab_parallel_linear_logprob"]
