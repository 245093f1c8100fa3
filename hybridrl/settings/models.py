"""Settings of the models: the student, and each teacher."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.choices import Attention, EvidenceKind, TemplateOf
from hybridrl.settings.servers import ServedConfig

DTYPES = ("float32", "bfloat16")
AUTO = "auto"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str = MISSING
    """a Hugging Face folder or name, or builtin:NAME (countdown-student, countdown-teacher,
    smollm2-135m-instruct)
    """
    dtype: str = AUTO
    """dtype of the forward pass, float32 or bfloat16; the learner has fp32 master weights. auto:
    bfloat16 on GPUs; on CPUs bfloat16 for a model that is stored in half precision with a hidden
    size of 256 or more, if the driver's processor multiplies faster in it, else float32. A run
    keeps its first choice
    """
    revision: str | None = None
    """hub revision; null: the newest"""
    eos: str | None = None
    """the special token that ends a response, its text or its id; the engines stop at it, and at
    those of the model's generation_config.json. null: the tokenizer's end token, or the end of the
    turn in the chat template
    """
    attention: Attention = Attention.auto
    """the kernel by which learner and scorers compute attention; engines choose their own"""

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, AUTO):
            raise ConfigError(f"model.dtype={self.dtype}: must be auto, {' or '.join(DTYPES)}")


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    path: str | None = None
    """as model.path; null: the student before training, frozen"""
    model: str | None = None
    """FILE.py:CLASS, your own class instead of a model at path; see hybridrl/teachers/README.md"""
    url: str | None = None
    """address of an OpenAI-compatible vLLM server that has the model, e.g. http://HOST:8000/v1,
    instead of a model at path
    """
    api_key: str | None = None
    """key of the server at url; give it as ${oc.env:VARIABLE}, so that no file holds it"""
    served: ServedConfig = field(default_factory=ServedConfig)
    """how the server at url is used"""
    engine: dict[str, Any] | None = None
    """score by vLLM engines that hold the model at path, one for each of scorer.replicas, with
    these arguments, e.g. {tensor_parallel_size: 4}; {}: engines without further arguments; null: no
    engine. Responses that the teacher writes (algorithm.teacher_fraction) are sampled by the
    settings of rollout
    """
    share_base: bool = False
    """score in the learner, by the student's weights with the adapters switched off, instead of in
    a scorer with a second copy of these weights. It needs lora.rank, and a teacher that is the
    student before training
    """
    revision: str | None = None
    """hub revision of path; null: the newest"""
    dtype: str = AUTO
    """dtype of its forward pass, float32 or bfloat16; auto: that of model.dtype"""
    devices: int = 1
    """GPUs, or processes on CPUs, of each replica of its scorer; each holds an equal part of every
    weight. It is for a teacher that does not fit one device
    """
    weight: float = 1.0
    """w_i of the objective, which is multiplied by algorithm.imitation_weight; a negative weight
    moves the student away from the teacher (reward extrapolation, G-OPD)
    """
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """multiplies the weight"""
    route: dict[str, Any] = field(default_factory=dict)
    """score only prompts whose columns have these values, e.g. {domain: math}; empty: all"""
    evidence: EvidenceKind | None = None
    """the form of its answer about a response token; null: as algorithm.support and
    algorithm.teacher_signal need it. With drawn, its part of the dense term is estimated from the
    drawn token
    """
    eos: str | None = None
    """the special token with which this teacher ends a response, its text or its id. The two end
    tokens are swapped when this teacher scores: its probability of its own end token is used for
    the student's. null: the student's own
    """
    chat_template: TemplateOf = TemplateOf.student
    """student: it reads the student's prompts, token by token. own: it reads each conversation
    through its own chat template, and then the tokens of the student's response
    """
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments of its own chat template, with chat_template=own"""

    @property
    def gpus(self) -> int:
        """GPUs of each process of its scorers, on a cluster with GPUs."""
        if self.url is not None:
            return 0
        return (self.engine or {}).get("tensor_parallel_size", 1)
