"""Checks of settings across sections.

Each section checks its own values when it is built. `check_settings` runs everything in CHECKS;
checks that read models and data are in launch/preflight.py.
"""

import math
import re
from collections.abc import Callable

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import (
    Correction,
    Device,
    EvidenceKind,
    OnStale,
    Products,
    Ratio,
    RatioLevel,
    SupportSource,
    TemplateOf,
    WeightTransfer,
)
from hybridrl.settings.engine_checks import check_teacher_engines
from hybridrl.settings.models import AUTO, DTYPES
from hybridrl.settings.objective_checks import (
    check_objective,
    check_pair_terms,
    check_reference,
    check_reward_given,
    check_siblings,
    check_something_to_learn,
    check_teacher_given,
    check_teacher_weights,
)
from hybridrl.settings.rewards import FUNCTIONS_SHARE
from hybridrl.settings.run import RunSettings
from hybridrl.settings.server_checks import check_servers
from hybridrl.settings.set_checks import check_sets
from hybridrl.settings.shared_base_checks import check_shared_bases
from hybridrl.settings.shares import chunk_size, shares

SHARED_GPU_LIMIT = 0.5
"""Largest rollout.gpu_memory_utilization on a GPU that learner and teachers use too."""


def check_settings(settings: RunSettings) -> None:
    """Run every check in CHECKS.

    Raises:
        ConfigError: one sentence about the first rule that is broken.
    """
    for check in CHECKS:
        check(settings)


def check_teachers(settings: RunSettings) -> None:
    """Check the dtype, class, devices and revision of each teacher."""
    for name, teacher in settings.teachers.items():
        if teacher.dtype not in (*DTYPES, AUTO):
            raise ConfigError(
                f"teachers.{name}.dtype={teacher.dtype}: must be auto, {' or '.join(DTYPES)}"
            )
        own_class = teacher.model
        if own_class is not None and not re.fullmatch(r".+\.py:\w+", own_class):
            raise ConfigError(
                f"teachers.{name}.model={own_class}: must be FILE.py:CLASS; for a model's folder "
                f"or name set teachers.{name}.path"
            )
        if own_class is not None and teacher.path is not None:
            raise ConfigError(
                f"teachers.{name}.model={own_class}: cannot be combined with teachers.{name}.path="
                f"{teacher.path}; leave one of them out"
            )
        writes = settings.algorithm.teacher_fraction and name == next(iter(settings.teachers))
        if own_class is not None and writes:
            raise ConfigError(
                f"teachers.{name}.model={own_class}: scores responses and writes none; set "
                "algorithm.teacher_fraction=0, or put another teacher first"
            )
        if teacher.devices < 1:
            raise ConfigError(f"teachers.{name}.devices={teacher.devices}: must be at least 1")
        if teacher.devices > 1 and own_class is not None:
            raise ConfigError(
                f"teachers.{name}.devices={teacher.devices}: teachers.{name}.model={own_class} is "
                "a class of yours, which runs in one process; set devices=1"
            )
        if teacher.revision and teacher.path is None:
            raise ConfigError(
                f"teachers.{name}.revision={teacher.revision}: without a path it is the student; "
                "set model.revision"
            )


def check_teacher_prompts(settings: RunSettings) -> None:
    """Only a teacher with a path can read prompts by a chat template of its own."""
    for name, teacher in settings.teachers.items():
        own = teacher.chat_template is TemplateOf.own
        if own and teacher.path is None:
            raise ConfigError(
                f"teachers.{name}.chat_template=own: needs teachers.{name}.path, whose template it "
                "would be; leave it out"
            )
        if teacher.chat_template_kwargs and not own:
            raise ConfigError(
                f"teachers.{name}.chat_template_kwargs={teacher.chat_template_kwargs}: are read "
                f"only with teachers.{name}.chat_template=own; set it, or leave them out"
            )


def check_evidence(settings: RunSettings) -> None:
    """A pair loss reads only the drawn tokens' log-probs of its reference."""
    for name, teacher in settings.teachers.items():
        pairs = settings.algorithm.ranks_pairs
        if pairs and teacher.evidence not in (None, EvidenceKind.drawn):
            raise ConfigError(
                f"teachers.{name}.evidence={teacher.evidence}: "
                f"algorithm.pair.loss={settings.algorithm.pair.loss} reads only the drawn tokens' "
                "log-probs; leave it out"
            )


def check_schedules(settings: RunSettings) -> None:
    """Each weight that changes with the step has the values that its kind needs."""
    for key, schedule in settings.schedules.items():
        schedule.check(key)


def check_best_checkpoint(settings: RunSettings) -> None:
    """The metric of the best checkpoint is measured at the steps that are saved."""
    settings.checkpoint.check_best(settings.eval.every)


def check_data_responses(settings: RunSettings) -> None:
    """Refuse settings that need a sampler's log-probs or tokens for responses from the data."""
    algorithm = settings.algorithm
    if algorithm.data_fraction and algorithm.ratio.kind is not Ratio.none:
        raise ConfigError(
            f"algorithm.data_fraction={algorithm.data_fraction}: data has no sampler log-probs, "
            f"which algorithm.ratio.kind={algorithm.ratio.kind} needs; set "
            "algorithm.ratio.kind=none"
        )
    kinds = {settings.evidence_kind(name) for name in settings.scored_teachers}
    if (
        algorithm.data_fraction
        and EvidenceKind.support in kinds
        and algorithm.topk.source is SupportSource.sampler
    ):
        raise ConfigError(
            f"algorithm.data_fraction={algorithm.data_fraction}: data has no sampler whose tokens "
            "could be the support; set algorithm.topk.source=teacher"
        )
    if algorithm.data_fraction and algorithm.imitates and not algorithm.ranks_pairs:
        check_imitation_of_data(settings)


def check_teacher_responses(settings: RunSettings) -> None:
    """Check that the teacher's responses are weighted so that they count for the student."""
    algorithm = settings.algorithm
    if not algorithm.teacher_fraction:
        return
    if algorithm.ranks_pairs:
        raise ConfigError(
            f"algorithm.teacher_fraction={algorithm.teacher_fraction}: pairs come from the student "
            "or the data; set it to 0, or algorithm.pair.loss=none"
        )
    writer = next(iter(settings.teachers.values()), None)
    if (
        writer is not None
        and len(settings.teachers) > 1
        and (writer.weight < 0 or (writer.path is None and writer.url is None))
    ):
        first = next(iter(settings.teachers))
        raise ConfigError(
            f"algorithm.teacher_fraction={algorithm.teacher_fraction}: the first teacher would "
            f"write, which is {first}, a model to move away from or the student before training; "
            "put another one first, or set algorithm.teacher_fraction=0"
        )
    if algorithm.ratio.kind is Ratio.none and settings.learns_from_returns:
        raise ConfigError(
            f"algorithm.teacher_fraction={algorithm.teacher_fraction}: rewards and costs of what "
            "the teacher wrote count for the student only when they are weighted by "
            "algorithm.ratio; set algorithm.ratio.kind=truncate, or algorithm.teacher_fraction=0"
        )
    if algorithm.nll_weight and algorithm.ratio.kind is not Ratio.none:
        raise ConfigError(
            f"algorithm.nll_weight={algorithm.nll_weight}: the likelihood of what the teacher "
            "wrote is not a return that algorithm.ratio could weight; set "
            "algorithm.ratio.kind=none, or algorithm.nll_weight=0"
        )


def check_imitation_of_data(settings: RunSettings) -> None:
    """Refuse to estimate a divergence from the tokens of data, which the student did not draw."""
    algorithm = settings.algorithm
    for name in settings.scored_teachers:
        kind = settings.evidence_kind(name)
        own = settings.teachers[name].evidence
        setting = "algorithm.support=sampled" if own is None else f"teachers.{name}.evidence={own}"
        alone = algorithm.data_fraction == 1  # no sampled responses for which it could be used
        if kind is EvidenceKind.drawn and (alone or not algorithm.nll_weight):
            raise ConfigError(
                f"{setting}: estimates by the drawn token, and data was not drawn; set "
                "algorithm.support=full or topk, or algorithm.data_fraction=0"
            )
        if kind is EvidenceKind.support and algorithm.topk.correction is Correction.unbiased:
            raise ConfigError(
                "algorithm.topk.correction=unbiased: corrects by the drawn token, and data was not "
                "drawn; choose another correction, algorithm.support=full, or "
                "algorithm.data_fraction=0"
            )


def check_pipeline(settings: RunSettings) -> None:
    """Check that the objective and the data allow stale tokens and cancelled rollouts."""
    algorithm = settings.algorithm
    pipeline = settings.pipeline
    if (
        pipeline.on_stale is OnStale.reweight
        and pipeline.ahead
        and algorithm.ratio.kind is Ratio.none
    ):
        raise ConfigError(
            "pipeline.on_stale=reweight: stale tokens are weighted by algorithm.ratio, and "
            "algorithm.ratio.kind=none leaves it out; set algorithm.ratio.kind=truncate, or "
            "pipeline.on_stale=wait"
        )
    weighs = algorithm.ratio.level is RatioLevel.sequence or settings.learns_from_returns
    if (
        pipeline.on_stale is OnStale.reweight
        and pipeline.ahead
        and (algorithm.ranks_pairs or not weighs)
    ):
        what = "pairs are" if algorithm.ranks_pairs else "the dense term is"
        raise ConfigError(
            f"pipeline.on_stale=reweight: {what} not weighted by algorithm.ratio of a token, and "
            "nothing else is learned from; set pipeline.on_stale=wait"
        )
    if settings.rollout.oversample and algorithm.teacher_fraction:
        raise ConfigError(
            f"rollout.oversample={settings.rollout.oversample}: the groups that are done first "
            "would decide the teacher's share, not algorithm.teacher_fraction; set one of them to 0"
        )
    if settings.rollout.oversample and algorithm.data_fraction:
        raise ConfigError(
            f"rollout.oversample={settings.rollout.oversample}: data is not sampled, so none of it "
            "is cancelled; set it to 0, or algorithm.data_fraction=0"
        )


def check_overlong(settings: RunSettings) -> None:
    """The overlong buffer fits into the longest response, and is not used for losses on pairs."""
    buffer = settings.algorithm.overlong_buffer
    longest = settings.rollout.max_new_tokens
    if not buffer:
        return
    if longest is not None and buffer > longest:
        raise ConfigError(
            f"algorithm.overlong_buffer={buffer}: is longer than the longest response, "
            f"rollout.max_new_tokens={longest}; lower it"
        )
    if settings.algorithm.ranks_pairs:
        raise ConfigError(
            f"algorithm.overlong_buffer={buffer}: pairs are ranked by their rewards without it; "
            "set it to 0"
        )


def check_products(settings: RunSettings) -> None:
    """train.products=float32 is for CPUs alone."""
    wide = settings.train.products is Products.float32
    if wide and settings.cluster.device is Device.cuda:
        raise ConfigError(
            "train.products=float32: is for CPUs, cluster.device is cuda, where products of "
            "bfloat16 are summed in float32 anyway; set train.products=auto"
        )


def check_places(settings: RunSettings) -> None:
    """Check that no worker would be idle, and that devices allow the placement of the workers.

    Raises:
        ConfigError: one sentence about the first rule that is broken.
    """
    _check_counts(settings)
    _check_weight_transfer(settings)
    _check_turns(settings)
    if settings.cluster.colocate and settings.cluster.device is not Device.cpu:
        _check_shared_gpus(settings)


def _check_counts(settings: RunSettings) -> None:
    rollout = settings.rollout
    algorithm = settings.algorithm
    prompts = settings.train.prompts_per_step
    groups = {"rollout.engines": rollout.engines, "learner.ranks": settings.learner.ranks}
    for name, count in groups.items():
        if prompts < count:
            raise ConfigError(
                f"train.prompts_per_step={prompts}: must be at least {name}={count}, one prompt "
                "for each; raise it"
            )
    updates = settings.train.updates_per_batch
    if prompts // updates < settings.learner.ranks:
        raise ConfigError(
            f"train.updates_per_batch={updates}: a mini-batch has {prompts // updates} prompts, "
            f"fewer than learner.ranks={settings.learner.ranks}, so that a rank would idle; lower "
            "it, or raise train.prompts_per_step"
        )
    by_student, by_teacher, by_data = shares(prompts, algorithm, step=0)
    chunks = -(-by_student // chunk_size(by_student, rollout.groups_per_chunk, rollout.engines))
    chunks += -(-by_teacher // chunk_size(by_teacher, rollout.groups_per_chunk, 1)) + (by_data > 0)
    counts = {
        "scorer.replicas": settings.scorer.replicas if settings.teachers_with_scorers else 1,
        "reward.workers": settings.reward.workers,
    }
    for name, count in counts.items():
        if count > chunks:
            raise ConfigError(
                f"{name}={count}: a step has {chunks} chunks, each for one worker, so the rest "
                f"would idle; lower it or rollout.groups_per_chunk={rollout.groups_per_chunk}"
            )


def _check_weight_transfer(settings: RunSettings) -> None:
    chosen = settings.rollout.weight_transfer
    if chosen not in (WeightTransfer.nccl, WeightTransfer.ipc):
        return
    if settings.lora.travels_alone:
        raise ConfigError(
            f"rollout.weight_transfer={chosen}: carries whole weights, and lora.sync=adapter sends "
            "adapters through the object store; use object_store or auto, or lora.sync=merged"
        )
    if settings.cluster.device is Device.cpu:
        raise ConfigError(
            f"rollout.weight_transfer={chosen}: needs GPUs, cluster.device is cpu; use object_store"
        )
    if chosen is WeightTransfer.ipc and settings.rollout.tensor_parallel > 1:
        raise ConfigError(
            "rollout.weight_transfer=ipc: hands over memory of one GPU, and "
            f"rollout.tensor_parallel={settings.rollout.tensor_parallel} needs several; set "
            "rollout.tensor_parallel=1, or use nccl"
        )
    if chosen is WeightTransfer.ipc and not settings.cluster.colocate:
        raise ConfigError(
            "rollout.weight_transfer=ipc: learner and engine must use the same GPU; set "
            "cluster.colocate=true, or use nccl or auto"
        )
    if chosen is WeightTransfer.nccl and settings.cluster.colocate:
        raise ConfigError(
            "rollout.weight_transfer=nccl: NCCL refuses two ranks on one GPU, which is what "
            "cluster.colocate=true means; use ipc, object_store or auto"
        )


def _check_turns(settings: RunSettings) -> None:
    """Refuse turns of engines and learner unless they share GPUs, or where responses would be
    sampled in the learner's turn.
    """
    if not settings.cluster.take_turns:
        return
    if not settings.cluster.colocate:
        raise ConfigError(
            "cluster.take_turns=true: needs GPUs that engines and learner share; set "
            "cluster.colocate=true, or leave it out"
        )
    if settings.pipeline.ahead:
        raise ConfigError(
            f"cluster.take_turns=true: engines sleep while the learner works, and pipeline.ahead="
            f"{settings.pipeline.ahead} has them sample then; set pipeline.ahead=0 "
            "(schedule=sync), or leave it out"
        )
    if settings.rollout.oversample:
        raise ConfigError(
            "cluster.take_turns=true: an engine sleeps when it has no request left, and "
            f"rollout.oversample={settings.rollout.oversample} cancels some; set "
            "rollout.oversample=0, or leave it out"
        )


def _check_shared_gpus(settings: RunSettings) -> None:
    rollout = settings.rollout
    ranks = settings.learner.ranks
    if rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel}: under cluster.colocate=true an "
            "engine has a share of one GPU; set it to 1, or cluster.colocate=false"
        )
    if settings.reward.gpus:
        raise ConfigError(
            f"reward.gpus={settings.reward.gpus}: under cluster.colocate=true a reward worker "
            "would fill a GPU that others share; set it to 0, or cluster.colocate=false"
        )
    by_store = settings.weight_transfer(on_cpu=False) is WeightTransfer.object_store
    if not by_store and rollout.engines > ranks:
        raise ConfigError(
            f"rollout.engines={rollout.engines}: under cluster.colocate=true an engine's weights "
            f"come from the learner rank on its GPU, and learner.ranks={ranks}; lower it, or use "
            "rollout.weight_transfer=object_store"
        )
    if rollout.gpu_memory_utilization > SHARED_GPU_LIMIT and not settings.cluster.take_turns:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}: under "
            "cluster.colocate=true learner and teachers need the rest of the GPU; set it to "
            f"{SHARED_GPU_LIMIT} or less, or cluster.take_turns=true"
        )


def check_reward_time(settings: RunSettings) -> None:
    """A reward worker has time for each function to reach its timeout twice, for all responses and
    then for one alone, before it counts as hung and is replaced.
    """
    reward = settings.reward
    deadline_s = settings.deadlines.reward_s
    longest = 2 * reward.timeout_s * len(reward.functions)
    needed = longest / FUNCTIONS_SHARE
    if deadline_s < needed:
        raise ConfigError(
            f"deadlines.reward_s={deadline_s:g}: a worker may wait {longest:g} s for reward "
            f"functions that hang, twice reward.timeout_s={reward.timeout_s:g} for each; raise it "
            f"to {math.ceil(needed)}, or lower reward.timeout_s"
        )


CHECKS: tuple[Callable[[RunSettings], None], ...] = (
    check_objective,
    check_teachers,
    check_servers,
    check_teacher_engines,
    check_shared_bases,
    check_teacher_prompts,
    check_schedules,
    check_products,
    check_best_checkpoint,
    check_sets,
    check_evidence,
    check_something_to_learn,
    check_teacher_given,
    check_teacher_weights,
    check_reference,
    check_pair_terms,
    check_reward_given,
    check_reward_time,
    check_siblings,
    check_data_responses,
    check_teacher_responses,
    check_pipeline,
    check_overlong,
    check_places,
)
"""All checks, in the order in which they run."""
