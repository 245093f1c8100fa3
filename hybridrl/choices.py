"""The settings that are one of a few words. Hydra matches the member's name, so each is named as YAML spells it."""

from enum import StrEnum


class Resume(StrEnum):
    auto = "auto"  # continue from the newest valid checkpoint in run.dir, else start
    never = "never"  # refuse a run.dir that already holds a run
    required = "required"  # refuse to start from scratch


class ScheduleKind(StrEnum):
    constant = "constant"  # value
    linear = "linear"  # value -> end over `steps`, then end; the paper's lam0 (1 + alpha t) has alpha = (end/value - 1)/steps
    cosine = "cosine"  # value -> end over `steps` along half a cosine, then end
    step = "step"  # value before step `steps`, end from there on


class Divergence(StrEnum):
    reverse_kl = "reverse_kl"  # KL(student || teacher), the closed form over the full vocabulary


class Baseline(StrEnum):
    none = "none"
    group_mean = "group_mean"  # mean of the K siblings at the same position, the sequence itself included
    leave_one_out = "leave_one_out"  # mean of the K-1 others at the same position: unbiased


class Normalizer(StrEnum):
    token_mean = "token_mean"  # divide by the global number of response tokens (DAPO)
    constant = "constant"  # divide by sequences * max_new_tokens: unbiased at any batch size (Dr. GRPO)


class OnError(StrEnum):
    fail = "fail"  # any reward error stops the run
    drop_group = "drop_group"  # the prompt's whole group is left out of the step
    value = "value"  # use reward.error_value


class Device(StrEnum):
    auto = "auto"  # cuda when the cluster has GPUs
    cpu = "cpu"
    cuda = "cuda"


class WeightTransfer(StrEnum):
    auto = "auto"  # object_store on CPU; on GPUs ipc when learner and engines share them, else nccl
    object_store = "object_store"
    nccl = "nccl"
    ipc = "ipc"


class WandbMode(StrEnum):
    auto = "auto"  # online when a key is configured, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"
