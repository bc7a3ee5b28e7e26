"""Names of a recipe's settings, and suggestions for unknown ones."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

# Names of transformers' TrainingArguments, TRL, LLaMA-Factory, Axolotl, ms-swift, NeMo and MaxText, and ours.
ALIASES = {
    "accumulate_grad_batches": "accumulate",
    "activation_checkpointing": "remat",
    "adam_b1": "optimizer.beta1",
    "adam_b2": "optimizer.beta2",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "adam_epsilon": "optimizer.eps",
    "adam_weight_decay": "optimizer.weight_decay",
    "additional_target": "trainable",
    "base_model": "model",
    "base_output_directory": "output",
    "batch_size": "data.packing.rows",
    "bf16": "dtype",
    "checkpoint_dir": "output",
    "checkpoint_period": "save_every",
    "cosine_learning_rate_final_fraction": "optimizer.final_share",
    "cosine_min_lr_ratio": "optimizer.final_share",
    "create_new_adapter": "fresh_adapters",
    "cutoff_len": "data.packing.lengths",
    "data_seed": "data.seed",
    "data_shuffle_seed": "data.seed",
    "dataloader_num_workers": "data.threads",
    "dataloader_prefetch_factor": "data.prefetch",
    "dataset": "data.sources",
    "dataset_path": "data.sources",
    "datasets": "data.sources",
    "deepspeed": "mesh",
    "dpo_beta": "dpo.beta",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "enable_dropout": "dropout",
    "eval_dataset": "evaluation.sources",
    "eval_interval": "evaluation.every",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation",
    "evaluation_strategy": "evaluation",
    "finetune_language_layers": "trainable",
    "finetune_vision_layers": "trainable",
    "finetuning_type": "trainable",
    "fp16": "dtype",
    "freeze": "trainable",
    "freeze_aligner": "trainable",
    "freeze_language_model": "trainable",
    "freeze_llm": "trainable",
    "freeze_multi_modal_projector": "trainable",
    "freeze_vision_tower": "trainable",
    "freeze_vit": "trainable",
    "fsdp": "mesh",
    "global_batch_size": "data.packing.rows",
    "grad_accum": "accumulate",
    "grad_clip": "optimizer.clip",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "remat",
    "gradient_clip_val": "optimizer.clip",
    "gradient_clipping": "optimizer.clip",
    "gradient_clipping_threshold": "optimizer.clip",
    "ici_fsdp_parallelism": "mesh",
    "ici_tensor_parallelism": "mesh",
    "image_max_pixels": "data.max_crops",
    "init_lora_weights": "fresh_adapters",
    "label_smoothing_factor": "loss.label_smoothing",
    "learning_rate_final_fraction": "optimizer.final_share",
    "load_in_4bit": "weights",
    "load_in_8bit": "weights",
    "load_parameters_path": "model",
    "log_period": "log_every",
    "logging_steps": "log_every",
    "logging_strategy": "log_every",
    "lora_dropout": "dropout",
    "lora_modules_to_save": "trainable",
    "lora_target": "trainable",
    "lora_target_modules": "trainable",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_kwargs": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "max_epochs": "data.epochs",
    "max_grad_norm": "optimizer.clip",
    "max_length": "data.packing.lengths",
    "max_num_checkpoints_to_keep": "keep",
    "max_pixels": "data.max_crops",
    "max_seq_len": "data.packing.lengths",
    "max_seq_length": "data.packing.lengths",
    "max_steps": "data.steps",
    "max_target_length": "data.packing.lengths",
    "metric_for_best_model": "evaluation.metric",
    "micro_batch_size": "data.packing.rows",
    "min_lr": "optimizer.final_share",
    "min_lr_ratio": "optimizer.final_share",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "modules_to_save": "trainable",
    "neat_packing": "data.packing.pack",
    "num_epochs": "data.epochs",
    "num_train_epochs": "data.epochs",
    "num_train_steps": "data.steps",
    "num_workers": "data.threads",
    "optim": "optimizer",
    "output_dir": "output",
    "per_device_batch_size": "data.packing.rows",
    "per_device_train_batch_size": "data.packing.rows",
    "precision": "dtype",
    "pref_beta": "dpo.beta",
    "preprocessing_num_workers": "data.threads",
    "quantization": "weights",
    "quantization_bit": "weights",
    "random_state": "seed",
    "remat_policy": "remat",
    "rl_beta": "dpo.beta",
    "sample_packing": "data.packing.pack",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_total_limit": "keep",
    "seq_length": "data.packing.lengths",
    "sequence_len": "data.packing.lengths",
    "shuffle_seed": "data.seed",
    "split_dataset_ratio": "evaluation.sources",
    "target_modules": "trainable",
    "tensor": "mesh",
    "tensor_parallel_size": "mesh",
    "torch_dtype": "dtype",
    "total_steps": "data.steps",
    "train_batch_size": "data.packing.rows",
    "train_data": "data.sources",
    "train_dataset": "data.sources",
    "train_file": "data.sources",
    "train_steps": "data.steps",
    "train_type": "trainable",
    "unfrozen_parameters": "trainable",
    "use_gradient_checkpointing": "remat",
    "val_check_interval": "evaluation.every",
    "val_dataset": "evaluation.sources",
    "val_set_size": "evaluation.sources",
    "val_size": "evaluation.sources",
    "warmup": "optimizer.warmup_steps",
    "warmup_fraction": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "warmup_steps_fraction": "optimizer.warmup_steps",
    "wd": "optimizer.weight_decay",
    "weight_dtype": "weights",
}  # fmt: skip
_ALIKE = 0.8  # of names, from 0 to 1: less suggests what has nothing to do with it ("seed" for deepspeed)
HINTS = {  # to what of theirs is in another unit
    "image_max_pixels": "a number of crops",
    "max_pixels": "a number of crops",
    "micro_batch_size": "of all devices together",
    "min_lr": "a share of the peak: min_lr / learning_rate",
    "per_device_batch_size": "of all devices together",
    "per_device_train_batch_size": "of all devices together",
}


_RANK = "an adapter has the rank and scale that it has in the checkpoint"
_MASK = 'the loss covers the answers alone, and "loss": false in a message masks one'
_RESUMED = "the same command resumes a run from its last checkpoint"
NOTES = {  # on what has no setting here
    "assistant_only_loss": _MASK, "completion_only_loss": _MASK, "mask_history": _MASK, "roles_to_train": _MASK,
    "train_on_inputs": _MASK, "train_on_prompt": _MASK,
    "lora_alpha": _RANK, "lora_r": _RANK, "lora_rank": _RANK, "r": _RANK, "use_dora": _RANK, "use_rslora": _RANK,
    "auto_resume_from_checkpoints": _RESUMED, "ignore_data_skip": _RESUMED, "resume_from_checkpoint": _RESUMED,
    "load_best_model_at_end": "train.export takes the best checkpoint",
    "max_samples": "data.steps limits a run; for fewer samples give a shorter manifest",
}  # fmt: skip


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


def suggest_setting(name: str, known: Sequence[str], *, alike: bool = True) -> str | None:
    """Return the setting that an unknown name stands for, with a hint where its unit is another.

    None if nothing is close, or if there is none (see `NOTES`).

    Args:
        name: with its section: "optimizer.lr".
        known: the names of all settings.
        alike: also one whose name is merely like it.
    """
    *_, last = name.lower().replace("-", "_").split(".")
    if last in NOTES:
        return None
    if last in ALIASES:
        return ALIASES[last] + (f" ({HINTS[last]})" if last in HINTS else "")
    section = name.rpartition(".")[0]
    own = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    if last in anywhere:
        return anywhere[last]
    for names in (own, anywhere) if alike else ():
        if close := difflib.get_close_matches(last, names, 1, _ALIKE):
            return names[close[0]]
    return None
