"""No file of ours runs what it reads: calls that unpickle or execute are found in the source.

What is allowed is spelled out in ALLOWED, by file, call and number.
"""

import ast
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("reinforcer_tp", "kernels", "benchmarks", "tests", "slurm", "docs", ".ci")
# (file, call) -> how often. Results that a test's own processes hand to it, and our own docs.
ALLOWED = {
    ("tests/distributed/spawn.py", "pickle.loads"): 2,
    ("tests/distributed/reference_cases.py", "pickle.loads"): 1,
    ("tests/unit/test_docs_code.py", "exec"): 1,
    ("tests/unit/test_security_files.py", "pickle.loads"): 1,  # the audit hook must see it
    ("tests/faults/payloads.py", "exec"): 1,  # what a payload would call
    ("tests/unit/test_prepare.py", "allow_pickle=True"): 1,  # writes what must be refused
}
LOADERS = ("load", "loads", "Unpickler", "load_module")
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
FORBIDDEN = {
    *(f"{module}.{name}" for module in PICKLES for name in LOADERS),
    *("pickle._loads", "pickle._load", "shelve.open", "shelve.Shelf", "pandas.read_pickle"),
    *("torch.serialization.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("torch.distributed.checkpoint.load", "torch.hub.load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("eval", "exec", "builtins.eval", "builtins.exec", "runpy.run_module"),
    *(f"yaml.{name}" for name in ("load_all", "full_load", "unsafe_load", "full_load_all")),
    *("yaml.unsafe_load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"),
    *("yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader"),
    *("importlib.machinery.SourceFileLoader", "transformers.dynamic_module_utils"),
}
TRUE_KEYWORDS = ("trust_remote_code", "allow_pickle", "shell")


def violations(source: str) -> list[tuple[int, str]]:
    """(line, what) of every forbidden form."""
    tree = ast.parse(source)
    names = _names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += _of_call(node, names)
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = _resolve(node, names)  # also where it is passed on: map(eval, texts)
            if name in FORBIDDEN:
                found.append((node.lineno, name))
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            found.append((node.lineno, f"from {node.module} import *"))
    return sorted(found)


def _of_call(node: ast.Call, names: dict[str, str]) -> list[tuple[int, str]]:
    name, found = _resolve(node.func, names), []
    keywords = {k.arg: k.value for k in node.keywords}
    if name == "torch.load" and not _is(keywords.get("weights_only"), True):
        found.append((node.lineno, "torch.load without weights_only=True"))
    if name == "yaml.load":
        found.append((node.lineno, "yaml.load"))
    if name in ("getattr", "__import__", "importlib.import_module") and node.args:
        last = node.args[1 if name == "getattr" and len(node.args) > 1 else 0]
        text = last.value if isinstance(last, ast.Constant) else None
        if text in (*PICKLES, "eval", "exec", "system", "loads", "unsafe_load"):
            found.append((node.lineno, f"{name}({text!r})"))
    for key in TRUE_KEYWORDS:
        value = keywords.get(key)
        if value is not None and not (_is(value, False) or _is(value, None)):
            found.append((node.lineno, f"{key}={ast.unparse(value)}"))
    for value in (k.value for k in node.keywords if k.arg is None):
        if isinstance(value, ast.Dict):
            found += _of_dict(value)
    return found


def _of_dict(node: ast.Dict) -> list[tuple[int, str]]:
    pairs = zip(node.keys, node.values, strict=True)
    return [
        (node.lineno, f"{key.value}={ast.unparse(value)}")
        for key, value in pairs
        if isinstance(key, ast.Constant) and key.value in TRUE_KEYWORDS and not _is(value, False)
    ]


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _names(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> what it was imported as, or assigned from."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):  # load = torch.load
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.Name):
            for target in node.targets:
                if isinstance(target, ast.Name) and (name := _resolve(node.value, names)):
                    names.setdefault(target.id, name)
    return names


def _resolve(node: ast.AST, names: dict[str, str]) -> str:
    """The full dotted name, "" where it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _resolve(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_forbidden_but_what_is_listed():
    found: Counter = Counter()
    lines: dict[tuple[str, str], list[int]] = {}
    for path in files():
        if path == Path(__file__):
            continue
        with tokenize.open(path) as file:
            for line, what in violations(file.read()):
                key = (str(path.relative_to(ROOT)), what)
                found[key] += 1
                lines.setdefault(key, []).append(line)
    surplus = {key: lines[key] for key in found if found[key] > ALLOWED.get(key, 0)}
    assert not surplus, surplus
    missing = {key for key in ALLOWED if found[key] != ALLOWED[key]}
    assert not missing, f"no longer there, take it off the list: {missing}"


def test_the_gate_reads_the_whole_project():
    read = {str(path.relative_to(ROOT)) for path in files()}
    assert {"reinforcer_tp/train.py", "kernels/gemm.py", "benchmarks/measure.py"} <= read
    assert "tests/distributed/spawn.py" in read and len(read) > 150


def test_scripts_run_no_text():
    """Shell scripts and the Makefile: no eval, no code in `python -c` that unpickles."""
    scripts = [*(ROOT / "slurm").rglob("*.sh"), ROOT / ".ci" / "run", ROOT / "Makefile"]
    for path in scripts:
        text = path.read_text()
        for word in (r"(^|[;&|\s])eval\s", r"pickle", r"torch\.load", r"trust_remote_code"):
            assert not re.search(word, text, re.MULTILINE), (path, word)


BAD = {
    "import pickle\npickle.load(f)": "pickle.load",
    "import pickle as p\np.loads(b)": "pickle.loads",
    "from pickle import load\nload(f)": "pickle.load",
    "from pickle import loads as read\nread(f)": "pickle.loads",
    "import pickle\npickle.Unpickler(f).load()": "pickle.Unpickler",
    "import pickle\nread = pickle.load\nread(f)": "pickle.load",
    "import pickle\nclass U(pickle.Unpickler): pass": "pickle.Unpickler",
    "import _pickle\n_pickle.loads(b)": "_pickle.loads",
    "import torch\ntorch.load(p)": "torch.load without weights_only=True",
    "import torch as t\nt.load(p, weights_only=False)": "torch.load without weights_only=True",
    "import torch\ntorch.load(p, weights_only=flag)": "torch.load without weights_only=True",
    "from torch import load\nload(p)": "torch.load without weights_only=True",
    "from torch.serialization import load\nload(p)": "torch.serialization.load",
    "import torch.distributed.checkpoint as dcp\ndcp.load(s)": "torch.distributed.checkpoint.load",
    "eval('1')": "eval",
    "exec(code)": "exec",
    "list(map(eval, texts))": "eval",
    "import builtins\nbuiltins.exec(code)": "builtins.exec",
    "getattr(builtins, 'eval')('1')": "getattr('eval')",
    "import yaml\nyaml.load(t)": "yaml.load",
    "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)": "yaml.load",
    "from yaml import load\nload(t)": "yaml.load",
    "import yaml as y\ny.unsafe_load(t)": "yaml.unsafe_load",
    "import yaml\nclass L(yaml.FullLoader): pass": "yaml.FullLoader",
    "AutoModel.from_pretrained(p, trust_remote_code=True)": "trust_remote_code=True",
    "AutoModel.from_pretrained(p, trust_remote_code=flag)": "trust_remote_code=flag",
    "AutoModel.from_pretrained(p, **{'trust_remote_code': True})": "trust_remote_code=True",
    "import numpy as np\nnp.load(p, allow_pickle=True)": "allow_pickle=True",
    "import dill\ndill.load(f)": "dill.load",
    "from joblib import load\nload(f)": "joblib.load",
    "import marshal\nmarshal.loads(b)": "marshal.loads",
    "import shelve\nshelve.open(p)": "shelve.open",
    "import pandas as pd\npd.read_pickle(p)": "pandas.read_pickle",
    "import os\nos.system('ls')": "os.system",
    "from os import popen as p\np('ls')": "os.popen",
    "import subprocess as s\ns.run('ls', shell=True)": "shell=True",
    "from subprocess import Popen\nPopen('ls', shell=1)": "shell=1",
    "__import__('pickle').loads(b)": "__import__('pickle')",
    "import importlib\nimportlib.import_module('marshal')": "importlib.import_module('marshal')",
    "from pickle import *": "from pickle import *",
}


@pytest.mark.parametrize("source", BAD)
def test_each_form_is_found(source):
    assert BAD[source] in [what for _, what in violations(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "AutoModel.from_pretrained(p, trust_remote_code=False)",
        "import json\njson.load(f)\nmodel.eval()\nre.compile(text)",
        "import pickle\npickle.dumps(x)",
        "import yaml\nyaml.safe_load(t)\nclass L(yaml.SafeLoader): pass",
    ],
)
def test_what_is_safe_passes(source):
    assert violations(source) == []
