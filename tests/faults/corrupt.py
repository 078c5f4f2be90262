"""G2: damaged checkpoints. None is loaded, the damaged file is named, the one before it is taken.

Two ranks write steps 4 and 8 of a small model. Then step 8 is damaged in one way at a time, and
both ranks look for what to go on from, exactly as a run does: first as told by
checkpointing.on_damaged=stop, then by previous.
"""

import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch.distributed as dist

from tests.distributed.layouts import build, config_of, judge, steps_of
from tests.distributed.spawn import run_distributed
from tests.faults.figures import Figures

MUTANTS = 10_000


def run(budget: float, seed: int, folder: Path) -> Figures:
    folder.mkdir(parents=True, exist_ok=True)
    model = judge("four", folder / "model")["folder"]
    count = max(1, round(MUTANTS * budget))
    found = run_distributed(damage_and_look, 2, model, str(folder), count, seed, timeout_s=3600)
    counts, failures = found[0]
    return Figures(goal="G2", title="damaged checkpoints", counts=counts, failures=failures)


# Each damages the folder and returns the name of the file that must be named.
Damage = Callable[[Path, Path, random.Random], str]


def any_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.iterdir()))


def flip(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    replace(path, bytes(content))
    return path.name


def zero(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    content = bytearray(path.read_bytes())
    begin = chance.randrange(len(content))
    end = min(len(content), begin + chance.choice([1, 16, 512, 4096]))
    content[begin:end] = bytes(end - begin)
    replace(path, bytes(content))
    return path.name


def truncate(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    content = path.read_bytes()
    replace(path, content[: chance.choice([0, len(content) // 2, len(content) - 1])])
    return path.name


def append(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    replace(path, path.read_bytes() + chance.choice([b"\0", b"x", b"{}", path.read_bytes()]))
    return path.name


def swap(folder: Path, other: Path, chance: random.Random) -> str:
    """Two files of one checkpoint change places."""
    first, second = chance.sample(sorted(p for p in folder.iterdir() if p.name != MANIFEST), 2)
    contents = first.read_bytes(), second.read_bytes()
    replace(first, contents[1])
    replace(second, contents[0])
    return f"{first.name} {second.name}"


def swap_steps(folder: Path, other: Path, chance: random.Random) -> str:
    """A file of an earlier step, under the same name."""
    path = any_file(folder, chance)
    replace(path, (other / path.name).read_bytes())
    return path.name if path.name != MANIFEST else "*"  # whatever disagrees with it


def drop(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    path.unlink()
    return path.name


def extra(folder: Path, other: Path, chance: random.Random) -> str:
    name = chance.choice(["rank_00002.safetensors", "notes.txt", ".hidden", "state.json.bak"])
    (folder / name).write_bytes(b"x")
    return name


def stale_manifest(folder: Path, other: Path, chance: random.Random) -> str:
    """An earlier step's manifest that claims, with a right digest of its own, to be this step's."""
    manifest = json.loads((other / MANIFEST).read_bytes())
    del manifest["sha256"]
    manifest["step"] = 8
    forge(folder, manifest)
    return "*"


def forged_digest(folder: Path, other: Path, chance: random.Random) -> str:
    """A manifest in order, but for one digest of a file."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"]
    name = chance.choice(sorted(manifest["files"]))
    manifest["files"][name]["sha256"] = f"{chance.getrandbits(256):064x}"
    forge(folder, manifest)
    return name


def no_regular_file(folder: Path, other: Path, chance: random.Random) -> str:
    path = any_file(folder, chance)
    path.unlink()
    if chance.random() < 0.5:
        path.symlink_to(other / path.name)
    else:
        path.mkdir()
    return path.name


MANIFEST = "manifest.json"
DAMAGES: list[Damage] = [
    *(flip, zero, truncate, append, swap, swap_steps),
    *(drop, extra, stale_manifest, forged_digest, no_regular_file),
]


def forge(folder: Path, manifest: dict) -> None:
    from reinforcer_tp.checkpoint_folder import _digest

    replace(folder / MANIFEST, json.dumps({**manifest, "sha256": _digest(manifest)}).encode())


def replace(path: Path, content: bytes) -> None:
    """Mutants are made of hard links: the file of the good checkpoint must stay."""
    path.unlink()
    path.write_bytes(content)


def damage_and_look(model: str, root: str, count: int, seed: int) -> tuple[dict, list[str]]:
    """In each of two ranks."""
    from reinforcer_tp.mcore.checkpoint import CheckpointWriter

    config = config_of(1, 1, {}, sharded=True)
    parts = build(config, model)
    topology, policy, training, _ = parts
    good, directory = Path(root) / "good", Path(root) / "checkpoints"
    described = {"run": "r", "branch": None, "layout": topology.layout()}
    writer = CheckpointWriter(good, topology, described=described)
    for step in (4, 8):
        steps_of(config, parts, 2)
        writer.save(step, policy, training, state={"identity": {}}, metrics={})
    # What the two steps share must not hide that one is the other's.
    assert topology.rank or distinct(good)
    chance, counts, failures = random.Random(seed), Counter(), []
    for index in range(count):
        damage = DAMAGES[index % len(DAMAGES)]
        named = ""
        if topology.is_rank_zero:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(good, directory, copy_function=os.link)
            named = damage(directory / "step_8", directory / "step_4", chance)
        dist.barrier()
        wrong = look(directory, good, named, topology)
        counts["mutants"] += 1
        counts[damage.__name__] += 1
        if wrong:
            failures.append(f"{damage.__name__} of {named} (mutant {index}, seed {seed}): {wrong}")
    counts["wrong loads"] = sum("taken" in text for text in failures)
    return dict(counts), failures


def distinct(good: Path) -> bool:
    manifests = [json.loads((good / f"step_{s}" / MANIFEST).read_bytes()) for s in (4, 8)]
    first, second = ({n: f["sha256"] for n, f in m["files"].items()} for m in manifests)
    return all(first[n] != second[n] for n in first if n.startswith("rank_"))


def look(directory: Path, good: Path, named: str, topology) -> str:
    """What is wrong with how the run deals with it; "" = nothing."""
    from reinforcer_tp.checkpoint_folder import CheckpointError

    try:
        step, _ = choose(directory, topology, "stop")
    except CheckpointError as error:
        names = named.split()
        is_named = named == "*" or any(f"step_8/{name}" in str(error) for name in names)
        if topology.is_rank_zero and not is_named:
            return f"the error does not name it: {error}"
    else:
        if topology.is_rank_zero and not same(directory / "step_8", good / "step_8"):
            return f"step {step} was taken as it is"
        return ""  # a byte that means nothing, such as a space in the manifest
    try:
        step, errors = choose(directory, topology, "previous")
    except CheckpointError as error:
        return f"nothing to fall back to: {error}"
    return "" if step == 4 and errors else f"fell back to step {step}"


def choose(directory: Path, topology, on_damaged: str) -> tuple[int, list]:
    """What train.py does: manifests before there is a process group, then every byte."""
    from reinforcer_tp.checkpoint_folder import CheckpointError
    from reinforcer_tp.config import CheckpointingConfig
    from reinforcer_tp.mcore.checkpoint import together
    from reinforcer_tp.mcore.restore import first_undamaged
    from reinforcer_tp.resume import find_resume_points

    config = dataclasses.replace(
        any_config(),
        checkpointing=CheckpointingConfig(checkpoint_dir=str(directory), on_damaged=on_damaged),
    )
    points, errors = together(lambda: find_resume_points(config, {}), CheckpointError)[0]
    folders = [point.folder for point in points]
    index, more = first_undamaged(folders, topology, may_fall_back=on_damaged == "previous")
    return points[index].step, errors + more


@cache  # YAML is slow
def any_config():
    from reinforcer_tp.config import load_config

    return load_config(None, ["policy.model_name=m"])


def same(folder: Path, good: Path) -> bool:
    names = {path.name for path in good.iterdir()}
    manifests = [json.loads((f / MANIFEST).read_bytes()) for f in (folder, good)]
    others = names - {MANIFEST}
    return manifests[0] == manifests[1] and all(
        (folder / n).read_bytes() == (good / n).read_bytes() for n in others
    )
