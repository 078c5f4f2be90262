"""One Hugging Face <-> Megatron name table; weights streamed from safetensors and written back.

A tensor is read slice by slice, straight into this rank's tensor- and pipeline-parallel shard: no
rank ever holds a whole model. Written files hold at most `_MAX_FILE_BYTES`; one is in memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from reinforcer_tp.faultpoints import fault_point
from reinforcer_tp.mcore.model import PolicyModel
from reinforcer_tp.mcore.shape import ModelShape
from reinforcer_tp.mcore.topology import Topology
from reinforcer_tp.untrusted import INDEX_BYTES, inside, read_json

_MAX_FILE_BYTES = 4 << 30
_DTYPES = ("F64", "F32", "BF16", "F16")  # as safetensors names them

# A reader gives rows and columns [start, stop) of a Hugging Face tensor; None = all of them.
Range = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How one Megatron parameter is made of Hugging Face tensors."""

    name: str  # Megatron's, with the layer's number in the whole model
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: str  # replicated | vocab | qkv | column | row


# Megatron's suffix within a layer -> (Hugging Face suffixes within a layer, kind).
_LAYER_TABLE = {
    "input_layernorm.weight": (("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.weight": (
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    "self_attention.linear_qkv.bias": (
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "qkv",
    ),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), "replicated"),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), "replicated"),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), "row"),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), "column"),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), "row"),
}
_TOP_TABLE = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", "vocab"),
    "output_layer.weight": ("lm_head.weight", "vocab"),
    "decoder.final_layernorm.weight": ("model.norm.weight", "replicated"),
}


def weight_table(model: PolicyModel) -> Iterator[tuple[Parameter, Entry]]:
    """Every parameter of this rank's chunks and how it is made, in parameter order."""
    shape = model.shape
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if name in _TOP_TABLE:
                if name == "output_layer.weight" and shape.tied:  # the last stage's copy
                    name = "embedding.word_embeddings.weight"
                hf_name, kind = _TOP_TABLE[name]
                hf_names: tuple[str, ...] = (hf_name,)
            else:
                _, _, index, suffix = name.split(".", 3)
                layer = chunk.decoder.layers[int(index)].layer_number - 1  # of the whole model
                suffixes, kind = _LAYER_TABLE[suffix]
                hf_names = tuple(f"model.layers.{layer}.{s}" for s in suffixes)
                name = f"decoder.layers.{layer}.{suffix}"
            shapes = tuple(hf_shape(n, shape) for n in hf_names)
            yield parameter, Entry(name=name, hf_names=hf_names, hf_shapes=shapes, kind=kind)


def hf_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The shape that the config demands of a Hugging Face tensor."""
    d, f = shape.hidden_size, shape.ffn_hidden_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    by_module = {
        "embed_tokens": (shape.vocab_size, d),
        "lm_head": (shape.vocab_size, d),
        "q_proj": (queries, d),
        "k_proj": (keys, d),
        "v_proj": (keys, d),
        "o_proj": (d, queries),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
    }
    module, kind = name.split(".")[-2:]
    full = by_module.get(module, (d,))
    return full[:1] if kind == "bias" else full


class SafetensorsReader:
    """Slices of the tensors in a local folder of safetensors files."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises ValueError when there is no safetensors file, or the index names one that is
        missing or outside of the folder."""
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            files = _weight_map(index)
            for name in set(files.values()):
                self._path(name)
        else:
            found = sorted(self.folder.glob("*.safetensors"))
            if not found:
                raise ValueError(
                    f"no safetensors file in {self.folder}; expected model.safetensors or an index "
                    "(convert the weights with save_pretrained, or set policy.load_weights=false)"
                )
            files = {}
            for path in found:
                with self._open(path.name) as handle:
                    files |= dict.fromkeys(handle.keys(), path.name)
        self.files = files
        self._handles: dict = {}

    def _open(self, file: str):
        path = self._path(file)
        try:
            return safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises its own types for torn files
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error

    def _path(self, file: str) -> Path:
        path = inside(self.folder, file)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is named by the index of {self.folder}; expected safetensors")
        if not path.is_file():
            raise ValueError(f"{path} is named by the index of {self.folder} but is missing")
        return path

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        """Raises ValueError when the tensor is missing or has another shape."""
        if name not in self.files:
            raise ValueError(
                f"tensor {name!r} is missing from {self.folder} ({len(self.files)} tensors there); "
                "expected every tensor that its config.json implies"
            )
        part = self._slice(name)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(
                f"tensor {name!r} in {self.folder} is {part.get_dtype()}, expected one of "
                f"{', '.join(_DTYPES)}: quantized weights are not built"
            )
        got = tuple(part.get_shape())
        if got != expected:
            raise ValueError(
                f"tensor {name!r} in {self.folder} has shape {got}, "
                f"but its config.json implies {expected}"
            )

    def read(self, name: str, rows: Range = None, columns: Range = None) -> Tensor:
        part = self._slice(name)
        first = slice(*rows) if rows else slice(None)
        if columns is None:
            return part[first]
        return part[first, slice(*columns)]

    def _slice(self, name: str):
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        return self._handles[file].get_slice(name)


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(inside(index.parent, index.name), INDEX_BYTES).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    return files


class RandomReader:
    """Random weights, a function of seed and tensor name alone, so equal in every layout."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.shape = shape
        self.seed = seed

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        pass

    def read(self, name: str, rows: Range = None, columns: Range = None) -> Tensor:
        size = hf_shape(name, self.shape)
        if name.endswith("bias"):
            full = torch.zeros(size)
        elif len(size) == 1:
            full = torch.ones(size)
        else:
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            full = torch.randn(size, generator=generator) * self.shape.initializer_range
        full = full[slice(*rows)] if rows else full
        return full[:, slice(*columns)] if columns else full


@torch.no_grad()
def load_weights(
    model: PolicyModel, reader: SafetensorsReader | RandomReader, topology: Topology
) -> None:
    """Fills this rank's parameters; `check_weights` has looked at the reader before."""
    for parameter, entry in weight_table(model):
        shard = _shard(entry, reader, model.shape, topology.tp_rank, topology.tp_size)
        assert shard.shape == parameter.shape, (entry, shard.shape, parameter.shape)
        parameter.copy_(shard)


def _shard(entry: Entry, reader, shape: ModelShape, tp_rank: int, tp_size: int) -> Tensor:
    def part(size: int) -> tuple[int, int]:
        return size * tp_rank // tp_size, size * (tp_rank + 1) // tp_size

    names, sizes = entry.hf_names, entry.hf_shapes
    if entry.kind == "replicated":
        return reader.read(names[0])
    if entry.kind == "row":
        return reader.read(names[0], None, part(sizes[0][1]))
    if entry.kind == "vocab":
        start, stop = part(shape.padded_vocab_size(tp_size))
        real = reader.read(names[0], (min(start, sizes[0][0]), min(stop, sizes[0][0])))
        padding = real.new_zeros(stop - start - real.shape[0], *real.shape[1:])
        return torch.cat((real, padding))
    shards = [reader.read(n, part(s[0])) for n, s in zip(names, sizes, strict=True)]
    if entry.kind == "column":
        return torch.cat(shards)
    assert entry.kind == "qkv", entry.kind
    groups = shape.num_kv_heads // tp_size
    by_group = [x.reshape(groups, -1, *x.shape[1:]) for x in shards]  # per kv head: q.. | k | v
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _unshard(entry: Entry, shards: list[Tensor], shape: ModelShape) -> list[Tensor]:
    """The inverse of `_shard`: full tensors, in the order of `entry.hf_names`."""
    if entry.kind == "replicated":
        return [shards[0]]
    if entry.kind == "row":
        return [torch.cat(shards, dim=1)]
    if entry.kind == "vocab":
        return [torch.cat(shards)[: shape.vocab_size]]
    if entry.kind == "column":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]
    per_group = shape.num_heads // shape.num_kv_heads * shape.head_dim
    sizes = [per_group, shape.head_dim, shape.head_dim]
    groups = shape.num_kv_heads // len(shards)
    split = [s.reshape(groups, sum(sizes), *s.shape[1:]).split(sizes, dim=1) for s in shards]
    return [torch.cat(parts).flatten(0, 1) for parts in zip(*split, strict=True)]


def shard_shape(entry: Entry, shape: ModelShape, tp_size: int) -> tuple[int, ...]:
    """Of one tensor-parallel shard of a parameter."""
    rows, *columns = entry.hf_shapes[0]
    if entry.kind == "replicated":
        return (rows, *columns)
    if entry.kind == "row":
        return rows, columns[0] // tp_size
    if entry.kind == "vocab":
        return shape.padded_vocab_size(tp_size) // tp_size, *columns
    return sum(size[0] for size in entry.hf_shapes) // tp_size, *columns


class _TensorReader:
    """Whole Hugging Face tensors in memory, read as `_shard` reads files."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, rows: Range = None, columns: Range = None) -> Tensor:
        part = self._tensors[name][slice(*rows)] if rows else self._tensors[name]
        return part[:, slice(*columns)] if columns else part


def reshard(
    entry: Entry, shards: list[Tensor], shape: ModelShape, tp_rank: int, tp_size: int
) -> Tensor:
    """Shard `tp_rank` of `tp_size` out of all shards of another tensor-parallel size."""
    whole = dict(zip(entry.hf_names, _unshard(entry, shards, shape), strict=True))
    return _shard(entry, _TensorReader(whole), shape, tp_rank, tp_size)


def full_tensors(
    model: PolicyModel,
    topology: Topology,
    of: Callable[[Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor | None]]:
    """(Hugging Face name, whole tensor on the CPU) of this rank's chunks; None where tp_rank > 0.

    `of` picks what is gathered: the parameter itself, or its gradient, say. Collective over the
    tensor-parallel group, one parameter at a time, in parameter order.
    """
    for parameter, entry in weight_table(model):
        if getattr(parameter, "shared", False):
            continue  # the last stage's copy of the tied weight, which the first stage writes
        local = of(parameter).contiguous()
        shards = [local]
        if topology.tp_size > 1 and entry.kind != "replicated":
            shards = [torch.empty_like(local) for _ in range(topology.tp_size)]
            dist.all_gather(shards, local, group=topology.tp_group)
        if topology.tp_rank:
            yield from ((n, None) for n in entry.hf_names)
        else:
            whole = _unshard(entry, [s.cpu() for s in shards], model.shape)
            for hf_name, tensor in zip(entry.hf_names, whole, strict=True):
                yield hf_name, tensor.contiguous()


def export_hf(
    model: PolicyModel,
    topology: Topology,
    folder: str | os.PathLike,
    write_companions: Callable[[Path], None],
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Writes a Hugging Face folder: sharded safetensors, index, and what `write_companions` adds
    (config.json, tokenizer). The folder appears whole or not at all.

    Collective over all ranks; only ranks with dp_rank 0 gather, and of those tp_rank 0 writes.
    """
    folder = Path(folder)
    building = folder.with_name(folder.name + ".partial")
    if topology.is_rank_zero:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    fault_point("export.folder")
    dist.barrier()
    written: list[tuple[str, dict[str, int]]] = []  # (file, {tensor: bytes})
    if topology.dp_rank == 0:
        written = _write_stage(model, topology, building, max_file_bytes)
    gathered: list = [None] * topology.world_size
    dist.all_gather_object(gathered, written)
    if topology.is_rank_zero:
        _name_files(building, [file for rank in gathered for file in rank])
        write_companions(building)
        fault_point("export.rename")
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    dist.barrier()


def _write_stage(
    model: PolicyModel, topology: Topology, building: Path, max_file_bytes: int
) -> list[tuple[str, dict[str, int]]]:
    written, pending, size = [], {}, 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            file = f"stage_{topology.pp_rank:03d}_{len(written):05d}.safetensors"
            save_file(pending, building / file, metadata={"format": "pt"})
            written.append((file, {name: t.nbytes for name, t in pending.items()}))
        pending, size = {}, 0

    for name, tensor in full_tensors(model, topology):
        if tensor is None:
            continue
        if size + tensor.nbytes > max_file_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
    flush()
    return written


def _name_files(building: Path, written: list[tuple[str, dict[str, int]]]) -> None:
    """Gives the files transformers' names and writes the index when there are several."""
    written = sorted(written)
    count = len(written)
    weight_map = {}
    for position, (file, tensors) in enumerate(written, start=1):
        single = "model.safetensors"
        name = single if count == 1 else f"model-{position:05d}-of-{count:05d}.safetensors"
        (building / file).rename(building / name)
        weight_map |= dict.fromkeys(tensors, name)
    if count > 1:
        total = sum(sum(tensors.values()) for _, tensors in written)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = building / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the whole model, in file order."""
    suffixes = [
        suffix
        for layer_suffixes, _ in _LAYER_TABLE.values()
        for suffix in layer_suffixes
        if (shape.qkv_bias or not suffix.endswith("bias"))
        and (shape.qk_norm or suffix.split(".")[-2] not in ("q_norm", "k_norm"))
    ]
    layers = [f"model.layers.{i}.{s}" for i in range(shape.num_layers) for s in suffixes]
    head = [] if shape.tied else ["lm_head.weight"]
    names = ["model.embed_tokens.weight", *layers, "model.norm.weight", *head]
    return {name: hf_shape(name, shape) for name in names}


def check_weights(reader: SafetensorsReader | RandomReader, shape: ModelShape) -> None:
    """Raises ValueError when any tensor of the whole model is missing or misshapen.

    Reads headers only, so every rank can do it before any process group exists.
    """
    for name, expected in hf_tensors(shape).items():
        reader.check(name, expected)
