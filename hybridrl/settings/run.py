"""Every setting: its type, default, meaning and the checks within its section.

The dataclasses are Hydra's schema. Those of algorithm.* are in algorithm.py, of model.* and
teachers.* in models.py, of lora.* in lora.py, of data.sources.* in sources.py, of train.* and
learner.* in training.py, of rollout.* and pipeline.* in rollout.py, of generate.* in generation.py,
of eval.sets.* in held_out.py, of reward.* in rewards.py, of checkpoint.* in checkpointing.py. A
default is in these files and nowhere else; files in conf/ define experiments and algorithm presets,
and compose.py combines them with the command line.
"""

import unicodedata
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import AlgorithmConfig, ScheduleConfig
from hybridrl.settings.checkpointing import CheckpointConfig
from hybridrl.settings.choices import (
    Correction,
    Device,
    EvidenceKind,
    Offload,
    Ratio,
    Resume,
    WandbMode,
    WeightTransfer,
)
from hybridrl.settings.generation import GenerateConfig
from hybridrl.settings.held_out import HeldOutSetConfig
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import AUTO, ModelConfig, TeacherConfig
from hybridrl.settings.rewards import RewardConfig
from hybridrl.settings.rollout import PipelineConfig, RolloutConfig
from hybridrl.settings.sources import (
    GENERATORS,
    RECORDS,
    ROW_KEYS,
    ProblemsConfig,
    SourceConfig,
    check_source_names,
)
from hybridrl.settings.training import LearnerConfig, TrainConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    dir: str = MISSING
    """run directory; absolute when submitted to a cluster"""
    seed: int = 0
    """number from which every sampling seed is derived"""
    resume: Resume = Resume.auto
    """what to do with an earlier run in run.dir"""
    resume_from: str | None = None
    """a checkpoint folder of another run to continue from, where run.dir has no checkpoints of its
    own; a damaged one is an error
    """
    allow_changes: list[str] = field(default_factory=list)
    """settings, or sections of them, that may differ from those with which the run in run.dir was
    started, e.g. [train.lr, data]
    """

    def __post_init__(self) -> None:
        for name in ("dir", "resume_from"):
            check_path(f"run.{name}", getattr(self, name))
        if not 0 <= self.seed < 2**32:
            raise ConfigError(
                f"run.seed={self.seed}: must be in [0, 2**32), as the engines take it"
            )


def check_path(key: str, path: str | None) -> None:
    """Refuse a path that is empty, e.g. from an unset variable, or that a message could not show.

    Raises:
        ConfigError: names the setting.
    """
    if path is None or path == MISSING:
        return
    if not path.strip():
        raise ConfigError(f"{key} is empty, as from a variable that is not set; give a folder")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
        raise ConfigError(
            f"{key}={path!a}: holds a line break, a control character or bytes that are not UTF-8; "
            "give it another name"
        )


@dataclass(kw_only=True, slots=True)
class DataConfig(ProblemsConfig):
    task: str | None = "countdown"
    """countdown, reasoning_gym (data.dataset) or records (data.path; jsonl means the same)"""
    path: str | None = None
    """records: a file (JSON lines, a JSON array, CSV, TSV or Parquet; also compressed), a dataset's
    folder[:SPLIT], or OWNER/NAME[:CONFIG][:SPLIT] on the hub. A row holds `prompt` (text or chat
    messages), `prompt` and `completion`, `messages`, or `prompt`, `chosen` and `rejected`; other
    keys reach the rewards
    """
    heldout_path: str | None = None
    """records: the held-out problems, as data.path"""
    columns: dict[str, Any] = field(default_factory=lambda: {key: key for key in ROW_KEYS})
    """records: the row's key for each name, e.g. {prompt: question, completion: answer}; null: the
    key is not read
    """
    options: dict[str, Any] = field(default_factory=dict)
    """options of the generator, e.g. for countdown {num_numbers: 3, max_number: 10, responses:
    pair}
    """
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """several sources of problems, instead of the settings above, which are then refused"""
    num_train: int = 100000
    """largest number of distinct training problems drawn from a generator, which may have fewer; a
    warning says so below half of it; each epoch has them in a new order
    """
    num_heldout: int = 512
    """largest number of held-out problems in an evaluation, from each source"""
    chat_template: bool = False
    """render each text prompt as a user message with the model's chat template; prompts that are
    messages are always rendered with it
    """
    chat_template_file: str | None = None
    """a Jinja file that replaces the model's chat template, for teachers too; exports contain it.
    null: the model's own
    """
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments of the chat template, e.g. +data.chat_template_kwargs.enable_thinking=false; an
    argument that the template does not read is refused
    """
    system_prompt: str | None = None
    """a system message before each prompt, in the chat template"""
    instruction: str = "{prompt}"
    """text around each prompt; in a conversation, around the user's last message"""
    drop_too_long: bool = False
    """drop rows whose prompt or response has too many tokens for rollout.max_model_len, and log
    their number; false: refuse the first of them
    """

    def __post_init__(self) -> None:
        if self.sources:
            self._check_sources()
        else:
            self._check_single()
        if self.num_train < 1 or self.num_heldout < 1:
            raise ConfigError(
                f"data.num_train={self.num_train}, data.num_heldout={self.num_heldout}: both must "
                "be at least 1"
            )
        if "{prompt}" not in self.instruction:
            raise ConfigError(f"data.instruction={self.instruction!r}: must contain {{prompt}}")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each of data.sources; empty: there is a single source."""
        return {name: source.weight for name, source in self.sources.items()}

    def _check_sources(self) -> None:
        """Check data.sources, and that no setting of a single source is given beside them."""
        single = {
            # The default cannot be distinguished from a task that is given.
            "task": self.task if self.task != "countdown" else None,
            "path": self.path,
            "heldout_path": self.heldout_path,
            "columns": self.columns if self.names_columns else None,
            "revision": self.revision,
            "dataset": self.dataset,
            "options": self.options or None,
        }
        for name, value in single.items():
            if value is not None:
                raise ConfigError(
                    f"data.{name}={value}: belongs to a single source, but data.sources has "
                    f"{', '.join(self.sources)}; leave it out, or write it for one of them, e.g. "
                    f"data.sources.{next(iter(self.sources))}.{name}"
                )
        check_source_names(list(self.sources))
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        if all(source.reads_rows and not source.heldout_path for source in self.sources.values()):
            raise ConfigError(
                f"data.sources={{{', '.join(self.sources)}}}: none has held-out problems, by which "
                f"the student is judged; write data.sources.{next(iter(self.sources))}."
                "heldout_path=FILE"
            )

    def _check_single(self) -> None:
        """Check the settings of a single source."""
        if self.task not in (*GENERATORS, *RECORDS):
            raise ConfigError(
                f"data.task={self.task}: must be countdown, reasoning_gym or {' or '.join(RECORDS)}"
            )
        if self.task in RECORDS and not (self.path and self.heldout_path):
            raise ConfigError(
                f"data.task={self.task}: needs data.path and data.heldout_path, two files or splits"
            )
        if self.task not in RECORDS and (self.path or self.heldout_path):
            raise ConfigError(
                f"data.path={self.path or self.heldout_path}: data.task={self.task} reads no "
                "file; set data.task=records"
            )
        self.check_columns("data")
        if self.task not in RECORDS and self.names_columns:
            raise ConfigError(
                f"data.columns={self.columns}: data.task={self.task} reads no rows; set "
                "data.task=records, or leave data.columns out"
            )
        if self.task != "reasoning_gym" and self.dataset:
            raise ConfigError(
                f"data.dataset={self.dataset}: data.task={self.task} has no generators to choose "
                "from; set data.task=reasoning_gym, or data.dataset=null"
            )
        if self.task not in RECORDS and self.revision:
            raise ConfigError(
                f"data.revision={self.revision}: data.task={self.task} reads no data set; set "
                "data.task=records, or data.revision=null"
            )
        if self.task == "reasoning_gym" and not self.dataset:
            raise ConfigError(
                "data.task=reasoning_gym: needs data.dataset, the generator's name, e.g. chain_sum"
            )


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    replicas: int = 1
    """number of frozen copies of each teacher"""
    max_tokens_per_micro_batch: int = 32768
    """budget of tokens for one forward pass of a teacher, padding included"""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"scorer.replicas={self.replicas}: must be at least 1")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    every: int = 20
    """steps between evaluations on the held-out problems; 0: only before and after training"""
    greedy: bool = True
    """always take the most likely token; false: sample with algorithm.temperature"""
    samples: int = 8
    """rollouts of each evaluation that are saved as text"""
    teacher: bool = True
    """evaluate each teacher that has a path once, before training, for the report"""
    sets: dict[str, HeldOutSetConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 0:
            raise ConfigError(
                f"eval.every={self.every}, eval.samples={self.samples}: neither may be negative; "
                "0 means none"
            )


@dataclass(kw_only=True, slots=True)
class DiagnosticsConfig:
    every: int = 0
    """steps between the expensive diagnostics, which are the gradients of both terms in parameter
    space (ZeRO 1 and 2) and a comparison of student and teacher; 0: never
    """
    trace: bool = False
    """record what each worker does when; the end of the run writes trace.json in run.dir, for
    Perfetto (ui.perfetto.dev)
    """
    token_samples: int = 4
    """number of responses whose tokens the report colours by how much more likely they are for the
    student than for the teacher, in the first step, each step with an evaluation and the last; 0:
    none
    """

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(
                f"diagnostics.every={self.every}: must not be negative; 0 means never"
            )
        if self.token_samples < 0:
            raise ConfigError(
                f"diagnostics.token_samples={self.token_samples}: must not be negative; 0 means "
                "none"
            )


@dataclass(kw_only=True, slots=True)
class SinkConfig:
    sink: str = MISSING
    """what receives every row of metrics, file.py:Class of yours or a built-in tracker"""
    options: dict[str, Any] = field(default_factory=dict)
    """keyword arguments with which the class is built"""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    wandb: WandbMode = WandbMode.auto
    """whether and how Weights & Biases is used"""
    project: str = "hybridrl"
    """project in Weights & Biases"""
    entity: str | None = None
    """user or team in Weights & Biases; null: that of the key"""
    group: str | None = None
    """group in Weights & Biases; null: none"""
    tags: list[str] = field(default_factory=list)
    """tags in Weights & Biases"""
    name: str | None = None
    """name of the run in Weights & Biases; null: made of run.dir, the model, the learning rate and
    the seed
    """
    system_metrics: bool = False
    """Weights & Biases also records the use of CPU, memory, disk, network and GPUs of the machine
    that the run is driven from
    """
    overview: bool = True
    """if the run is tracked online and its project in Weights & Biases has no view named `hybridrl
    overview`, save one with the metrics to look at first; needs hybridrl[overview]
    """
    rollouts_every: int = 0
    """steps between two tables of training responses in Weights & Biases, with the reference answer
    and the value of each reward function; 0: none
    """
    rollouts: int = 8
    """responses in each of these tables; those to one prompt stand together"""
    line_every_s: float = 10.0
    """seconds between two printed steps where the output is no terminal; 0: every step is printed.
    logs/console.log in run.dir has all steps
    """
    sinks: dict[str, SinkConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rollouts_every < 0 or self.rollouts < 1:
            raise ConfigError(
                f"tracking.rollouts_every={self.rollouts_every}, "
                f"tracking.rollouts={self.rollouts}: must be at least 0 and at least 1; leave the "
                "tables out with tracking.rollouts_every=0"
            )
        if not self.line_every_s >= 0:
            raise ConfigError(
                f"tracking.line_every_s={self.line_every_s}: must not be negative; 0 prints each "
                "step"
            )


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    address: str | None = None
    """Ray address; null: RAY_ADDRESS if set (as in a Ray job), else a private local Ray"""
    device: Device = Device.auto
    """device of the models"""
    colocate: bool = False
    """learner, engines and scorers share the same GPUs; no effect on CPU"""
    take_turns: bool = False
    """with colocate: engines sleep while the learner works, and the learner's optimizer is in host
    memory while they sample, so each may use most of a GPU. No effect on the memory of CPUs
    """
    device_memory_gib: float | None = None
    """GiB of memory that `hybridrl plan` assumes for one GPU, or for the node on CPUs; null: those
    of this machine, or 79 for a GPU that is not here (an H100 with 80 GB)
    """
    check_memory: bool = True
    """refuse a run whose plan does not fit the memory of its GPUs, before it starts; false: start
    it all the same. The check needs cluster.device_memory_gib, or a GPU on the machine that starts
    the run
    """
    spread: bool = False
    """put the workers of one group on different nodes where possible"""
    threads_per_worker: int | None = None
    """CPU threads of one learner, engine or scorer; null: the node's cores divided by the group's
    workers on it
    """
    max_restarts: int = 3
    """how many times failed workers of one kind are replaced during the run, and how many times the
    run returns to its last checkpoint
    """

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigError(
                f"cluster.max_restarts={self.max_restarts}: must not be negative; 0 ends the run "
                "at the first worker that fails"
            )
        if self.device_memory_gib is not None and not self.device_memory_gib > 0:
            raise ConfigError(
                f"cluster.device_memory_gib={self.device_memory_gib}: must be positive, or null to "
                "have it found"
            )


@dataclass(kw_only=True, slots=True)
class DeadlineConfig:
    """Seconds after which a worker that does not answer counts as hung; every wait has one."""

    placement_s: float = 60.0
    """until the cluster has answered and has room for all workers"""
    start_s: float = 600.0
    """until a worker has started and loaded its model"""
    heartbeat_s: float = 60.0
    """until an engine has answered a ping, also while it samples; after that it is replaced"""
    rollout_s: float = 600.0
    """until an engine has sampled the responses of one call"""
    score_s: float = 600.0
    """until a scorer has scored a chunk"""
    reward_s: float = 300.0
    """until a reward worker has scored a chunk"""
    learn_s: float = 1800.0
    """until a learner rank has finished its update"""
    sync_s: float = 300.0
    """until an engine has received and loaded the weights"""
    save_s: float = 1800.0
    """until a worker has written, read or exported its state"""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) > 0:
                raise ConfigError(f"deadlines.{f.name}={getattr(self, f.name)}: must be positive")

    @property
    def longest_silence_s(self) -> float:
        """The longest wait for one worker that does not answer."""
        return max(getattr(self, f.name) for f in fields(self))


@dataclass(kw_only=True, slots=True)
class RunSettings:
    """All settings of one run.

    settings/checks.py has the checks across sections; compose.load_config runs them.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)

    def __post_init__(self) -> None:
        if self.learner.zero_stage is None and self.learner.offload is not Offload.none:
            self.learner.zero_stage = 3
        if self.learner.zero_stage is None and self.model.dtype != AUTO:
            self.learner.zero_stage = 2 if self.model.dtype == "bfloat16" else 1

    def weight_transfer(self, *, on_cpu: bool) -> WeightTransfer:
        """rollout.weight_transfer, with auto resolved. Adapters alone are small, so they go through
        the object store on any device.
        """
        chosen = self.rollout.weight_transfer
        if chosen is not WeightTransfer.auto:
            return chosen
        if on_cpu or self.lora.travels_alone:
            return WeightTransfer.object_store
        return WeightTransfer.ipc if self.cluster.colocate else WeightTransfer.nccl

    @property
    def schedules(self) -> dict[str, ScheduleConfig]:
        """Every weight that may change with the step, by its dotted key."""
        schedules = {
            "algorithm.imitation_weight": self.algorithm.imitation_weight,
            "algorithm.reward_weight": self.algorithm.reward_weight,
        }
        for name, teacher in self.teachers.items():
            schedules[f"teachers.{name}.schedule"] = teacher.schedule
        for name, function in self.reward.functions.items():
            schedules[f"reward.functions.{name}.schedule"] = function.schedule
        return schedules

    @property
    def sampler_differs(self) -> bool:
        """Whether the policy that sampled a response may differ from the policy being trained.

        It may where sampling runs ahead of learning, where a batch has several updates, and in
        bfloat16, where the engine and the learner round the same weights differently, by about 0.04
        nats a token. In float32 they agree to about 1e-6.
        """
        late = self.pipeline.ahead > 0 or self.train.takes_several_updates
        return late or self.model.dtype != "float32"

    @property
    def clips_against_old(self) -> bool:
        """Whether PPO's clip bounds the learner's ratio to itself before a batch's first update."""
        clips = self.algorithm.ratio.kind is Ratio.clip and not self.algorithm.ranks_pairs
        return clips and self.train.takes_several_updates

    @property
    def scored_teachers(self) -> list[str]:
        """The teachers whose log-probs or hidden states the objective needs; may be none."""
        if self.algorithm.pair.needs_reference:
            return [self.algorithm.pair.against or next(iter(self.teachers))]
        if self.algorithm.ranks_pairs:
            return []
        return list(self.teachers) if self.algorithm.imitates else []

    @property
    def shared_teachers(self) -> list[str]:
        """The scored teachers whose weights are those of the learner without its adapters."""
        return [name for name in self.scored_teachers if self.teachers[name].share_base]

    @property
    def teachers_with_scorers(self) -> list[str]:
        """The scored teachers that have workers of their own."""
        return [name for name in self.scored_teachers if not self.teachers[name].share_base]

    def evidence_kind(self, teacher: str) -> EvidenceKind:
        """The kind of evidence of this teacher about a response token."""
        kind = self.teachers[teacher].evidence
        return self.algorithm.evidence_kind if kind is None else kind

    @property
    def estimates_divergence(self) -> bool:
        """Whether a part of the dense term is estimated from the drawn token."""
        kinds = {self.evidence_kind(name) for name in self.scored_teachers}
        unbiased = self.algorithm.topk.correction is Correction.unbiased
        return EvidenceKind.drawn in kinds or (EvidenceKind.support in kinds and unbiased)

    @property
    def learns_from_costs(self) -> bool:
        """Whether imitation costs of drawn tokens enter the sparse term."""
        costs = self.algorithm.gamma > 0 or self.estimates_divergence
        return self.algorithm.imitates and costs

    @property
    def learns_from_returns(self) -> bool:
        """Whether anything enters the returns of tokens; otherwise all of them are 0."""
        return self.algorithm.learns_from_rewards or self.learns_from_costs

    @property
    def teachers_in_use(self) -> list[str]:
        """The teachers that score, and the first teacher if it samples; others are not loaded."""
        writer = list(self.teachers)[:1] if self.algorithm.teacher_fraction else []
        return list(dict.fromkeys([*self.scored_teachers, *writer]))

    @property
    def measured_teachers(self) -> list[str]:
        """The teachers in use whose accuracy is measured before training. A teacher without a path
        is left out: it is the student before training, which is evaluated anyway, a class of the
        user's, or on a server.
        """
        measures = self.eval.teacher and self.reward.functions
        return [n for n in self.teachers_in_use if measures and self.teachers[n].path is not None]

    def teacher_model(self, name: str) -> ModelConfig:
        """The model of a teacher; one without a path is the student before training."""
        teacher = self.teachers[name]
        dtype = self.model.dtype if teacher.dtype == AUTO else teacher.dtype
        source = teacher if teacher.path else self.model
        return ModelConfig(
            path=source.path or "",
            dtype=dtype,
            revision=source.revision,
            eos=teacher.eos or source.eos,
            attention=self.model.attention,
        )

    def model_setting(self, teacher: str) -> str:
        """The setting from which teacher_model takes the path, for error messages."""
        return f"teachers.{teacher}.path" if self.teachers[teacher].path else "model.path"
