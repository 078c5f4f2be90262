"""G10: what hashing and fsync cost a save.

One process saves a model's masters and moments again and again, in turn as it does, without its
digests, without its syncs, and without both, so that a slow moment of the machine meets all alike.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.layouts import build, config_of
from tests.distributed.spawn import run_distributed
from tests.faults.figures import Figures

SIZES = {1.0: (1024, 12), 0.0: (256, 4)}  # budget from which -> (hidden size, layers)
ROUNDS = 7
LIMIT = 0.10  # of a save


def run(budget: float, seed: int, folder: Path) -> Figures:
    hidden, layers = SIZES[1.0] if budget >= 1.0 else SIZES[0.0]
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 4096}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "model")
    # On a disk: the suite's own folder is in memory where it can be.
    with tempfile.TemporaryDirectory(prefix="faults_cost_") as disk:
        [counts] = run_distributed(measure, 1, str(folder / "model"), disk, timeout_s=1200)
    failures = []
    if budget >= 1.0 and counts["cost of both"] > LIMIT:
        failures.append(f"hashing and fsync cost {counts['cost of both']:.0%} of a save")
    return Figures(goal="G10", title="hashing and fsync cost", counts=counts, failures=failures)


def measure(model_folder: str, disk: str) -> dict[str, float]:
    """In one spawned rank: medians over rounds of the seconds of a save."""
    from reinforcer_tp.mcore.checkpoint import CheckpointWriter
    from reinforcer_tp.mcore.optim import zero_grad

    config = config_of(1, 1, {})
    topology, model, training, _ = build(config, model_folder)
    zero_grad(training)
    for parameter in model.chunks[0].parameters():
        parameter.main_grad.normal_()
    training.optimizer.step()
    ways = {
        "as it is": nullcontext,
        "without digests": no_digests,
        "without syncs": no_syncs,
        "without both": neither,
    }
    directory = Path(disk) / "checkpoints"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    background = CheckpointWriter(directory, topology, described={"layout": {}}, is_async=True)
    copies = []
    for _ in range(ROUNDS):
        for name, way in ways.items():
            writer = CheckpointWriter(directory, topology, described={"layout": {}})
            os.sync()
            with way():
                seconds[name].append(writer.save(1, model, training, state={}, metrics={}))
            size = sum(p.stat().st_size for p in (directory / "step_1").iterdir())
            shutil.rmtree(directory)
        copies.append(background.save(1, model, training, state={}, metrics={}))
        background.wait()
        shutil.rmtree(directory)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = median["as it is"]
    return {
        "MiB": size / 2**20,
        "save s": whole,
        "GiB/s": size / 2**30 / whole,
        "cost of digests": 1 - median["without digests"] / whole,
        "cost of syncs": 1 - median["without syncs"] / whole,
        "cost of both": 1 - median["without both"] / whole,
        "async: share that training waits for": statistics.median(copies[1:]) / whole,
        "async: the first time, which takes the memory": copies[0] / whole,
    }


@contextmanager
def no_digests() -> Iterator[None]:
    nothing = mock.Mock(return_value=mock.Mock(hexdigest=lambda: "0" * 64, update=len))
    with mock.patch.object(hashlib, "sha256", nothing):
        yield


@contextmanager
def no_syncs() -> Iterator[None]:
    with mock.patch.object(os, "fsync", no_sync), mock.patch.object(os, "fdatasync", no_sync):
        yield


@contextmanager
def neither() -> Iterator[None]:
    with no_digests(), no_syncs():
        yield


def no_sync(file: int) -> None:
    """A sync that does nothing."""
    assert file >= 0
