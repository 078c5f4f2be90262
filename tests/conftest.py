"""Before any test imports triton: without a GPU its kernels run in the interpreter. And the order
of the files, which says how long a worker of several waits for the last one."""

import os

import torch

FOLDERS = ("slurm", "integration", "distributed", "faults", "ops", "unit")  # short files last

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    # Else xdist begins with the files of most tests, and ends with the long ones of a few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FOLDERS)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))
