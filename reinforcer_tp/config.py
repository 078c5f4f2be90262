"""The configuration: one frozen dataclass a section, with every key, its default and its unit.

`load_config` merges defaults < YAML < `key=value`. Sizes of batches count pairs. Key names are
those of NeMo-RL's DPO (github.com/NVIDIA-NeMo/RL, examples/configs/dpo.yaml) where it has them;
"ours" marks the others. Imports neither torch nor transformers.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from reinforcer_tp import config_check, config_load, config_loss, config_yaml, fp8
from reinforcer_tp.config_check import ConfigError, in_range, not_built, require
from reinforcer_tp.config_keys import flatten
from reinforcer_tp.model_shape import find_model_shape, validate_model
from reinforcer_tp.pipeline_layout import check_pipeline, virtual_stages

__all__ = [
    "Config",
    "ConfigError",
    "decisive",
    "find_model_shape",
    "fingerprint",
    "load_config",
    "to_yaml",
    "validate_model",
]


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    max_num_epochs: int = 1  # passes over the training set; whichever limit comes first
    max_num_steps: int | None = 150  # optimizer steps; null = only max_num_epochs counts
    val_period: int = 25  # steps between validations; <= 0 = none
    val_batches: int = 8  # batches a validation reads at most; <= 0 = the whole set
    val_global_batch_size: int = 8  # pairs in a validation batch
    val_micro_batch_size: int | None = None  # pairs in a micro-batch; null = as in training
    val_at_start: bool = True  # validate before the first step (metrics of step 0)
    val_at_end: bool = True  # validate after the last step
    seed: int = 42  # order of the data and random weights
    reference_policy_kl_penalty: float = 0.05  # beta of arXiv:2305.18290
    preference_loss: Any = "sigmoid"  # a loss, or a list of losses that are summed (TRL's names)
    loss_weights: list[float] | None = None  # one for each loss in a list; null = 1 each; ours
    preference_loss_weight: float = 1.0  # factor of the preference loss
    sft_loss_weight: float = 0.0  # factor of the SFT loss on the chosen side
    rpo_alpha: float | None = None  # sft_loss_weight of an SFT term per token; null = unused
    preference_average_log_probs: bool = False  # divide log-ratio sums by the response's tokens
    sft_average_log_probs: bool | None = (
        None  # likewise; null = true with rpo, rpo_alpha, orpo, else preference_average_log_probs
    )
    label_smoothing: float | None = None  # share of wrong labels, below 0.5; null = 0; ours
    discopop_tau: float | None = None  # temperature of discopop's blend; null = 0.05; ours
    simpo_gamma: float | None = None  # reward margin that simpo aims at; null = 0.5; ours
    ld_alpha: float | None = (
        None  # LD-DPO: weight of tokens beyond the pair's shorter response; null = 1; ours
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"  # divergence of policy and reference, arXiv:2309.16240; ours
    )
    f_alpha_divergence_coef: float | None = None  # alpha of alpha_divergence; null = 0.5; ours
    first_step_check: Literal["error", "warn", "off"] = (
        "error"  # before step 1 the loss must be its value at policy = reference; ours
    )
    on_nonfinite: Literal["stop", "skip"] = (
        "stop"  # a loss or gradient that is not finite ends the run, or its batch is skipped; ours
    )
    max_nonfinite_steps: int = 3  # skipped in a row at most; one more ends the run; ours

    def __post_init__(self):
        in_range(self, "dpo", "max_num_epochs max_num_steps max_nonfinite_steps", 1)
        in_range(self, "dpo", "val_global_batch_size val_micro_batch_size", 1)
        in_range(self, "dpo", "seed", 0, 2**32 - 1)
        in_range(self, "dpo", "reference_policy_kl_penalty", 0)
        in_range(self, "dpo", "preference_loss_weight sft_loss_weight", 0)
        config_loss.check_losses(self)

    @property
    def sft_weight(self) -> float:
        """sft_loss_weight, by either of its names."""
        return self.sft_loss_weight if self.rpo_alpha is None else self.rpo_alpha

    @property
    def loss_options(self) -> dict[str, Any]:
        """The fields of loss.LossOptions, nulls resolved."""
        return config_loss.loss_options(self)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return config_loss.needs_reference(self)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    name: str | None = None  # folder or hub id; null = policy.model_name
    chat_template: str | None = None  # Jinja text or path of a .jinja file; null = its own
    chat_template_kwargs: dict | None = None  # passed to the template


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    optimizer: Literal["adam"] = "adam"  # AdamW (decoupled weight decay)
    lr: float = 5e-6  # peak learning rate
    min_lr: float = 5e-6  # where a linear or cosine schedule ends
    weight_decay: float = 0.1  # decoupled: times lr, off the weights each step
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.98  # decay of the second moment
    adam_eps: float = 1e-8  # added to the root of the second moment
    clip_grad: float | None = None  # global gradient norm; null = policy.max_grad_norm
    use_distributed_optimizer: bool = True  # shard the optimizer state over data parallelism

    def __post_init__(self):
        prefix = "policy.megatron_cfg.optimizer"
        in_range(self, prefix, "lr min_lr weight_decay clip_grad", 0)
        in_range(self, prefix, "adam_beta1 adam_beta2", 0, math.nextafter(1, 0))
        in_range(self, prefix, "adam_eps", 1e-30)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    lr_decay_iters: int | None = None  # steps, warm-up included; null = all steps of the run
    lr_warmup_iters: int = 1  # steps of linear warm-up
    lr_warmup_init: float = 1e-8  # learning rate at the start of the warm-up

    def __post_init__(self):
        prefix = "policy.megatron_cfg.scheduler"
        in_range(self, prefix, "lr_decay_iters", 1)
        in_range(self, prefix, "lr_warmup_iters lr_warmup_init", 0)


@dataclass(frozen=True, kw_only=True)
class DistributedDataParallelConfig:
    grad_reduce_in_fp32: bool = True  # accumulate and reduce gradients in float32
    overlap_grad_reduce: bool = True  # reduce gradients during backward
    overlap_param_gather: bool = True  # gather weights during forward (distributed optimizer)


@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    enabled: bool = False  # true is refused


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    enabled: bool = True  # Megatron-core is the only backend
    tensor_model_parallel_size: int = 1  # processes that share each matrix
    pipeline_model_parallel_size: int = 1  # stages that share the layers
    virtual_pipeline_model_parallel_size: int | None = (
        None  # chunks of layers on each pipeline process (interleaved); null = 1, or the layout's
    )
    num_layers_in_first_pipeline_stage: int | None = None  # null = an even share
    num_layers_in_last_pipeline_stage: int | None = None  # null = an even share
    pipeline_model_parallel_layout: str | None = (
        None  # every stage in turn, E embedding, t layer, L loss: Et|tt|t|tL; null = an even share
    )
    context_parallel_size: int = 1  # more is not built yet
    expert_model_parallel_size: int = 1  # more is not built yet
    sequence_parallel: bool = False  # split norms' activations over tensor parallelism
    activation_checkpointing: bool = False  # recompute activations in backward
    recompute_granularity: Literal["full", "selective"] = "full"  # layers, or recompute_modules
    recompute_method: Literal["uniform", "block"] = (
        "uniform"  # full: all layers, or only the first recompute_num_layers of each chunk
    )
    recompute_num_layers: int = 1  # uniform: layers kept as one input; block: layers recomputed
    recompute_modules: list[str] = field(
        default_factory=lambda: ["core_attn"]  # selective: core_attn, mlp or both
    )
    peft: SwitchConfig = field(default_factory=SwitchConfig)  # LoRA
    fp8_cfg: SwitchConfig = field(default_factory=SwitchConfig)  # FP8 matrices
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    distributed_data_parallel_config: DistributedDataParallelConfig = field(
        default_factory=DistributedDataParallelConfig
    )

    def __post_init__(self):
        prefix = "policy.megatron_cfg"
        in_range(self, prefix, "tensor_model_parallel_size pipeline_model_parallel_size", 1)
        in_range(self, prefix, "context_parallel_size expert_model_parallel_size", 1)
        stages = "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage"
        in_range(self, prefix, f"virtual_pipeline_model_parallel_size {stages}", 1)
        refused = {
            "enabled": ("a backend other than Megatron-core", True),
            "context_parallel_size": ("context parallelism", 1),
            "expert_model_parallel_size": ("expert parallelism", 1),
        }
        for name, (feature, allowed) in refused.items():
            not_built(f"{prefix}.{name}", getattr(self, name), feature, allowed)
        not_built(f"{prefix}.peft.enabled", self.peft.enabled, "LoRA", False)
        require(
            not self.fp8_cfg.enabled,
            f"{prefix}.fp8_cfg.enabled=true is not read: expected false; use policy.fp8=hybrid "
            "(one scale a tensor) or blockwise",
        )
        config_check.check_recompute(self)

    @property
    def virtual_stages(self) -> int:
        """Chunks of layers on each pipeline process, from the two keys that say it."""
        return virtual_stages(self)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    model_name: str  # folder or hub id of a Hugging Face model, or `embedded`
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    precision: Literal["float32", "bfloat16", "float16"] = (
        "bfloat16"  # of weights and activations, masters are float32; float16 scales the loss
    )
    train_global_batch_size: int = 128  # pairs in an optimizer step, over all processes
    train_micro_batch_size: int | None = None  # pairs in a micro-batch at most; null = no limit
    micro_batch_tokens: int | None = None  # tokens in a micro-batch at most; null = no limit; ours
    max_total_sequence_length: int = 1024  # tokens of prompt + response, each side on its own
    max_grad_norm: float | None = 1.0  # clip the global gradient norm; null or 0 = never
    kernel_impl: Literal["auto", "triton", "torch"] = (
        "auto"  # log-prob operator; auto = triton on CUDA, torch elsewhere; ours
    )
    kernel_cache_mib: int = 512  # MiB a micro-batch's operator keeps for backward; 0 = none; ours
    layer_spec: Literal["auto", "te", "local"] = "auto"  # auto = te on GPU where installed; ours
    load_weights: bool = True  # false = random weights, a function of dpo.seed; ours
    fp8: Literal["off", "hybrid", "blockwise"] | None = (
        None  # matrices of the layers, by transformer-engine; null = off; ours
    )
    megatron_cfg: MegatronConfig = field(default_factory=MegatronConfig)

    def __post_init__(self):
        require(self.model_name.strip() != "", "policy.model_name is empty; expected a model")
        in_range(self, "policy", "train_global_batch_size train_micro_batch_size", 1)
        in_range(self, "policy", "max_total_sequence_length", 2)
        in_range(self, "policy", "micro_batch_tokens", 3)  # a prompt and two responses
        in_range(self, "policy", "max_grad_norm", 0)
        in_range(self, "policy", "kernel_cache_mib", 0)

    @property
    def clip_grad(self) -> float:
        """Global gradient norm to clip to: optimizer.clip_grad, else max_grad_norm; 0.0 = never."""
        own = self.megatron_cfg.optimizer.clip_grad
        return (self.max_grad_norm if own is None else own) or 0.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset_name: str = "auto"  # embedded, a named set, a class's import path; auto = by its rows
    train_data_path: str | None = None  # jsonl, json or parquet (or .gz), a folder, or a hub id
    val_data_path: str | None = None  # likewise; null = none, or a named set's own
    prompt_key: str | None = None  # column of the prompt; null = the row shape's own name
    chosen_key: str | None = None  # column of the chosen response
    rejected_key: str | None = None  # column of the rejected response
    subset: str | None = None  # configuration of a hub dataset
    split: str | None = None  # split to train on, or a slice: train[:1000]; null = train
    val_split: str | None = (
        None  # to validate on; of train_data_path if val_data_path is null; ours
    )
    ignore_columns: list[str] = field(default_factory=list)  # columns not to read; ours
    prompt_file: str | None = None  # text file put around the prompt, {} stands for it
    system_prompt_file: str | None = None  # text file with a system message
    shuffle: bool = True  # a new order each epoch, from dpo.seed
    num_workers: int = 1  # processes that tokenize, on each node
    share_prompts: bool = True  # compute the prompt once for both sides, same numbers; ours
    share_prefix: Literal["prompt", "response"] = (
        "prompt"  # response = also the tokens with which both responses begin; ours
    )
    overlong: Literal["drop", "truncate_prompt", "truncate_response"] = "drop"  # ours
    on_boundary_mismatch: Literal["longest_common_prefix", "error", "drop"] = (
        "longest_common_prefix"  # where prompt ids are no prefix of both sides; ours
    )
    ties: Literal["drop", "keep"] = "drop"  # rows without a preference; ours

    def __post_init__(self):
        in_range(self, "data", "num_workers", 1)
        require(
            self.share_prompts or self.share_prefix == "prompt",
            "data.share_prefix=response needs data.share_prompts=true, got false; set "
            "data.share_prompts=true or data.share_prefix=prompt",
        )

    @property
    def share(self) -> str:
        """What a pair lays out once: nothing, prompt or response."""
        return self.share_prefix if self.share_prompts else "nothing"


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    mode: Literal["store", "resident", "none"] = (
        "store"  # read log-probs, swept once; run a second copy each step; no reference at all
    )
    store_dir: str | None = None  # folder that all nodes see; null = reference in the cache; ours
    model_name: str | None = None  # folder or hub id; null = policy.model_name
    micro_batch_tokens: int | None = (
        None  # tokens in a micro-batch of the sweep; null = 4 times policy's; ours
    )

    def __post_init__(self):
        in_range(self, "reference", "micro_batch_tokens", 3)
        for key in ("store_dir", "micro_batch_tokens"):
            require(
                self.mode == "store" or getattr(self, key) is None,
                f"reference.{key} is set, but reference.mode={self.mode} keeps no store; remove "
                "it, or use reference.mode=store",
            )
        require(
            self.mode != "none" or self.model_name is None,
            f"reference.model_name={self.model_name} is set, but reference.mode=none reads no "
            "reference; remove it, or use reference.mode=store",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig:
    enabled: bool = True  # write checkpoints
    checkpoint_dir: str | None = None  # null = <logger.log_dir>/checkpoints
    save_period: int = 50  # optimizer steps between checkpoints; the last step is always saved
    keep_top_k: int | None = 3  # checkpoints kept; null = all
    metric_name: str | None = "validation/loss"  # decides which are kept; null = the newest
    higher_is_better: bool = False  # for metric_name
    checkpoint_must_save_by: str | None = (
        None  # DD:HH:MM:SS after the start: a checkpoint is saved by then and the run stops
    )
    async_save: bool = False  # copy to host memory, write while training goes on; ours
    resume: str = "auto"  # auto = from the newest checkpoint; never; or a step_N folder; ours
    on_damaged: Literal["stop", "previous"] = (
        "stop"  # a damaged checkpoint ends the start, or the one before it is taken; ours
    )
    allow_changed: list[str] = field(
        default_factory=list
    )  # keys (or data) in which a resumed run may differ from its checkpoint; ours
    export_hf: bool = True  # write <logger.log_dir>/hf at the end; ours

    def __post_init__(self):
        in_range(self, "checkpointing", "save_period keep_top_k", 1)
        config_check.metric_key(self.metric_name)
        config_check.duration_s(self.checkpoint_must_save_by)
        require(
            self.enabled or self.resume in ("auto", "never"),
            f"checkpointing.resume={self.resume} needs checkpointing.enabled=true, got false; set "
            "checkpointing.enabled=true, or remove checkpointing.resume",
        )
        require(
            self.resume.strip() != "",
            "checkpointing.resume is empty; expected auto, never or a step_N folder",
        )

    @property
    def metric_key(self) -> str | None:
        """metric_name as a key of metrics.jsonl (NeMo-RL's names are mapped)."""
        return config_check.metric_key(self.metric_name)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    project: str | None = "reinforcer_tp"  # Weights & Biases project
    name: str | None = None  # run; null = W&B chooses
    entity: str | None = None  # user or team; null = your default


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    experiment_name: str | None = "reinforcer_tp"  # MLflow experiment
    run_name: str | None = None  # run; null = MLflow chooses
    tracking_uri: str | None = None  # server or folder; null = MLFLOW_TRACKING_URI

    def __post_init__(self):
        require(
            urlsplit(self.tracking_uri or "").password is None,
            "logger.mlflow.tracking_uri holds a password, which config.yaml would keep; give it as "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment",
        )


@dataclass(frozen=True, kw_only=True)
class ProjectConfig:
    project: str | None = "reinforcer_tp"  # project of SwanLab or trackio
    name: str | None = None  # run; null = it chooses


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    log_dir: str = "logs/dpo"  # the run's folder: metrics.jsonl, config.yaml, ...
    tensorboard_enabled: bool = True  # <log_dir>/tensorboard
    wandb_enabled: bool = False  # Weights & Biases; needs its extra
    mlflow_enabled: bool = False  # MLflow; needs its extra
    swanlab_enabled: bool = False  # SwanLab; needs its extra
    trackio_enabled: bool = False  # trackio; needs its extra
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    swanlab: ProjectConfig = field(default_factory=ProjectConfig)
    trackio: ProjectConfig = field(default_factory=ProjectConfig)

    def __post_init__(self):
        require(self.log_dir.strip() != "", "logger.log_dir is empty; expected a folder")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    gpus_per_node: int | None = None  # processes on a node; null = what torchrun started
    num_nodes: int | None = None  # nodes; null = what torchrun started
    hang_timeout_s: float = 600.0  # without progress, then the silent rank is named; ours

    def __post_init__(self):
        in_range(self, "cluster", "gpus_per_node num_nodes hang_timeout_s", 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    policy: PolicyConfig
    dpo: DPOConfig = field(default_factory=DPOConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def validate(self, world_size: int, local_world_size: int | None = None) -> None:
        """Check what spans sections; needs no model and no process group.

        world_size: processes in all (WORLD_SIZE); local_world_size: on this node
        (LOCAL_WORLD_SIZE), None = unknown. Raises ConfigError.
        """
        config_check.check_layout(self)
        check_pipeline(self.policy.megatron_cfg)
        fp8.check_policy(self.policy)
        config_check.check_world(self, world_size, local_world_size)
        config_check.check_data(self.data)
        config_check.check_reference(self)

    @property
    def reference_mode(self) -> str:
        """reference.mode, but none where the loss reads no reference: nothing is swept then."""
        return self.reference.mode if self.dpo.needs_reference else "none"

    @property
    def planned_world_size(self) -> int:
        """gpus_per_node x num_nodes with null as 1: the world for `--check` outside torchrun."""
        return (self.cluster.gpus_per_node or 1) * (self.cluster.num_nodes or 1)

    @property
    def checkpoint_dir(self) -> str:
        return self.checkpointing.checkpoint_dir or f"{self.logger.log_dir}/checkpoints"


# Keys that change how a run is computed, watched or kept, but not its numbers beyond rounding.
NOT_IN_FINGERPRINT = (
    "checkpointing",
    "cluster",
    "logger",
    "data.num_workers",
    "data.share_prefix",
    "data.share_prompts",
    "dpo.first_step_check",
    "dpo.max_nonfinite_steps",
    "dpo.max_num_epochs",
    "dpo.max_num_steps",
    "dpo.on_nonfinite",
    "dpo.val_at_end",
    "dpo.val_at_start",
    "dpo.val_batches",
    "dpo.val_global_batch_size",
    "dpo.val_micro_batch_size",
    "dpo.val_period",
    "policy.kernel_cache_mib",
    "policy.kernel_impl",
    "policy.layer_spec",
    "policy.micro_batch_tokens",
    "policy.train_micro_batch_size",
    "policy.megatron_cfg.activation_checkpointing",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_grad_reduce",
    "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
    "policy.megatron_cfg.num_layers_in_first_pipeline_stage",
    "policy.megatron_cfg.num_layers_in_last_pipeline_stage",
    "policy.megatron_cfg.optimizer.use_distributed_optimizer",
    "policy.megatron_cfg.pipeline_model_parallel_layout",
    "policy.megatron_cfg.pipeline_model_parallel_size",
    "policy.megatron_cfg.recompute_granularity",
    "policy.megatron_cfg.recompute_method",
    "policy.megatron_cfg.recompute_modules",
    "policy.megatron_cfg.recompute_num_layers",
    "policy.megatron_cfg.sequence_parallel",
    "policy.megatron_cfg.tensor_model_parallel_size",
    "policy.megatron_cfg.virtual_pipeline_model_parallel_size",
    "reference.micro_batch_tokens",
    "reference.mode",
    "reference.store_dir",
)


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Defaults < the YAML file at path (None = no file) < overrides such as "dpo.seed=1".

    Raises ConfigError, one line: what, got, expected, fix.
    """
    return config_load.load(Config, path, overrides)


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` of it gives an equal Config."""
    return config_yaml.dump(dataclasses.asdict(config))


def decisive(config: Config) -> dict[str, Any]:
    """The keys that determine the numbers of a run: dotted key -> value.

    Two configurations that differ only in NOT_IN_FINGERPRINT have the same ones: a run may be
    extended, watched otherwise or moved to another layout.
    """
    flat = flatten(dataclasses.asdict(config))
    if flat["policy.fp8"] == "off":
        flat["policy.fp8"] = None  # as checkpoints say that were written before it could be on
    ignored = tuple(f"{key}." for key in NOT_IN_FINGERPRINT)
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(ignored)}


def fingerprint(config: Config) -> str:
    """A stable hash (16 hex digits) of `decisive` keys."""
    text = json.dumps(decisive(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
