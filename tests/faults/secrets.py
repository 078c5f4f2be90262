"""G9: canary secrets in the environment, the configuration and the command line of real runs.

Afterwards none of them is in anything that was printed or written: outputs, run folders,
checkpoints, exported models, the store, the caches.
"""

import random
import secrets
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

from tests.faults.figures import Figures
from tests.faults.runs import Toy, make_toy
from tests.integration.harness import RunResult, run_train

TITLE = "canary secrets: none is printed or written"
IN_ENVIRONMENT = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "SWANLAB_API_KEY",
    "GITHUB_TOKEN",
    "DB_PASSWORD",
    "SLURM_JWT_TOKEN",
    "MY_CLIENT_SECRET",
)
IN_ARGUMENTS = (
    "policy.model_name=https://me:{}@hub.invalid/x",
    "data.train_data_path=s3://{}@bucket.invalid/rows.jsonl",
    "logger.mlflow.tracking_uri=https://me:{}@mlflow.invalid",
    "logger.wandb.entity=https://h.invalid/?api_key={}",
    "policy.tokenizer.chat_template_kwargs={{a: [{{b: 'https://u:{}@h.invalid'}}]}}",
    "--colour=https://me:{}@hub.invalid",
    "dpo.no_such_key=https://me:{}@hub.invalid",
)
LEAKY = """
import os

class Leaky:
    def __init__(self, **kwargs):
        raise RuntimeError("cannot connect with " + " ".join(map(str, os.environ.values())))

class Fails:
    def __init__(self, **kwargs):
        class Rows(list):
            def __iter__(self):
                token = os.environ["HF_TOKEN"]
                raise SystemError(f"the server said no to {token!r} of {dict(os.environ)}")
        self.formatted_ds = {"train": Rows([1]), "validation": None}
"""


@dataclass
class Trial:
    """What a run is given, and what it must do."""

    name: str
    overrides: list[str] = field(default_factory=list)
    config: str | None = None  # YAML
    environment: dict[str, str] = field(default_factory=dict)
    succeeds: bool = False


def run(budget: float, seed: int, folder: Path) -> Figures:
    """`budget` 1.0 = every trial; less = a run that succeeds, one that raises, three refusals."""
    canaries: list[str] = []

    def canary() -> str:
        canaries.append(f"canary{secrets.token_hex(12)}")
        return canaries[-1]

    inputs, outputs = folder / "inputs", folder / "outputs"
    inputs.mkdir()
    toy = make_toy(inputs / "toy")
    (inputs / "leaky.py").write_text(LEAKY)
    environment = {name: canary() for name in IN_ENVIRONMENT}
    environment["HTTPS_PROXY"] = f"http://me:{canary()}@127.0.0.1:9"
    environment |= {"HF_HOME": str(outputs / "cache"), "PYTHONPATH": str(inputs)}
    trials = list(_trials(canary, environment))
    assert len(canaries) >= 20, len(canaries)
    if budget < 1.0:
        trials = trials[:2] + random.Random(seed).sample(trials[2:], 3)
    failures: list[str] = []
    for number, trial in enumerate(trials):
        result = _run(trial, toy, inputs, outputs / f"run{number}", environment)
        failures += _wrong_end(trial, result)
    files, found = search(outputs, canaries)
    failures += found
    counts = {"secrets": len(canaries), "runs": len(trials), "files": files, "found": len(found)}
    return Figures("G9", TITLE, counts, failures)


def _trials(canary: Callable[[], str], environment: dict[str, str]) -> Iterator[Trial]:
    short = ["dpo.max_num_steps=2", "checkpointing.save_period=1", "dpo.val_period=1"]
    export = ["checkpointing.export_hf=true", "logger.tensorboard_enabled=true"]
    yield Trial("a run that succeeds", [*short, *export], succeeds=True)
    yield Trial("an exception nobody expects", ["data.dataset_name=leaky.Fails"])
    yield Trial("a constructor that fails", ["data.dataset_name=leaky.Leaky"])
    for text in IN_ARGUMENTS:
        yield Trial(text.partition("=")[0], [text.format(canary())])
    yield Trial("a value of the environment", [f"logger.wandb.name={environment['DB_PASSWORD']}"])
    yield Trial("it in a path", [f"data.train_data_path=/data/{environment['HF_TOKEN']}/x.jsonl"])
    yield Trial("it as a key", [f"dpo.{environment['WANDB_API_KEY']}=1"])
    yield Trial(
        "a tracker's address in YAML",
        config=f"logger:\n  mlflow:\n    tracking_uri: https://me:{canary()}@mlflow.invalid\n",
    )
    yield Trial("a scalar in YAML", config=f"logger: https://me:{canary()}@host.invalid\n")
    yield Trial("broken YAML", config=f"logger: [https://me:{canary()}@host.invalid\n")
    yield Trial("a model that is not there", [f"policy.model_name=a/{environment['GITHUB_TOKEN']}"])
    with_traceback = {"REINFORCER_TP_TRACEBACK": "1"}
    yield Trial("a traceback", ["data.dataset_name=leaky.Leaky"], environment=with_traceback)


def _run(
    trial: Trial, toy: Toy, inputs: Path, log_dir: Path, environment: dict[str, str]
) -> RunResult:
    overrides, flags = toy.overrides("one"), []
    overrides[:] = [text for text in overrides if not text.startswith("reference.store_dir=")]
    overrides.append(f"reference.store_dir={log_dir.parent}/store")
    config = None
    if trial.config is not None:
        config = inputs / f"{log_dir.name}.yaml"
        config.write_text(trial.config)
    names = [text.partition("=")[0] for text in trial.overrides]
    overrides = [text for text in overrides if text.partition("=")[0] not in names]
    flags = [text for text in trial.overrides if text.startswith("--")]
    own = [text for text in trial.overrides if not text.startswith("--")]
    return run_train(
        [*overrides, *own],
        log_dir=log_dir,
        config=config,
        flags=flags,
        env=environment | trial.environment,
        fork=True,
    )


def _wrong_end(trial: Trial, result: RunResult) -> list[str]:
    if trial.succeeds != (result.returncode == 0):
        return [f"{trial.name}: exit code {result.returncode}: {result.stderr[-300:]}"]
    if not trial.succeeds and "error" not in result.stderr:
        return [f"{trial.name}: no error is printed: {result.stderr[-300:]}"]
    return []


def search(folder: Path, canaries: list[str]) -> tuple[int, list[str]]:
    """(files looked at, a line for each secret in one): contents, names and targets of links."""
    spelled = {
        form.encode(): canary
        for canary in canaries
        for form in (canary, quote(canary), quote_plus(canary), canary[:16], canary[-16:])
    }
    found, number = [], 0
    for path in folder.rglob("*"):
        content = str(path.relative_to(folder)).encode()
        if path.is_symlink():
            content += str(path.readlink()).encode()
        elif path.is_file():
            number += 1
            content += path.read_bytes()
            if tarfile.is_tarfile(path):
                found.append(f"{path} is an archive, which is not looked into")
        hits = {canary for form, canary in spelled.items() if form in content}
        found += [f"{path.relative_to(folder)} has secret {canaries.index(hit)}" for hit in hits]
    return number, found
