"""Checks of vLLM's engine arguments that a user sets in rollout.engine or teachers.NAME.engine.

They are compared with the argument class of the installed vLLM. Importing vLLM takes seconds and
changes torch, so a child process (`python -m hybridrl.rollout.engine_arguments`) does that.
"""

import difflib
import json
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from importlib.util import find_spec
from typing import Any, get_args

from hybridrl.core.child_module import ChildFailed, answer_of
from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.settings.rollout import RolloutConfig

IMPORT_S = 120.0  # timeout of the child process, which imports vLLM
MESSAGE = 200  # the most characters of vLLM's message about a value

DECIDED_BY = {
    "model": "model.path",
    "model_weights": "model.path",
    "tokenizer": "model.path",
    "hf_config_path": "model.path",
    "revision": "model.revision",
    "tokenizer_revision": "model.revision",
    "dtype": "model.dtype",
    "seed": "run.seed",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "max_logprobs": "algorithm.topk.k",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "distributed_executor_backend": "rollout.tensor_parallel",
    "data_parallel_size": "rollout.engines",
    "enforce_eager": "rollout.enforce_eager",
    "kv_cache_memory_bytes": "rollout.kv_cache_bytes",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "weight_transfer_config": "rollout.weight_transfer",
    "enable_sleep_mode": "cluster.take_turns",
    "enable_lora": "lora.sync",
    "max_loras": "lora.sync",
    "max_lora_rank": "lora.rank",
    "lora_target_modules": "lora.targets",
}
"""For an engine that samples: the setting that decides an argument."""

ONE_NODE = "an engine has the devices of one node"
NEVER = {
    "trust_remote_code": "code in a model's folder is never run",
    "code_revision": "code in a model's folder is never run",
    "load_format": "weights are read only from safetensors files",
    "hf_token": "a token is read from the variable HF_TOKEN, so that no file holds it",
    "worker_cls": "the worker is vLLM's own",
    "disable_log_stats": "an engine's statistics are metrics of the run",
    "pipeline_parallel_size": ONE_NODE,
    "prefill_context_parallel_size": ONE_NODE,
    "nnodes": ONE_NODE,
    "node_rank": ONE_NODE,
    "device_ids": ONE_NODE,
}
"""Arguments that have the same value in every engine, and why."""
FIXED = NEVER | {
    "logprobs_mode": "the log-probs must be those of the distribution that is sampled",
    "scheduling_policy": "the requests have priorities",
    "scheduler_cls": "the requests have priorities",
    "enable_chunked_prefill": "CPUs need it off for reproducible samples, and GPUs have it on",
    "worker_extension_cls": "the extension acknowledges each update of the weights",
}
"""Arguments that have the same value in every engine that samples, and why."""
FIXED_OF_TEACHER = NEVER | {
    "logprobs_mode": "the log-probs must be those of the teacher's own distribution",
    "enable_prefix_caching": "vLLM does not read it for log-probs of a prompt",
    "weight_transfer_config": "the teacher's weights do not change",
    "worker_extension_cls": "the teacher's weights do not change",
}
"""Arguments that have the same value in every engine that scores, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentRules:
    """The arguments that a user may not set for a kind of engine."""

    setting: str
    """the setting that holds the user's arguments"""
    decided_by: Mapping[str, str]
    """by argument: the setting that decides it"""
    fixed: Mapping[str, str]
    """by argument: why it always has the same value"""

    @classmethod
    def of_teacher(cls, name: str) -> "ArgumentRules":
        """The rules of teachers.NAME.engine."""
        decided_by = {
            argument: setting.replace("model.", f"teachers.{name}.")
            for argument, setting in DECIDED_BY.items()
            if setting.startswith("model.")
        }
        decided_by |= {
            "seed": "run.seed",
            "max_model_len": "rollout.max_model_len",
            "max_logprobs": "algorithm.topk.k",
            "distributed_executor_backend": f"teachers.{name}.engine.tensor_parallel_size",
            "data_parallel_size": "scorer.replicas",
        }
        return cls(setting=f"teachers.{name}.engine", decided_by=decided_by, fixed=FIXED_OF_TEACHER)


OF_ROLLOUT = ArgumentRules(setting="rollout.engine", decided_by=DECIDED_BY, fixed=FIXED)


def sampling_by(arguments: Mapping[str, Any], rollout: RolloutConfig) -> RolloutConfig:
    """The rollout settings of an engine that samples from the teacher of an engine that scores.

    The arguments of the scoring engine replace rollout.engine, and the settings that would decide
    one of them. Arguments that are fixed in every engine that samples are left out.

    Args:
        arguments: teachers.NAME.engine.
    """
    own = {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": None}
    decided = {
        DECIDED_BY[name].removeprefix("rollout."): value
        for name, value in (own | dict(arguments)).items()
        if DECIDED_BY.get(name, "").startswith("rollout.")
    }
    others = {n: v for n, v in arguments.items() if n not in DECIDED_BY and n not in FIXED}
    return replace(rollout, engine=others, **decided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The judgement of the installed vLLM. child process -> check_engine_arguments, as JSON."""

    names: list[str]
    """the names of all arguments that vLLM has"""
    refusals: dict[str, str]
    """by argument: what is wrong with its value"""


def check_installed() -> None:
    """Check that vLLM is installed on this machine.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise ConfigError(
            "rollout: the engines need the package vllm, which is not installed; pip install "
            "'hybridrl[cpu]', or 'hybridrl[gpu]' for GPUs"
        )


def check_engine_arguments(arguments: Mapping[str, Any], rules: ArgumentRules = OF_ROLLOUT) -> None:
    """Check that the run does not decide the user's engine arguments itself, and vLLM takes them.

    Raises:
        ConfigError: the run decides an argument, vLLM does not have it, or vLLM refuses its value;
            the message names it. Or vLLM cannot be imported here.
    """
    for name in arguments:
        if (setting := rules.decided_by.get(name)) is not None:
            raise ConfigError(f"{rules.setting}.{name}: is decided by {setting}; set that instead")
        if (reason := rules.fixed.get(name)) is not None:
            raise ConfigError(f"{rules.setting}.{name}: {reason}; leave it out")
    if not arguments:
        return
    answer = ask_vllm(arguments, rules.setting)
    for name, value in arguments.items():
        if name not in answer.names:
            near = difflib.get_close_matches(name, answer.names, n=1)
            remedy = f"did you mean {near[0]}?" if near else "see vllm.EngineArgs for all of them"
            raise ConfigError(f"{rules.setting}.{name}: vLLM has no such argument; {remedy}")
        if name in answer.refusals:
            raise ConfigError(
                f"{rules.setting}.{name}={value}: vLLM rejects this value: "
                f"{answer.refusals[name]}; correct it"
            )


def ask_vllm(arguments: Mapping[str, Any], setting: str) -> Answer:
    """Compare the arguments with vLLM's in a child process.

    Raises:
        ConfigError: the child process could not import vLLM.
    """
    try:
        text = answer_of(
            "hybridrl.rollout.engine_arguments",
            dict(arguments),
            timeout_s=IMPORT_S,
            variables={"VLLM_LOGGING_LEVEL": "ERROR"},
        )
    except TimeoutError as error:
        raise ConfigError(
            f"{setting}: cannot be checked, because importing vLLM takes more than {IMPORT_S:g} s "
            "here; repeat the command, or leave the setting out"
        ) from error
    except ChildFailed as error:
        raise ConfigError(
            f"{setting}: cannot be checked, because vLLM cannot be imported here ({error}); "
            "install it, or leave the setting out"
        ) from error
    return Answer(**json.loads(text))


# -- in a process that may import vLLM -------------------------------------------------------------


def answer(arguments: Mapping[str, Any]) -> Answer:
    """Compare the arguments with those of the installed vLLM."""
    from pydantic import ValidationError
    from vllm import EngineArgs

    names = [field.name for field in fields(EngineArgs) if not field.name.startswith("_")]
    refusals = {}
    for name, value in arguments.items():
        try:
            if name in names:
                typed(name, value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            message = f"{place}: {first['msg']}" if place else first["msg"]
            refusals[name] = textwrap.shorten(message, MESSAGE, placeholder=" ...")
        except Exception as error:  # the classes of vLLM's settings raise various exceptions
            refusals[name] = textwrap.shorten(described(error), MESSAGE, placeholder=" ...")
    return Answer(names=names, refusals=refusals)


def typed(name: str, value: Any) -> Any:
    """Convert a value to vLLM's type of that argument, e.g. a mapping to one of its config classes.

    A string is not read as a number or a boolean. A member of an enumeration may be given by its
    name or its value.

    Raises:
        pydantic.ValidationError: the value does not have the argument's type.
        Exception: the class of the argument raised it.
    """
    from pydantic import TypeAdapter
    from vllm import EngineArgs

    hint = next(field.type for field in fields(EngineArgs) if field.name == name)
    if isinstance(hint, str):  # a type that is only imported for type checkers
        return value
    for part in (hint, *get_args(hint)) if isinstance(value, str) else ():
        if isinstance(part, type) and issubclass(part, Enum) and value in part.__members__:
            return part[value]
    # Settings are like JSON: a list may stand for a set, and a mapping for a config.
    return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)


if __name__ == "__main__":
    said = answer(json.load(sys.stdin))
    print(json.dumps({"names": said.names, "refusals": said.refusals}))
