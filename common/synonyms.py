"""Names of settings in other programs, and what they are called here: an unknown name suggests the one that is meant.

Nearness of spelling alone misleads: the name nearest to `learning_rate` is `ranking`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS: dict[str, str] = {
    # transformers' TrainingArguments, accelerate's scripts, TRL, axolotl
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "per_device_eval_batch_size": "tokens_per_batch",
    "eval_batch_size": "tokens_per_batch",
    "gradient_accumulation_steps": "accumulate",
    "grad_accum": "accumulate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_train_steps": "max_steps",
    "num_steps": "max_steps",
    "train_steps": "max_steps",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "num_warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "scheduler": "schedule",
    "optim": "optimizer",
    "clip_grad_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "output_dir": "out",
    "save_dir": "out",
    "bf16": "precision dtype",
    "fp16": "precision dtype",
    "mixed_precision": "precision",
    "torch_dtype": "dtype precision",
    "activation_checkpointing": "gradient_checkpointing",
    "use_cpu": "device",
    "no_cuda": "device",
    "data_seed": "seed",
    "random_seed": "seed",
    "wandb": "report_to",
    "max_train_samples": "limit",
    "max_samples": "limit",
    "num_samples": "limit",
    "max_eval_samples": "eval_limit limit",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "train_dataset": "data",
    "dataset_split": "split",
    "eval_dataset": "eval_data data",
    "validation_file": "eval_data data",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "max_seq_len": "seq_len",
    "sequence_len": "seq_len",
    "sample_packing": "packing",
    "max_source_length": "seq_len",
    "max_target_length": "target_len",
    "block_size": "seq_len",
    "context_length": "seq_len",
    "sequence_length": "seq_len",
    "dataloader_num_workers": "workers",
    "num_workers": "workers",
    # models
    "model_name_or_path": "student teacher model",
    "model_name": "student teacher model",
    "pretrained_model_name_or_path": "student teacher model",
    "teacher_model": "teacher",
    "teacher_model_name_or_path": "teacher",
    "student_model": "student",
    "student_model_name_or_path": "student",
    "tokenizer_name": "tokenizer",
    "model_revision": "revision",
    "use_4bit": "load_in_4bit",
    "use_8bit": "load_in_8bit",
    "adapter": "teacher_adapter",
    "adapter_name_or_path": "teacher_adapter",
    "lora_path": "teacher_adapter",
    "peft_model": "teacher_adapter",
    "quantize": "load_in_4bit",
    "lora_r": "lora",
    "lora_rank": "lora",
    "attn_impl": "attn_implementation",
    "torch_compile": "compile",
    "use_liger_kernel": "liger",
    "use_liger": "liger",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "hub_private",
    "early_stopping_patience": "early_stop",
    "metric_for_best_model": "keep_best",
    "load_best_model_at_end": "keep_best",
    "lora_target_modules": "lora_targets",
    "target_modules": "lora_targets",
    # distillation
    "kd_temperature": "temperature",
    "tau": "temperature",
    "kd_alpha": "alpha",
    "distillation_weight": "alpha",
    "kd_weight": "alpha",
    "lambda_kd": "alpha",
    "ce_alpha": "ce_weight",
    "kd_ce_alpha": "ce_weight",
    "kd_beta": "beta",
    "kd_loss": "loss",
    "loss_type": "loss",
    "topk": "top_k",
    "num_logits": "top_k",
}
"""Name elsewhere -> names here, separated by spaces, of which the first that is known where the name was used is meant."""


def nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that `name` stands for elsewhere, else the one spelled most like it; None where none is near."""
    known = {_plain(choice): choice for choice in choices}
    meant = SYNONYMS.get(_plain(name), "").split()
    for one in meant:
        if one in known:
            return known[one]
    nearest = difflib.get_close_matches(name, sorted(known.values()), n=1, cutoff=0.5)
    return nearest[0] if nearest else None


def _plain(name: str) -> str:
    return name.strip("-").replace("-", "_").lower()
