"""Contents of files that would create the canary file if anything in them were executed."""

import gzip
import io
import json
import marshal
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

MARK = "reinforcer_poison"  # in every payload that is code, for the audit hook


class Evil:
    """Unpickled, it creates the canary."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple:
        return exec, (self.code,)


def code(canary: Path) -> str:
    return f"{MARK} = open({str(canary)!r}, 'w').close()"


def contents(canary: Path) -> dict[str, bytes]:
    """Name -> content, for any file."""
    source, evil = code(canary), Evil(code(canary))
    made: dict[str, bytes] = {
        f"pickle protocol {n}": pickle.dumps(evil, protocol=n) for n in range(6)
    }
    made |= {"os.system by hand": f"cos\nsystem\n(S'touch {canary} #{MARK}'\ntR.".encode()}
    made |= {f"compressed pickle {n}": f(pickle.dumps(evil)) for n, f in _PRESSES.items()}
    made |= {"torch zip": _torch(evil, True), "torch legacy": _torch(evil, False)}
    made |= {"numpy objects": _numpy(evil), "numpy archive": _numpy_archive(evil)}
    made |= {"marshal": marshal.dumps(compile(source, "evil", "exec"))}
    made |= {"python": source.encode(), "zip of python": _zip(source)}
    made |= {"extension type": _arrow(evil), "parquet with a pickle": _parquet(evil)}
    made |= _safetensors()
    made |= _json()
    made |= {name: text.encode() for name, text in _yaml(canary).items()}
    made |= {name: text.encode() for name, text in _templates(canary).items()}
    return made | {"empty": b"", "zeros": bytes(4096), "half a character": b'{"a": "\xc3"}'}


_PRESSES: dict[str, Callable[[bytes], bytes]] = {
    "zlib, as joblib": zlib.compress,
    "gzip": gzip.compress,
}


def _torch(evil: Evil, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(2), "evil": evil}, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def _numpy(evil: Evil) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([evil], dtype=object))
    return file.getvalue()


def _numpy_archive(evil: Evil) -> bytes:
    file = io.BytesIO()
    np.savez(file, tokens=np.array([evil], dtype=object))
    return file.getvalue()


def _zip(source: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("__main__.py", source)
        archive.writestr("__init__.py", source)
    return file.getvalue()


def _evil_schema(evil: Evil) -> pa.Schema:
    """What pyarrow once unpickled by itself, CVE-2023-47248."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(evil, protocol=0),
    }
    return pa.schema(
        [pa.field(name, pa.string(), metadata=metadata) for name in ("prompt", "chosen")]
    )


def _arrow(evil: Evil) -> bytes:
    schema = _evil_schema(evil)
    table = pa.table([pa.array(["x"]), pa.array(["y"])], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet(evil: Evil) -> bytes:
    table = pa.table([pa.array(["x"]), pa.array(["y"])], schema=_evil_schema(evil))
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _safetensors() -> dict[str, bytes]:
    def whole(header: bytes, data: bytes = bytes(16)) -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def entry(begin: Any, end: Any, shape: Any = (2,)) -> dict:
        return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}

    texts = {
        "overlapping": {"a": entry(0, 8), "b": entry(4, 12)},
        "negative offsets": {"a": entry(-8, 0)},
        "beyond the end": {"a": entry(0, 1 << 40, (1 << 38,))},
        "backwards": {"a": entry(8, 0)},
        "negative shape": {"a": entry(0, 8, (-2,))},
        "shape that overflows": {"a": entry(0, 8, (1 << 62, 8))},
    }
    made = {name: whole(json.dumps(header).encode()) for name, header in texts.items()}
    made["deep"] = whole(b'{"a":' * 200_000)
    made["a header of 100 MB"] = whole(b'{"__metadata__":{"a":"' + b"x" * 100_000_000 + b'"}}')
    made["a header of 2**63 bytes"] = struct.pack("<Q", 1 << 63) + b"{}"
    return {f"safetensors: {name}": content for name, content in made.items()}


def _json() -> dict[str, bytes]:
    return {
        "json: lists": b"[" * 1_000_000 + b"]" * 1_000_000,
        "json: objects": b'{"a":' * 1_000_000,
        "json: a list inside": b'{"weight_map": ' + b"[" * 1_000_000 + b"}",
        "json: a key twice": b'{"model_type": "llama", "model_type": "llama"}',
        "json: NaN": b'{"rms_norm_eps": NaN}',
        "json: a number of a million digits": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
        "json: infinity by exponent": b'{"rms_norm_eps": 1e999}',
        "json: another type": b'"text"',
        "json: py/object": b'{"py/object": "os.system", "__reduce__": ["os.system", ["true"]]}',
    }


def _yaml(canary: Path) -> dict[str, str]:
    return {
        "yaml: apply": f"dpo: !!python/object/apply:os.system ['touch {canary} #{MARK}']",
        "yaml: new": f'dpo: !!python/object/new:exec ["{code(canary)}"]',
        "yaml: module": "dpo: !!python/module:evil",
        "yaml: _target_": f"dpo:\n  _target_: os.system\n  command: touch {canary}",
        "yaml: environment": "logger:\n  log_dir: ${oc.env:HOME}",
        "yaml: aliases": "a0: &a0 [x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 4}]\n" for n in range(1, 15)),
    }


def _templates(canary: Path) -> dict[str, str]:
    run = f"touch {canary} #{MARK}"
    return {
        "template: popen": f"{{{{ cycler.__init__.__globals__.os.popen('{run}').read() }}}}",
        "template: subclasses": "{{ ''.__class__.__mro__[1].__subclasses__()[0]('x') }}",
        "template: filter": f"{{{{ (''|attr('__class__')).x('{run}') }}}}",
        "template: import": f"{{% import 'os' as os %}}{{{{ os.system('{run}') }}}}",
        "template: loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}",
        "template: doubling": "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
    }


def edits(canary: Path) -> dict[str, dict[str, Any]]:
    """Name -> keys to add to an object of JSON that stays right otherwise."""
    run = f"touch {canary} #{MARK}"
    named = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    both = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], **named}
    return {
        "auto_map": {"auto_map": both},
        "auto_map and trust": {"auto_map": both, "trust_remote_code": True},
        "auto_map as a list": {"auto_map": ["evil.Evil", "evil.Evil"]},
        "an unknown type": {"model_type": "evil", "auto_map": named},
        "attention": {"_attn_implementation_internal": "evil/kernel"},
        "attention, public": {"attn_implementation": "evil/kernel"},
        "experts": {"_experts_implementation_internal": "evil/kernel"},
        "quantization": {
            "quantization_config": {"quant_method": "evil", "module": "evil", "run": run}
        },
        "custom_generate": {"custom_generate": "evil/repo"},
        "custom_pipelines": {"custom_pipelines": {"x": {"impl": "evil.Evil"}}},
        "tokenizer_class": {"tokenizer_class": "evil.Evil"},
        "tokenizer_class: a model's": {"tokenizer_class": "AutoModelForCausalLM"},
        "tokenizer_class: pipeline": {"tokenizer_class": "pipeline"},
        "init_inputs": {"init_inputs": [run]},
        "files elsewhere": {
            "fast_tokenizer_files": ["tokenizer.../../../evil.json"],
            "vocab_file": "../../evil.pkl",
            "_data_files": [{"filename": "../../evil.arrow"}],
            "weight_map": {"model.norm.weight": "../../evil.safetensors"},
            "files": {"../../evil": {"bytes": 1, "sha256": "0"}},
            "splits": ["../.."],
        },
        "files of pickles": {
            "weight_map": {"model.norm.weight": "pytorch_model.bin"},
            "vocab_file": "pytorch_model.bin",
            "_data_files": [{"filename": "evil.pkl"}],
        },
        "template": {"chat_template": f"{{{{ cycler.__init__.__globals__.os.popen('{run}') }}}}"},
        "template of another type": {"chat_template": [{"name": "default", "template": "x"}]},
        "null": {"model_type": None, "tokenizer_class": None, "weight_map": None, "files": None},
        "format": {"_format_type": "torch", "_format_kwargs": {"x": run}, "format": 10**30},
    }
