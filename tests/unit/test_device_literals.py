"""Which device a tensor lives on is decided in mcore/topology.py: nobody else names one.

Found in the source: "cuda" and "cpu" as values, `.cuda()`, `.cpu()` (which waits for the device),
and functions of torch.cuda that mean "the current device". Asking `device.type == "cuda"` is fine.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.test_forbidden_calls import _names, _resolve

ROOT = Path(__file__).resolve().parents[2]
DEVICE = re.compile(r"(cuda|cpu|meta)(:\d+)?")
# Of torch.cuda without an argument: they ask whether there is one, not which.
ASKING = ("is_available", "device_count", "is_initialized")
WHOLE_FILES = ("reinforcer_tp/mcore/cpu.py",)  # answers "cpu" to Megatron's own literals
# (file, what) -> how often
ALLOWED = {
    ("reinforcer_tp/mcore/topology.py", "'cuda'"): 1,  # the one decision
    ("reinforcer_tp/mcore/topology.py", "'cpu'"): 1,
    ("reinforcer_tp/mcore/topology.py", "torch.cuda.set_device"): 1,
    ("reinforcer_tp/inputs.py", "'cuda'"): 1,  # what will be decided, to refuse early
    ("reinforcer_tp/inputs.py", "'cpu'"): 1,
    ("reinforcer_tp/mcore/model.py", "'cpu'"): 1,  # a norm, where Megatron makes its own modules
    ("reinforcer_tp/mcore/model.py", "torch.cuda.current_device"): 1,
    ("reinforcer_tp/mcore/random_state.py", "torch.cuda.get_rng_state"): 1,  # all generators
    ("reinforcer_tp/mcore/checkpoint.py", "torch.cuda.synchronize"): 1,  # files are written next
    ("reinforcer_tp/mcore/checkpoint.py", ".cpu()"): 1,
    ("reinforcer_tp/mcore/weights.py", ".cpu()"): 1,  # a tensor on its way to a file
    ("reinforcer_tp/mcore/fake_cluster.py", "'cpu'"): 1,  # where its fake tensors stand
    ("reinforcer_tp/mcore/segments.py", "'cpu'"): 1,  # a default of host tables
    ("reinforcer_tp/mcore/shape.py", "'cpu'"): 1,  # transformers' rope tables
    ("reinforcer_tp/reference/sweep.py", "'cpu'"): 1,  # log-probs on their way to the store
    ("reinforcer_tp/first_step.py", "'cpu'"): 2,  # once a run, compared on the host
    ("reinforcer_tp/first_step.py", ".cpu()"): 2,
    ("reinforcer_tp/nonfinite.py", "'cpu'"): 1,  # the post-mortem of a step
}


def violations(source: str) -> list[tuple[int, str]]:
    """(line, what) of every place that names a device."""
    tree = ast.parse(source)
    names, no_devices = _names(tree), set()
    for node in ast.walk(tree):  # texts that are compared, keys of dicts, parts of f-strings
        children = []
        if isinstance(node, ast.Compare):
            children = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            children = node.keys
        elif isinstance(node, ast.JoinedStr):
            children = node.values
        no_devices |= {id(child) for child in children}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if DEVICE.fullmatch(node.value) and id(node) not in no_devices:
                found.append((node.lineno, repr(node.value)))
        elif isinstance(node, ast.Call):
            found += _of_call(node, names)
    return sorted(found)


def _of_call(node: ast.Call, names: dict[str, str]) -> list[tuple[int, str]]:
    name = _resolve(node.func, names)
    if re.fullmatch(r"torch\.cuda\.\w+", name):
        last = name.rpartition(".")[2]
        is_current = not (node.args or node.keywords) and last not in ASKING
        return [(node.lineno, name)] if is_current or last == "set_device" else []
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "cpu"):
        return [(node.lineno, f".{node.func.attr}()")]
    return []


def test_no_file_names_a_device_but_what_is_listed():
    lines: dict[tuple[str, str], list[int]] = {}
    for path in [*ROOT.glob("reinforcer_tp/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        file = str(path.relative_to(ROOT))
        if file not in WHOLE_FILES:
            for line, what in violations(path.read_text()):
                lines.setdefault((file, what), []).append(line)
    found = Counter({key: len(where) for key, where in lines.items()})
    surplus = {key: lines[key] for key in found if found[key] > ALLOWED.get(key, 0)}
    assert not surplus, f"take the device from the topology or a tensor: {surplus}"
    missing = {key for key in ALLOWED if found[key] != ALLOWED[key]}
    assert not missing, f"no longer there, take it off the list: {missing}"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("torch.zeros(3, device='cuda')", "'cuda'"),
        ("torch.zeros(3, device='cuda:0')", "'cuda:0'"),
        ("x.to('cpu')", "'cpu'"),
        ("torch.device('cuda', rank)", "'cuda'"),
        ("device = 'cuda' if has_cuda else other", "'cuda'"),
        ("def f(device='cpu'): pass", "'cpu'"),
        ("DEVICES = {'here': 'cuda'}", "'cuda'"),
        ("x.cuda()", ".cuda()"),
        ("x.cuda(non_blocking=True)", ".cuda()"),
        ("x.detach().cpu()", ".cpu()"),
        ("import torch\ntorch.cuda.current_device()", "torch.cuda.current_device"),
        ("import torch\ntorch.cuda.set_device(0)", "torch.cuda.set_device"),
        ("import torch\ntorch.cuda.synchronize()", "torch.cuda.synchronize"),
        ("from torch import cuda\ncuda.current_device()", "torch.cuda.current_device"),
        ("from torch.cuda import synchronize\nsynchronize()", "torch.cuda.synchronize"),
    ],
)
def test_each_form_is_found(source, what):
    assert [found for _, found in violations(source)] == [what]


@pytest.mark.parametrize(
    "source",
    [
        "if x.device.type == 'cuda': pass",
        "assert kind in (first, second) and 'cuda' != kind",
        "import torch\ntorch.cuda.is_available()\ntorch.cuda.synchronize(x.device)",
        "facts = {'cuda': version}",
        "name = f'random.cuda{rank}'\nbackend = 'cpu:gloo,cuda:nccl'",
        "torch.zeros(3, device=x.device)",
    ],
)
def test_what_takes_its_device_from_elsewhere_passes(source):
    assert violations(source) == []
