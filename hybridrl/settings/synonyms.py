"""The names of settings in TRL, verl and OpenRLHF, and the settings of hybridrl for them, if any.

The "did you mean" of error messages uses them.

    synonym_of("train.learning_rate").ours               -> "train.lr"
    synonym_of("actor_rollout_ref.rollout.n").ours       -> "train.samples_per_prompt"
    synonym_of("rollout.top_p").ours                     -> None, with the reason in its note

`python -m hybridrl.settings.synonyms` prints the table of conf/README.md.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Synonym:
    """A setting and its names in other systems.

    Names are ends of a dotted key or of a flag, separated by spaces; "" where a system has none.
    """

    ours: str | None
    """the setting of hybridrl; None: not supported"""
    trl: str = ""
    verl: str = ""
    openrlhf: str = ""
    note: str = ""
    """what differs; for a setting that is not supported, the reason or what to do instead"""

    @property
    def names(self) -> list[str]:
        return f"{self.trl} {self.verl} {self.openrlhf}".split()


WHOLE_DISTRIBUTION = (
    "the gradient is exact for responses drawn from the student's whole distribution"
)
KL_TO_TEACHER = "the KL to a teacher; +teachers.ref=initial is the frozen start model as reference"

SYNONYMS = (
    # optimizer
    Synonym("train.lr", "learning_rate", "optim.lr", "actor_learning_rate"),
    Synonym(
        "train.lr_warmup_steps",
        "warmup_steps warmup_ratio",
        "optim.lr_warmup_steps lr_warmup_steps_ratio",
        "lr_warmup_ratio",
        "a number of steps, not a share",
    ),
    Synonym(
        "train.lr_end",
        "lr_scheduler_type",
        "warmup_style min_lr_ratio",
        "lr_scheduler",
        "a cosine from train.lr to it; null: constant",
    ),
    Synonym("train.grad_clip", "max_grad_norm", "actor.grad_clip", "max_norm"),
    Synonym("train.weight_decay", "weight_decay", "optim.weight_decay", "l2"),
    Synonym("train.betas", "adam_beta1 adam_beta2", "optim.betas", "adam_betas"),
    Synonym(
        "train.steps",
        "max_steps num_train_epochs",
        "total_training_steps total_epochs",
        "num_episodes",
        "batches, not epochs over the data",
    ),
    # batches
    Synonym(
        "train.prompts_per_step",
        "per_device_train_batch_size batch_size generation_batch_size",
        "train_batch_size",
        "rollout_batch_size",
        "prompts of one batch on all devices together",
    ),
    Synonym(
        "train.updates_per_batch",
        "steps_per_generation num_mini_batches",
        "ppo_mini_batch_size",
        "train_batch_size",
        "a number of mini-batches, not their size: "
        "train.prompts_per_step / train.updates_per_batch prompts are one update",
    ),
    Synonym("train.epochs_per_batch", "num_iterations num_ppo_epochs", "ppo_epochs", "max_epochs"),
    Synonym(
        "train.max_tokens_per_micro_batch",
        "gradient_accumulation_steps",
        "ppo_micro_batch_size ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu "
        "use_dynamic_bsz",
        "micro_train_batch_size max_tokens_per_gpu",
        "tokens in memory at once; it does not affect the numbers",
    ),
    Synonym(
        "train.samples_per_prompt",
        "num_generations group_size",
        "rollout.n",
        "n_samples_per_prompt",
    ),
    Synonym("train.packing", "padding_free", "use_remove_padding", "packing_samples"),
    # lengths and sampling
    Synonym(
        "rollout.max_new_tokens",
        "max_completion_length",
        "max_response_length response_length",
        "generate_max_len",
    ),
    Synonym(
        "rollout.max_model_len",
        "max_prompt_length max_length max_seq_length vllm_max_model_length",
        "max_prompt_length prompt_length",
        "prompt_max_len max_len",
        "of prompt and response; rollout.max_model_len - rollout.max_new_tokens remain for the "
        "prompt",
    ),
    Synonym("algorithm.temperature", "temperature", "rollout.temperature", "temperature"),
    # the objective
    Synonym(
        "algorithm.imitation_weight",
        "beta kl_coef",
        "kl_coef kl_loss_coef use_kl_loss use_kl_in_reward",
        "init_kl_coef use_kl_loss",
        f"{KL_TO_TEACHER}; of DPO: algorithm.pair.beta",
    ),
    Synonym(
        "algorithm.imitation_weight.target",
        "target_kl",
        "kl_ctrl.target_kl",
        "kl_target",
        "with algorithm.imitation_weight.kind=feedback and metric=kl/token, or kl/sampled with "
        "algorithm.support=sampled",
    ),
    Synonym(
        "algorithm.divergence",
        "f_divergence_type",
        "kl_loss_type kl_penalty",
        "kl_estimator",
        "by algorithm.support: full over the whole vocabulary, sampled from the drawn token",
    ),
    Synonym(
        "algorithm.ratio.low",
        "epsilon clip_range cliprange",
        "clip_ratio clip_ratio_low",
        "eps_clip eps_clip_low_high",
        "with algorithm.ratio.kind=clip; the upper side is algorithm.ratio.high",
    ),
    Synonym("algorithm.ratio.high", "epsilon_high", "clip_ratio_high", "", "kind=clip"),
    Synonym(
        "algorithm.baseline",
        "",
        "adv_estimator",
        "advantage_estimator",
        "or a whole method: algorithm=grpo, rloo, ppo, reinforce_pp",
    ),
    Synonym(
        "algorithm.normalizer", "loss_type", "loss_agg_mode", "", "a whole method: algorithm=NAME"
    ),
    Synonym("algorithm.scale", "scale_rewards", "norm_adv_by_std_in_grpo", "no_advantage_std_norm"),
    Synonym("algorithm.value.gae_lambda", "lam", "algorithm.lam", "lambd"),
    Synonym("algorithm.value.loss_weight", "vf_coef", "value_loss_coef", ""),
    Synonym("algorithm.dynamic_sampling", "", "filter_groups.enable", "dynamic_filtering"),
    Synonym("algorithm.overlong_buffer", "", "overlong_buffer.len", "overlong_buffer_len"),
    Synonym("algorithm.nll_weight", "rpo_alpha", "sft_loss_coef", "ptx_coef nll_loss_coef"),
    # models, data and rewards
    Synonym("model.path", "model_name_or_path", "", "pretrain"),
    Synonym("model.dtype", "bf16 fp16 torch_dtype", "model_dtype", "param_dtype"),
    Synonym(
        "teachers.NAME.path",
        "teacher_model_name_or_path ref_model",
        "ref.model.path",
        "teacher_model ref_pretrain",
        "+teachers.NAME=PATH",
    ),
    Synonym(
        "data.path",
        "dataset_name",
        "train_files",
        "prompt_data dataset",
        "with data.task=records and data.heldout_path",
    ),
    Synonym("data.heldout_path", "eval_dataset test_split", "val_files", "eval_dataset"),
    Synonym(
        "data.columns",
        "dataset_text_field",
        "prompt_key",
        "input_key label_key",
        "which key of a row is the prompt: data.columns.prompt=question",
    ),
    Synonym("data.num_train", "", "train_max_samples", "max_samples"),
    Synonym("data.chat_template", "", "", "apply_chat_template"),
    Synonym(
        "data.chat_template_file",
        "chat_template_path",
        "custom_chat_template",
        "tokenizer_chat_template",
        "a Jinja file",
    ),
    Synonym("data.chat_template_kwargs", "", "apply_chat_template_kwargs", ""),
    Synonym("model.eos", "eos_token", "", "", "the text or the id of a special token"),
    Synonym("data.instruction", "", "", "input_template"),
    Synonym("data.drop_too_long", "", "filter_overlong_prompts data.truncation", ""),
    Synonym(
        "reward.functions.NAME.function",
        "reward_funcs",
        "custom_reward_function.path custom_reward_function.name reward_manager",
        "remote_rm_url reward_pretrain",
        "+reward.functions.NAME=FILE.py:FUNCTION",
    ),
    Synonym("reward.functions.NAME.weight", "reward_weights", "", ""),
    # machines
    Synonym("learner.gradient_checkpointing", "", "enable_gradient_checkpointing", ""),
    Synonym(
        "learner.offload",
        "",
        "param_offload optimizer_offload",
        "adam_offload",
        "optimizer, or parameters for the weights too",
    ),
    Synonym(
        "model.attention",
        "attn_implementation",
        "override_config.attn_implementation",
        "flash_attn attn_implementation",
        "auto, sdpa or flash_attention_2",
    ),
    Synonym("learner.zero_stage", "deepspeed fsdp", "actor.strategy fsdp_config", "zero_stage"),
    Synonym(
        "learner.ranks",
        "num_processes",
        "n_gpus_per_node nnodes",
        "actor_num_gpus_per_node actor_num_nodes",
        "rollout.engines and scorer.replicas are counted separately",
    ),
    Synonym("rollout.engines", "", "", "vllm_num_engines"),
    Synonym(
        "rollout.tensor_parallel",
        "vllm_tensor_parallel_size",
        "tensor_model_parallel_size",
        "vllm_tensor_parallel_size",
    ),
    Synonym(
        "rollout.gpu_memory_utilization",
        "vllm_gpu_memory_utilization",
        "gpu_memory_utilization",
        "vllm_gpu_memory_utilization",
    ),
    Synonym("rollout.weight_transfer", "", "", "vllm_sync_backend"),
    Synonym(
        "cluster.colocate", "vllm_mode", "hybrid_engine", "colocate_all_models colocate_actor_ref"
    ),
    Synonym(
        "cluster.take_turns",
        "vllm_enable_sleep_mode",
        "free_cache_engine",
        "vllm_enable_sleep deepspeed_enable_sleep",
    ),
    # adapters
    Synonym("lora.rank", "lora_r use_peft", "lora_rank", "lora_rank", "null: all weights train"),
    Synonym("lora.alpha", "lora_alpha", "lora_alpha", "lora_alpha", "null: twice the rank"),
    Synonym("lora.targets", "lora_target_modules", "target_modules", "target_modules"),
    Synonym("lora.dropout", "lora_dropout", "", "lora_dropout"),
    # the run
    Synonym("checkpoint.every", "save_steps", "save_freq", "save_steps"),
    Synonym("checkpoint.keep", "save_total_limit", "max_actor_ckpt_to_keep", "max_ckpt_num"),
    Synonym(
        "checkpoint.best", "metric_for_best_model load_best_model_at_end", "", "best_metric_key"
    ),
    Synonym("eval.every", "eval_steps", "test_freq", "eval_steps"),
    Synonym(
        "run.dir",
        "output_dir run_name",
        "default_local_dir experiment_name",
        "save_path ckpt_path wandb_run_name",
        "the folder's name is the run's",
    ),
    Synonym(
        "run.resume",
        "resume_from_checkpoint",
        "resume_mode",
        "load_checkpoint",
        "the same command continues; another run's checkpoint: run.resume_from",
    ),
    Synonym("tracking.wandb", "report_to", "trainer.logger", "use_wandb"),
    Synonym("tracking.project", "", "project_name", "wandb_project"),
    Synonym("tracking.group", "", "", "wandb_group"),
    Synonym("tracking.entity", "", "", "wandb_org"),
    # not supported
    Synonym(
        None,
        "load_in_4bit load_in_8bit",
        "",
        "load_in_4bit",
        "weights are not quantised; with lora.rank the model's own weights have no gradients and "
        "no optimizer state",
    ),
    Synonym(
        None, "top_p top_k min_p repetition_penalty", "rollout.top_p", "top_p", WHOLE_DISTRIBUTION
    ),
    Synonym(
        None,
        "",
        "critic.optim.lr critic.model.path",
        "critic_learning_rate critic_pretrain",
        "the value head shares the student's layers and train.lr (algorithm=ppo)",
    ),
    Synonym(
        None, "entropy_coef", "entropy_coeff", "entropy_loss_coef", "there is no entropy bonus"
    ),
    Synonym(None, "optim", "", "", "the optimizer is AdamW"),
    Synonym(
        None,
        "context_parallel_size",
        "ulysses_sequence_parallel_size",
        "ring_attn_size",
        "a sequence is on one GPU; learner.gradient_checkpointing=true saves memory",
    ),
    Synonym(
        None,
        "sync_ref_model ref_model_sync_steps",
        "",
        "enable_ema",
        "teachers and references are frozen",
    ),
    Synonym(
        None,
        "push_to_hub hub_model_id",
        "",
        "",
        "after the run, hybridrl export RUN --push OWNER/NAME",
    ),
    Synonym(None, "logging_steps", "", "logging_steps", "every step is written to metrics.jsonl"),
    Synonym(
        None, "trust_remote_code", "trust_remote_code", "", "code of a model's author is never run"
    ),
)


def _snake(name: str) -> str:
    return re.sub(r"[.-]", "_", name).lower()


BY_NAME = {_snake(name): synonym for synonym in reversed(SYNONYMS) for name in synonym.names}


def synonym_of(key: str) -> Synonym | None:
    """The synonym of a dotted key, by its longest end that is a setting of another system.

    None where no end of the key is such a setting.
    """
    parts = key.lstrip("-").split(".")
    ends = [_snake("_".join(parts[i:])) for i in range(len(parts))]
    return next((BY_NAME[end] for end in ends if end in BY_NAME), None)


def markdown() -> str:
    """The whole table of conf/README.md."""
    rows = [["hybridrl", "TRL", "verl", "OpenRLHF", "note"], ["---"] * 5]
    for synonym in SYNONYMS:
        ours = f"`{synonym.ours}`" if synonym.ours else "not supported"
        others = (synonym.trl, synonym.verl, synonym.openrlhf)
        cells = [" ".join(f"`{name}`" for name in names.split()) for names in others]
        rows.append([ours, *cells, synonym.note])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(markdown(), end="")
