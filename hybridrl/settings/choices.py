"""Settings that are one of a few words.

Hydra matches the member's name, so each member is named as YAML spells it.
"""

from enum import StrEnum


class Resume(StrEnum):
    auto = "auto"  # continue from the newest valid checkpoint in run.dir, else start
    never = "never"  # refuse a run.dir that already holds a run
    required = "required"  # refuse to start from scratch


class BestMode(StrEnum):
    max = "max"  # the highest value is the best
    min = "min"  # the lowest value is the best


class ScheduleKind(StrEnum):
    constant = "constant"  # value
    # value -> end over `steps`, then end; for the paper's lam0 (1 + alpha t) set
    # alpha = (end/value - 1)/steps
    linear = "linear"
    cosine = "cosine"  # value -> end over `steps` along half a cosine, then end
    step = "step"  # value before step `steps`, then end
    feedback = "feedback"  # adjusted so that `metric` stays at `target`


class Products(StrEnum):
    """The dtype in which matrix products of bfloat16 models are computed on a CPU."""

    auto = "auto"  # the faster one on the processor
    model = "model"  # that of the model
    float32 = "float32"  # results are rounded to the dtype of the model


class Divergence(StrEnum):
    """Between the student p and a teacher q, per token."""

    reverse_kl = "reverse_kl"  # KL(p || q)
    forward_kl = "forward_kl"  # KL(q || p)
    jsd = "jsd"  # beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD)


class Support(StrEnum):
    """The tokens over which the dense term is summed."""

    full = "full"  # the whole vocabulary: no variance from sampled tokens
    topk = "topk"  # K tokens chosen from the prefix, see topk.correction
    # the drawn token alone: a score-function estimate, as cheap as a policy gradient
    sampled = "sampled"


class SupportSource(StrEnum):
    """The model that chooses the K tokens."""

    sampler = "sampler"  # the engine's most likely tokens
    teacher = "teacher"  # the teacher's most likely tokens


class Correction(StrEnum):
    """How the tokens outside of the K are accounted for."""

    unbiased = "unbiased"  # exact on the K, a score-function term for a drawn token outside of them
    # one more category for all other tokens: the KL of a coarser distribution
    tail_bucket = "tail_bucket"
    truncate = "truncate"  # they are left out: not a divergence, biased
    renormalize = "renormalize"  # both distributions rescaled to the K: biased, and zero for K = 1


class EvidenceKind(StrEnum):
    """The form of a teacher's answer about a response token; classes in teachers.evidence."""

    hidden = "hidden"  # its last hidden state, from which the learner computes its distribution
    vocabulary = "vocabulary"  # its log-probs of the whole vocabulary
    support = "support"  # its log-probs of algorithm.topk.k tokens and of the drawn one
    drawn = "drawn"  # its log-prob of the drawn token


class TeacherSignal(StrEnum):
    """How a teacher's distribution over the full vocabulary reaches the learner."""

    hidden = "hidden"  # its last hidden states; the learner has its output head
    # its log-probs, V numbers a token: fewer bytes than hidden states only for a vocabulary smaller
    # than the hidden size
    logits = "logits"


class Future(StrEnum):
    """How the future imitation costs of a token are combined when gamma > 0."""

    sum = "sum"  # gamma-discounted sum: the exact gradient of J for gamma = 1
    # that sum divided by the number of remaining tokens (MiniLLM's length normalisation): biased
    mean = "mean"


class Scale(StrEnum):
    """The divisor of the sparse term."""

    none = "none"
    # the reward divided by the standard deviation of its group's rewards (GRPO)
    group_std = "group_std"
    # (return - mean) / standard deviation over all tokens of the batch (REINFORCE++)
    batch = "batch"


class Ratio(StrEnum):
    """The use of rho = p(y) / mu(y), learner over sampler, in the sparse term."""

    none = "none"  # not used: correct if sampler and learner are the same policy
    # rho bounded to [low, high] (TIS); low=0 and high=null: plain importance sampling
    truncate = "truncate"
    mask = "mask"  # rho, and 0 outside [low, high] (IcePop, MOPD)
    # PPO: rho, and 0 where the advantage would move it further outside of [1 - low, 1 + high]
    clip = "clip"


class RatioLevel(StrEnum):
    token = "token"
    # the product over the response, for the dense term too: unbiased when not bounded
    sequence = "sequence"


class Reference(StrEnum):
    """The responses that DIL uses as samples of the reference."""

    rejected = "rejected"  # as in the official code
    both = "both"


class Source(StrEnum):
    """The origin of a response."""

    student = "student"
    teacher = "teacher"
    data = "data"


class OnError(StrEnum):
    fail = "fail"  # any reward error stops the run
    drop_group = "drop_group"  # the prompt's whole group is excluded from the step
    value = "value"  # use reward.error_value


class OnStale(StrEnum):
    """How tokens older than pipeline.max_staleness are handled."""

    wait = "wait"  # sampling waits, so that there are no such tokens
    drop = "drop"  # groups with an older token are dropped; their prompts are sampled once more
    reweight = "reweight"  # older tokens are trained on with their importance ratio


class Device(StrEnum):
    auto = "auto"  # cuda when the cluster has GPUs
    cpu = "cpu"
    cuda = "cuda"


class Attention(StrEnum):
    """The kernel by which learner and scorers compute attention."""

    auto = "auto"  # torch's; on CPUs plain matrix products where they are faster
    sdpa = "sdpa"  # torch's scaled_dot_product_attention
    # that of the package flash-attn, in bfloat16 on GPUs: it skips padding, and pairs of tokens
    # from different packed sequences
    flash_attention_2 = "flash_attention_2"


class Offload(StrEnum):
    """What a learner rank holds in host memory instead of its GPU's memory."""

    none = "none"
    # master weights, Adam's moments and, under ZeRO 3, gradients; Adam steps on the CPU
    optimizer = "optimizer"
    parameters = "parameters"  # all that, and the weights of the forward pass, under ZeRO 3


class WeightTransfer(StrEnum):
    auto = "auto"  # object_store on CPU and for lora.sync=adapter; else ipc on shared GPUs, or nccl
    object_store = "object_store"
    nccl = "nccl"
    ipc = "ipc"


class AdapterSync(StrEnum):
    merged = "merged"  # whole matrices, with the adapters in them
    adapter = "adapter"  # A and B alone, beside the base model that the engine read from disk


class WandbMode(StrEnum):
    auto = "auto"  # online when a key is configured, else offline
    online = "online"
    offline = "offline"
    disabled = "disabled"


class TemplateOf(StrEnum):
    """The model whose chat template writes the prompts that a teacher reads."""

    student = "student"
    own = "own"
