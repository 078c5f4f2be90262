"""Tokenized pairs as flat arrays on disk, memory-mapped by every rank of a node."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_ARRAYS = {
    "tokens": np.int32,
    "lengths": np.int32,
    "weights": np.float32,
    "rows": np.int64,
    "margins": np.float32,
    "reference_sums": np.float64,
}


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Ids of one pair; a sequence is the prompt and one response."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float = 1.0  # multiplies both loss terms
    row: int = 0  # in the source, counted from 0
    margin: float = 0.0  # by how much the chosen side should beat the rejected one
    reference: tuple[float, float] | None = None  # log-probs of the responses: chosen, rejected


class TokenizedSet(Sequence[TokenizedPair]):
    """n pairs: tokens (sum of lengths,) hold prompt, chosen, rejected of pair 0, of pair 1, ..."""

    def __init__(
        self,
        tokens: np.ndarray,  # (sum of lengths,) int32
        lengths: np.ndarray,  # (n, 3) int32: tokens of prompt, chosen, rejected
        weights: np.ndarray,  # (n,) float32
        rows: np.ndarray,  # (n,) int64
        margins: np.ndarray | None = None,  # (n,) float32; None = all 0
        reference_sums: np.ndarray | None = None,  # (n, 2) float64: chosen, rejected; None = NaN
    ):
        self.tokens, self.weights, self.rows = tokens, weights, rows
        self.margins = np.zeros(len(rows), np.float32) if margins is None else margins
        if reference_sums is None:
            reference_sums = np.full((len(rows), 2), np.nan)
        self.reference_sums = reference_sums
        self.has_reference = len(rows) > 0 and not np.isnan(reference_sums[0, 0])
        self._lengths = lengths
        self._ends = np.cumsum(lengths.sum(axis=1, dtype=np.int64))
        assert len(lengths) == len(weights) == len(rows) == len(self.margins)
        assert reference_sums.shape == (len(rows), 2)
        assert (np.isnan(reference_sums) != self.has_reference).all(), "all pairs or none"
        assert len(tokens) == (self._ends[-1] if len(lengths) else 0)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        num_prompt, num_chosen, num_rejected = self._lengths[index].tolist()
        end = int(self._ends[index])
        ids = self.tokens[end - num_prompt - num_chosen - num_rejected : end].tolist()
        return TokenizedPair(
            prompt=ids[:num_prompt],
            chosen=ids[num_prompt : num_prompt + num_chosen],
            rejected=ids[num_prompt + num_chosen :],
            weight=float(self.weights[index]),
            row=int(self.rows[index]),
            margin=float(self.margins[index]),
            reference=tuple(self.reference_sums[index].tolist()) if self.has_reference else None,
        )

    def reference_logps(self, index: int) -> np.ndarray:  # (C + R,) float64, chosen, rejected
        """The pair's reference sums spread evenly over the tokens of their responses.

        Only sums over a whole response mean something. Needs `has_reference`.
        """
        assert self.has_reference
        counts = self._lengths[index, 1:]
        return np.repeat(self.reference_sums[index] / counts, counts)

    def lengths(self) -> np.ndarray:
        """(n, 3) int32: tokens of prompt, chosen and rejected; not to be changed."""
        return self._lengths

    def shared_lengths(self, rows: Sequence[int], share: str) -> np.ndarray:  # (n,) int64
        """First tokens that both sequences of each pair in `rows` have in common, laid out once.

        `share`: "nothing"; "prompt"; "response" = the prompt and the tokens with which both
        responses begin, of the rejected one all but its last.
        """
        index = np.asarray(rows, dtype=np.int64)
        assert share in ("nothing", "prompt", "response"), share
        if share == "nothing":
            return np.zeros(len(index), np.int64)
        shared = self._lengths[index, 0].astype(np.int64)
        if share == "response":
            shared += np.array([self._common_start(i) for i in index.tolist()], np.int64)
        return shared

    def _common_start(self, index: int) -> int:
        _, num_chosen, num_rejected = self._lengths[index].tolist()
        end = int(self._ends[index])
        limit = min(num_chosen, num_rejected - 1)
        rejected = end - num_rejected
        chosen = rejected - num_chosen
        differs = self.tokens[chosen : chosen + limit] != self.tokens[rejected : rejected + limit]
        return int(differs.argmax()) if differs.any() else limit

    @classmethod
    def from_pairs(cls, pairs: Iterable[TokenizedPair]) -> "TokenizedSet":
        pairs = list(pairs)
        sides = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
        lengths = [[len(side) for side in three] for three in sides]
        return cls(
            tokens=np.array([i for three in sides for side in three for i in side], np.int32),
            lengths=np.array(lengths, np.int32).reshape(-1, 3),
            weights=np.array([pair.weight for pair in pairs], np.float32),
            rows=np.array([pair.row for pair in pairs], np.int64),
            margins=np.array([pair.margin for pair in pairs], np.float32),
            reference_sums=np.array(
                [pair.reference or (np.nan, np.nan) for pair in pairs], np.float64
            ).reshape(-1, 2),
        )

    def save(self, folder: Path) -> None:
        arrays = vars(self) | {"lengths": self._lengths}
        arrays = {name: arrays[name] for name in _ARRAYS}
        write_arrays(folder, [arrays], num_pairs=len(self), num_tokens=len(self.tokens))

    @classmethod
    def open(cls, folder: Path) -> "TokenizedSet":
        """The set saved in `folder`, read as it is needed. ValueError where a file is damaged."""
        arrays = {}
        for name, dtype in _ARRAYS.items():
            path = folder / f"{name}.npy"
            try:
                array = np.lib.format.open_memmap(path, mode="r")  # np.load takes archives, too
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{path} cannot be read ({error}); delete {folder}") from error
            if array.dtype != dtype:
                raise ValueError(
                    f"{path} holds {array.dtype}, expected {dtype.__name__}; delete {folder}"
                )
            arrays[name] = array
        expected = int(arrays["lengths"].sum(dtype=np.int64))
        if len(arrays["tokens"]) != expected:
            raise ValueError(
                f"{folder} holds {len(arrays['tokens'])} tokens, expected {expected}; delete it"
            )
        return cls(**arrays)


def write_arrays(
    folder: Path, parts: Iterable[Mapping[str, np.ndarray]], *, num_pairs: int, num_tokens: int
) -> None:
    """A set's files from its arrays, which come in `parts` of some pairs each, in their order."""
    shapes = dict.fromkeys(_ARRAYS, (num_pairs,))
    shapes |= {"tokens": (num_tokens,), "lengths": (num_pairs, 3), "reference_sums": (num_pairs, 2)}
    with contextlib.ExitStack() as stack:
        files = {}
        for name, dtype in _ARRAYS.items():
            files[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
            descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": descr, "fortran_order": False, "shape": shapes[name]}
            np.lib.format.write_array_header_1_0(files[name], header)
        for arrays in parts:
            for name, dtype in _ARRAYS.items():
                files[name].write(np.ascontiguousarray(arrays[name], dtype))
