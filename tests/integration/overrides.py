"""The oracle's configuration in the trainer's words."""

from tests.integration.oracle import OracleConfig


def trainer_overrides(config: OracleConfig) -> list[str]:
    """`key=value` for the trainer: this oracle run's numbers and nothing but training steps."""
    optimizer, scheduler = "policy.megatron_cfg.optimizer", "policy.megatron_cfg.scheduler"
    values = {
        "policy.model_name": config.model,
        "policy.precision": "float32",
        "policy.max_total_sequence_length": 256,
        "policy.train_global_batch_size": config.batch_size,
        "policy.train_micro_batch_size": None,
        "policy.micro_batch_tokens": None,
        "policy.max_grad_norm": config.max_grad_norm,
        "data.dataset_name": "auto",
        "data.train_data_path": config.data,
        "data.val_data_path": None,
        "data.shuffle": False,
        "dpo.max_num_steps": config.num_steps,
        "dpo.max_num_epochs": 100,
        "dpo.val_period": 0,
        "dpo.val_at_start": False,
        "dpo.val_at_end": False,
        "dpo.reference_policy_kl_penalty": config.beta,
        "dpo.preference_loss": f"[{','.join(name for name, _ in config.losses)}]",
        "dpo.loss_weights": [weight for _, weight in config.losses],
        "dpo.preference_loss_weight": config.preference_loss_weight,
        "dpo.sft_loss_weight": config.sft_loss_weight,
        "dpo.preference_average_log_probs": config.preference_average_log_probs,
        "dpo.sft_average_log_probs": config.sft_average_log_probs,
        f"{optimizer}.lr": config.lr,
        f"{optimizer}.min_lr": config.min_lr,
        f"{optimizer}.weight_decay": config.weight_decay,
        f"{optimizer}.adam_beta1": config.betas[0],
        f"{optimizer}.adam_beta2": config.betas[1],
        f"{optimizer}.adam_eps": config.eps,
        f"{scheduler}.lr_decay_style": config.lr_decay_style,
        f"{scheduler}.lr_decay_iters": config.lr_decay_iters,
        f"{scheduler}.lr_warmup_iters": config.lr_warmup_iters,
        f"{scheduler}.lr_warmup_init": config.lr_warmup_init,
        "checkpointing.enabled": False,
        "checkpointing.export_hf": False,
        "logger.tensorboard_enabled": False,
    }
    if config.chat_template is not None:
        values["policy.tokenizer.chat_template"] = config.chat_template
    words = {None: "null", True: "true", False: "false"}
    return [
        f"{key}={words[value] if value is None or isinstance(value, bool) else value}"
        for key, value in values.items()
    ]
