"""One run from settings to report: check, place, train, evaluate, save, and leave nothing running."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hybridrl.choices import Resume, WandbMode
from hybridrl.compose import to_yaml
from hybridrl.config import ModelConfig, RunSettings
from hybridrl.controller.checkpoint import Checkpoint, Checkpointer
from hybridrl.controller.controller import Controller, config_hash
from hybridrl.controller.evaluation import evaluate
from hybridrl.data.prompts import PromptSource, load_problems, tokenize
from hybridrl.errors import CheckpointError, ConfigError, RunDirectoryError
from hybridrl.models.loading import load_tokenizer
from hybridrl.rewards import check_rewards
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.groups import RewardGroup, RolloutGroup
from hybridrl.runtime.workers import Slots, place_workers, start_rewards, start_workers
from hybridrl.tracking.console import ConsoleSink
from hybridrl.tracking.jsonl import JsonlSink, read_metrics
from hybridrl.tracking.report import write_report
from hybridrl.tracking.sink import Sinks
from hybridrl.tracking.wandb_sink import WandbSink
from hybridrl.types import Prompt, RunInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    run_dir: Path
    report: Path
    accuracy_before: float
    accuracy_after: float
    teacher_accuracy: dict[str, float]
    export: Path | None


def train(settings: RunSettings) -> RunResult:
    """Run or resume `settings`; the same call continues where the last one stopped.

    Raises:
        HybridRLError: what went wrong, in one sentence; nothing is left running.
    """
    began = time.monotonic()
    check_rewards(settings.reward)
    prompts, heldout = prepare_prompts(settings)
    with run_directory(settings) as run_dir, ExitStack() as stack:
        checkpointer = Checkpointer(run_dir, settings.checkpoint.keep)
        checkpoint = find_checkpoint(settings, checkpointer)
        console, sinks, wandb = make_sinks(settings)
        stack.push(lambda kind, *_: sinks.close(0 if kind is None else 1))
        first = checkpoint.state.step if checkpoint else 0
        sinks.start(run_info(settings, run_dir, checkpoint))
        console.notice("starting workers, and measuring the teacher on the held-out problems ...")
        cluster = stack.enter_context(Cluster(settings))
        slots, log_dir = place_workers(settings, cluster), str(run_dir / "logs")
        rewards = start_rewards(settings, slots, log_dir)
        measure_teachers(settings, cluster, slots, rewards, heldout, run_dir)
        controller = Controller(
            settings,
            workers=start_workers(settings, cluster, slots, rewards, log_dir),
            backend=cluster.weight_transfer,
            prompts=PromptSource(prompts, settings.run.seed),
            heldout=heldout,
            sinks=sinks,
            checkpointer=checkpointer,
        )
        controller.wandb_id = wandb.run_id if wandb else None
        if checkpoint:
            controller.load_state(checkpoint.state, str(checkpoint.folder))
        controller.publish_weights()
        took = f"{time.monotonic() - began:.0f} s"
        console.notice(f"workers ready after {took} on {cluster.device}, weights travel by {cluster.weight_transfer}")
        if not checkpoint:
            sinks.log({"train/step": 0.0, **teacher_levels(run_dir), **controller.evaluate()})
        controller.run()
        exported = export_model(settings, controller, run_dir, first)
    return result(run_dir, exported)


def prepare_prompts(settings: RunSettings) -> tuple[list[Prompt], list[Prompt]]:
    """Tokenized training and held-out prompts; refuses a teacher whose vocabulary is not the student's."""
    tokenizer = load_tokenizer(settings.model.path, settings.model.revision)
    for name, teacher in settings.teachers.items():
        if teacher.path and load_tokenizer(teacher.path, setting=f"teachers.{name}.path").get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"teachers.{name}.path={teacher.path}: its vocabulary differs from that of model.path={settings.model.path}; "
                "log-probs of the same ids would speak of different tokens. Choose a teacher with the student's tokenizer"
            )
    room = settings.rollout.max_model_len - settings.rollout.max_new_tokens
    problems = load_problems(settings.data, settings.run.seed)
    train_prompts, heldout = (tokenize(part, tokenizer, settings.data, room) for part in problems)
    return train_prompts, heldout


@contextmanager
def run_directory(settings: RunSettings) -> Iterator[Path]:
    """The run directory, locked while the run lasts, with config.yaml in it.

    Raises:
        RunDirectoryError: another run holds it, or run.resume=never and it already holds a run.
        ConfigError: it would vanish with a Ray job's upload folder.
    """
    run_dir = Path(settings.run.dir).expanduser().absolute()
    if "working_dir_files" in run_dir.parts:
        raise ConfigError(
            f"run.dir={settings.run.dir}: lies in the Ray job's upload folder {run_dir}, which is deleted; "
            "give an absolute path on shared storage"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunDirectoryError(f"run.dir={run_dir}: another run holds it; wait for it or choose another run.dir") from error
    try:
        if settings.run.resume is Resume.never and (run_dir / "metrics.jsonl").exists():
            raise RunDirectoryError(f"run.dir={run_dir}: holds a run and run.resume=never; choose another run.dir or run.resume=auto")
        (run_dir / "config.yaml").write_text(to_yaml(settings))
        yield run_dir
    finally:
        lock.release()


def find_checkpoint(settings: RunSettings, checkpointer: Checkpointer) -> Checkpoint | None:
    """Where to continue; None: from the start.

    Raises:
        CheckpointError: run.resume=required and there is none, or all are damaged.
    """
    if settings.run.resume is Resume.never:
        return None
    checkpoint = checkpointer.newest()
    if checkpoint is None and settings.run.resume is Resume.required:
        raise CheckpointError(f"run.resume=required: no checkpoint in {checkpointer.root}; use run.resume=auto to start")
    if checkpoint and checkpoint.state.config_hash != config_hash(settings):
        log.warning("the settings differ from those of %s; the run continues with the new ones", checkpoint.folder)
    return checkpoint


def make_sinks(settings: RunSettings) -> tuple[ConsoleSink, Sinks, WandbSink | None]:
    console = ConsoleSink()
    wandb = None if settings.tracking.wandb is WandbMode.disabled else WandbSink(settings.tracking)
    return console, Sinks(required=[JsonlSink()], optional=[console, *([wandb] if wandb else [])]), wandb


def run_info(settings: RunSettings, run_dir: Path, checkpoint: Checkpoint | None) -> RunInfo:
    return RunInfo(
        run_dir=str(run_dir),
        name=run_dir.name,
        total_steps=settings.train.steps,
        first_step=checkpoint.state.step if checkpoint else 0,
        config=asdict(settings),
        wandb_id=checkpoint.state.wandb_id if checkpoint else None,
    )


TEACHER_LEVELS = "teacher_levels.json"


def measure_teachers(
    settings: RunSettings, cluster: Cluster, slots: Slots, rewards: RewardGroup, heldout: list[Prompt], run_dir: Path
) -> None:
    """Held-out accuracy of each teacher that has weights of its own, once per run directory, on a short-lived engine."""
    target = run_dir / TEACHER_LEVELS
    if not settings.eval.teacher or target.exists():
        return
    levels = {}
    for name, teacher in settings.teachers.items():
        if teacher.path is None:  # it is the student before training, which is evaluated anyway
            continue
        engine = RolloutGroup(
            settings,
            slots["rollout"][:1],
            model=ModelConfig(path=teacher.path, dtype=teacher.dtype),
            device=cluster.device,
            backend=cluster.weight_transfer,
            log_dir=str(run_dir / "logs"),
            name=f"teacher-{name}",
        )
        gather(engine.ready())
        found = evaluate(
            settings.eval, engine, rewards, heldout, step=0, temperature=settings.algorithm.temperature, seed=settings.run.seed
        )
        levels[f"eval/accuracy_teacher/{name}"] = found.accuracy
        engine.close()
    target.write_text(json.dumps(levels))


def teacher_levels(run_dir: Path) -> dict[str, float]:
    target = run_dir / TEACHER_LEVELS
    return json.loads(target.read_text()) if target.exists() else {}


def export_model(settings: RunSettings, controller: Controller, run_dir: Path, first: int) -> Path | None:
    """The Hugging Face folder of the final student."""
    folder = run_dir / "export" / f"step_{controller.steps_done:06d}"
    if settings.checkpoint.export and not (folder.exists() and controller.steps_done == first):
        controller.learner.export(str(folder))
    return folder if folder.exists() else None


def result(run_dir: Path, exported: Path | None) -> RunResult:
    rows = read_metrics(run_dir)
    evaluated = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return RunResult(
        run_dir=run_dir,
        report=write_report(run_dir),
        accuracy_before=evaluated[0],
        accuracy_after=evaluated[-1],
        teacher_accuracy={k.rsplit("/", 1)[1]: v for k, v in rows[0].items() if k.startswith("eval/accuracy_teacher/")},
        export=exported,
    )
