"""Checks on a configuration: the error users see, range helpers, and the cross-section rules.

Everything here is cheap and imports neither torch nor transformers, so that a bad configuration
is refused before any process group exists. `config` arguments are `reinforcer_tp.config.Config`.
"""

import math
import re

# Names of validation and train metrics (metrics.jsonl, without the `train/` or `validation/`).
METRICS = (
    "loss",
    "preference_loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
NEMO_RL_METRICS = {
    "accuracy": "rewards/accuracies",
    "rewards_chosen_mean": "rewards/chosen",
    "rewards_rejected_mean": "rewards/rejected",
}
DATASETS_WITH_OWN_ROWS = ("embedded",)
DATASETS_FROM_FILES = ("auto", "DPODataset", "BinaryPreferenceDataset", "PreferenceDataset")
DATASETS_FROM_HUB = ("HelpSteer3", "Tulu3Preference")


class ConfigError(ValueError):
    """A mistake in the configuration: the message says what, got, expected and the fix.

    It is one line that any terminal bears, whatever the keys and values are.
    """

    def __init__(self, message: str):
        text = message if len(message) <= 1200 else f"{message[:1197]}..."
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def shown(value: object) -> str:
    """A value as it stands in YAML, cut to 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_range(section: object, prefix: str, names: str, low: float, high: float = math.inf) -> None:
    """Refuse fields outside [low, high]; None passes, infinities and nan do not."""
    for name in names.split():
        value = getattr(section, name)
        if value is None or (math.isfinite(value) and low <= value <= high):
            continue
        expected = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(
            f"{prefix}.{name}={value} is out of range: expected a finite number {expected}"
        )


def not_built(key: str, value: object, feature: str, allowed: object) -> None:
    """Refuse the setting of a feature that does not exist yet, whatever it would have meant."""
    require(
        value == allowed,
        f"{key}={shown(value)}: {feature} is not built yet; expected {shown(allowed)}; "
        f"remove the key",
    )


def duration_s(text: str | None) -> float | None:
    """Seconds of `checkpointing.checkpoint_must_save_by` (DD:HH:MM:SS). Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,3}):(\d{2}):(\d{2}):(\d{2})", text)
    require(
        match is not None,
        f"checkpointing.checkpoint_must_save_by={shown(text)} is no duration; expected "
        "DD:HH:MM:SS after the start, such as 00:03:45:00; quote it in YAML",
    )
    days, hours, minutes, seconds = map(int, match.groups())
    found = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    require(found > 0, "checkpointing.checkpoint_must_save_by is no time at all; expected more")
    return found


def metric_key(name: str | None) -> str | None:
    """`checkpointing.metric_name` as a key of metrics.jsonl, or None for "newest".

    Takes our own names (`validation/loss`) and NeMo-RL's (`val:validation-default_loss`,
    `val:accuracy`, `train:loss`, `val_loss`). Raises ConfigError for any other name.
    """
    if name is None:
        return None
    text = "val:loss" if name == "val_loss" else name
    if text.startswith(("val:", "train:")):
        phase, metric = text.split(":", 1)
        if metric.startswith("validation-"):  # validation-<name of the set>_<metric>
            names = sorted((*METRICS, *NEMO_RL_METRICS), key=len, reverse=True)
            metric = next((name for name in names if metric.endswith(f"_{name}")), metric)
        phase = {"val": "validation"}.get(phase, phase)
        text = f"{phase}/{NEMO_RL_METRICS.get(metric, metric)}"
    phase, _, metric = text.partition("/")
    require(
        phase in ("train", "validation") and metric in METRICS,
        f"checkpointing.metric_name={name} is no metric; expected null (keep the newest) or "
        f"validation/ or train/ followed by one of {', '.join(METRICS)}",
    )
    return text


def check_world(config, world_size: int, local_world_size: int | None) -> None:
    """World size against `cluster.*` and the parallel sizes."""
    cluster, megatron = config.cluster, config.policy.megatron_cfg
    gpus, nodes = cluster.gpus_per_node, cluster.num_nodes
    if gpus is not None and nodes is not None and gpus * nodes != world_size:
        raise ConfigError(
            f"cluster.gpus_per_node={gpus} x cluster.num_nodes={nodes} is {gpus * nodes} "
            f"processes, but {world_size} were started; start torchrun with "
            f"--nnodes {nodes} --nproc-per-node {gpus}, or set both keys to null (what it started)"
        )
    if gpus is not None and local_world_size is not None and gpus != local_world_size:
        raise ConfigError(
            f"cluster.gpus_per_node={gpus}, but torchrun started {local_world_size} processes on "
            f"this node; use --nproc-per-node {gpus} or cluster.gpus_per_node={local_world_size}"
        )
    if (
        nodes is not None
        and local_world_size is not None
        and nodes * local_world_size != world_size
    ):
        raise ConfigError(
            f"cluster.num_nodes={nodes}, but torchrun started {world_size} processes, "
            f"{local_world_size} of them on this node; use --nnodes {nodes}, or "
            f"cluster.num_nodes=null (what it started)"
        )
    for key, size in (("gpus_per_node", gpus), ("num_nodes", nodes)):
        require(
            size is None or world_size % size == 0,
            f"cluster.{key}={size} does not divide the {world_size} processes that were started; "
            f"start a multiple of {size}, or set cluster.{key}=null (= what torchrun started)",
        )
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    require(
        world_size % (tp * pp) == 0,
        f"policy.megatron_cfg.tensor_model_parallel_size={tp} x pipeline_model_parallel_size={pp} "
        f"= {tp * pp} does not divide the world size {world_size}; start a multiple of {tp * pp} "
        f"processes (torchrun --nproc-per-node {tp * pp}) or lower the two sizes",
    )
    dp = world_size // (tp * pp)
    require(
        dp <= config.policy.train_global_batch_size,
        f"policy.train_global_batch_size={config.policy.train_global_batch_size} pairs is less "
        f"than the data-parallel size {dp} (world {world_size} / tp {tp} / pp {pp}): some "
        f"processes would never have work; use at least {dp}",
    )


def check_layout(config) -> None:
    """Parallelism, optimizer and micro-batch settings that contradict each other."""
    megatron = config.policy.megatron_cfg
    optimizer, scheduler = megatron.optimizer, megatron.scheduler
    prefix = "policy.megatron_cfg"
    require(
        not megatron.sequence_parallel or megatron.tensor_model_parallel_size > 1,
        f"{prefix}.sequence_parallel=true needs {prefix}.tensor_model_parallel_size > 1, got 1; "
        f"set {prefix}.sequence_parallel=false or use tensor parallelism",
    )
    require(
        scheduler.lr_decay_style == "constant" or optimizer.min_lr <= optimizer.lr,
        f"{prefix}.optimizer.min_lr={optimizer.min_lr} is above {prefix}.optimizer.lr="
        f"{optimizer.lr}, but a {scheduler.lr_decay_style} schedule ends there; lower min_lr too",
    )
    require(
        scheduler.lr_warmup_iters == 0 or scheduler.lr_warmup_init <= (optimizer.lr or math.inf),
        f"{prefix}.scheduler.lr_warmup_init={scheduler.lr_warmup_init} is above "
        f"{prefix}.optimizer.lr={optimizer.lr}; lower lr_warmup_init",
    )
    decay = scheduler.lr_decay_iters
    require(
        decay is None or scheduler.lr_warmup_iters < decay,
        f"{prefix}.scheduler.lr_warmup_iters={scheduler.lr_warmup_iters} must be less than "
        f"{prefix}.scheduler.lr_decay_iters={decay}, which counts the warm-up too",
    )


def check_recompute(megatron) -> None:
    """Keys of `policy.megatron_cfg` that say what is recomputed; its layers are counted later."""
    prefix, modules = "policy.megatron_cfg", megatron.recompute_modules
    in_range(megatron, prefix, "recompute_num_layers", 1)
    # Megatron's "layernorm" crashes without transformer-engine, its others are of other networks.
    require(
        bool(modules)
        and set(modules) <= {"core_attn", "mlp"}
        and len(set(modules)) == len(modules),
        f"{prefix}.recompute_modules={shown(modules)}; expected core_attn, mlp or both, each once",
    )
    is_full = megatron.recompute_granularity == "full"
    by_layers = {"recompute_method": "uniform", "recompute_num_layers": 1}
    for name, default in ({"recompute_modules": ["core_attn"]} if is_full else by_layers).items():
        value = getattr(megatron, name)
        require(
            value == default,
            f"{prefix}.{name}={shown(value)} is not read with recompute_granularity="
            f"{megatron.recompute_granularity}; remove it, or use "
            f"recompute_granularity={'selective' if is_full else 'full'}",
        )


def check_data(data) -> None:
    """`data.*` keys that belong together; the files themselves are read later."""
    name = data.dataset_name
    known = (*DATASETS_WITH_OWN_ROWS, *DATASETS_FROM_FILES, *DATASETS_FROM_HUB)
    if name not in known and not is_import_path(name):
        near = [word for word in known if word.lower() == name.lower()]
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"data.dataset_name={name} is unknown: {hint}expected one of {', '.join(known)}, or "
            f"the import path of a class (my.module.CustomDPODataset); for a file, a folder or a "
            f"hub id use data.dataset_name=auto data.train_data_path=..."
        )
    require(
        name not in DATASETS_FROM_FILES or data.train_data_path is not None,
        f"data.dataset_name={name} needs data.train_data_path (a jsonl, json or parquet file, a "
        f"folder, or a hub id), got null",
    )
    given = [key for key in ("train_data_path", "val_data_path") if getattr(data, key) is not None]
    require(
        name not in DATASETS_WITH_OWN_ROWS or not given,
        f"data.{(given or ['train_data_path'])[0]} is set, but data.dataset_name={name} brings its "
        f"own rows; set data.dataset_name=auto to read your files",
    )


def check_reference(config) -> None:
    """`reference.*` against what the loss reads."""
    loss = shown(config.dpo.preference_loss)
    require(
        config.dpo.needs_reference or config.reference.model_name is None,
        f"reference.model_name={config.reference.model_name} is set, but dpo.preference_loss="
        f"{loss} (with its weight) reads no reference; remove it, or choose a loss with one",
    )
    require(
        config.reference.mode != "none" or not config.dpo.needs_reference,
        f"reference.mode=none, but dpo.preference_loss={loss} "
        "compares the policy with a reference; use reference.mode=store, or a loss without one "
        "(simpo, orpo)",
    )


def is_import_path(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)
