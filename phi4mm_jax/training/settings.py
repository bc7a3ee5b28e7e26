"""Names of a recipe's settings, and suggestions for unknown ones."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

# Names of transformers' TrainingArguments, TRL, LLaMA-Factory, ms-swift and MaxText, and ours.
ALIASES = {
    "adam_b1": "optimizer.beta1",
    "adam_b2": "optimizer.beta2",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "adam_epsilon": "optimizer.eps",
    "adam_weight_decay": "optimizer.weight_decay",
    "base_output_directory": "output",
    "batch_size": "data.packing.rows",
    "bf16": "dtype",
    "checkpoint_dir": "output",
    "checkpoint_period": "save_every",
    "cosine_learning_rate_final_fraction": "optimizer.final_share",
    "cutoff_len": "data.packing.lengths",
    "data_seed": "data.seed",
    "data_shuffle_seed": "data.seed",
    "dataloader_num_workers": "data.threads",
    "dataloader_prefetch_factor": "data.prefetch",
    "dataset": "data.sources",
    "dataset_path": "data.sources",
    "dpo_beta": "dpo.beta",
    "eval_dataset": "evaluation.sources",
    "eval_interval": "evaluation.every",
    "eval_steps": "evaluation.every",
    "fp16": "dtype",
    "fsdp": "mesh",
    "freeze": "trainable",
    "global_batch_size": "data.packing.rows",
    "grad_accum": "accumulate",
    "grad_clip": "optimizer.clip",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "remat",
    "gradient_clipping": "optimizer.clip",
    "gradient_clipping_threshold": "optimizer.clip",
    "ici_fsdp_parallelism": "mesh",
    "ici_tensor_parallelism": "mesh",
    "init_lora_weights": "fresh_adapters",
    "label_smoothing_factor": "loss.label_smoothing",
    "learning_rate_final_fraction": "optimizer.final_share",
    "load_parameters_path": "model",
    "log_period": "log_every",
    "logging_steps": "log_every",
    "lora_dropout": "dropout",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "max_grad_norm": "optimizer.clip",
    "max_length": "data.packing.lengths",
    "max_num_checkpoints_to_keep": "keep",
    "max_seq_len": "data.packing.lengths",
    "max_seq_length": "data.packing.lengths",
    "max_steps": "data.steps",
    "max_target_length": "data.packing.lengths",
    "metric_for_best_model": "evaluation.metric",
    "min_lr": "optimizer.final_share",
    "min_lr_ratio": "optimizer.final_share",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "data.epochs",
    "num_train_epochs": "data.epochs",
    "num_train_steps": "data.steps",
    "num_workers": "data.threads",
    "output_dir": "output",
    "per_device_batch_size": "data.packing.rows",
    "per_device_train_batch_size": "data.packing.rows",
    "precision": "dtype",
    "remat_policy": "remat",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "seq_length": "data.packing.lengths",
    "shuffle_seed": "data.seed",
    "target_modules": "trainable",
    "tensor": "mesh",
    "tensor_parallel_size": "mesh",
    "total_steps": "data.steps",
    "train_batch_size": "data.packing.rows",
    "train_data": "data.sources",
    "train_dataset": "data.sources",
    "train_file": "data.sources",
    "train_steps": "data.steps",
    "val_dataset": "evaluation.sources",
    "warmup": "optimizer.warmup_steps",
    "warmup_fraction": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "warmup_steps_fraction": "optimizer.warmup_steps",
    "wd": "optimizer.weight_decay",
}  # fmt: skip
HINTS = {  # to what of theirs is in another unit
    "min_lr": "a share of the peak: min_lr / learning_rate",
    "per_device_batch_size": "of all devices together",
    "per_device_train_batch_size": "of all devices together",
}


def setting_names(config: type, prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings, those of sections with a dot; a section comes before its settings."""
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        yield f"{prefix}{field.name}"
        if (section := _section(types[field.name])) is not None:
            yield from setting_names(section, f"{prefix}{field.name}.")


def _section(of: Any) -> type | None:
    """Return the dataclass that a setting is, or may be."""
    options = [of, *typing.get_args(of)]
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def suggest_setting(name: str, known: Sequence[str]) -> str | None:
    """Return the setting that an unknown name stands for, with a hint where its unit is another; None if none is close.

    Args:
        name: with its section: "optimizer.lr".
        known: the names of all settings.
    """
    *_, last = name.lower().replace("-", "_").split(".")
    if last in ALIASES:
        return ALIASES[last] + (f" ({HINTS[last]})" if last in HINTS else "")
    section = name.rpartition(".")[0]
    own = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    if last in anywhere:
        return anywhere[last]
    for names in (own, anywhere):
        if close := difflib.get_close_matches(last, names, 1):
            return names[close[0]]
    return None
