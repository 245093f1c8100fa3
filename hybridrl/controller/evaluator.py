"""The evaluations of a run on held-out problems and named sets, by the run's own workers."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import TypeVar

from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.evaluation import Evaluation, evaluate, evaluate_set
from hybridrl.controller.global_batch import divide, update_plan
from hybridrl.controller.held_out_set import HeldOutSet, seed_kind
from hybridrl.controller.pipeline import wave_seed
from hybridrl.controller.sampling import Sampling
from hybridrl.core.errors import WorkerError
from hybridrl.runtime.residency import Phase
from hybridrl.runtime.workers import Workers
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

T = TypeVar("T")


class Evaluator:
    """Judges the student by problems that it is not trained on.

    consumes held-out prompts / produces metrics / waits for engines and reward workers, and for
    scorers and the learner if the run learns from data / a worker that fails is replaced, and its
    part of the evaluation is repeated.
    """

    def __init__(
        self,
        settings: RunSettings,
        workers: Workers,
        coefficients: Coefficients,
        heldout: Sequence[Prompt],
        sets: Sequence[HeldOutSet] = (),
    ) -> None:
        """
        Args:
            heldout: held-out problems of the settings data.*.
            sets: the sets of eval.sets.
        """
        self.settings = settings
        self.workers = workers
        # No signal may end the waits, since the step before an evaluation is not logged yet.
        self.sampling = Sampling(settings, workers, None)
        self.coefficients = coefficients
        self.heldout = heldout
        self.sets = sets
        self.heldout_data = with_responses(settings, heldout)

    def evaluate(self, step: int) -> Evaluation:
        """The metrics of all problems, and samples of the held-out ones.

        Args:
            step: the number of batches that the student has learned from.
        """
        result = self._repeated(f"eval-{step}", lambda wave: self._evaluate(wave, step))
        metrics = result.metrics | self._on_data(self.heldout_data, f"eval-data-{step}", step)
        for held_out in self.sets:
            metrics |= self._evaluate_set(held_out, step)
        return Evaluation(metrics=metrics, samples=result.samples)

    def _evaluate(self, wave: str, step: int) -> Evaluation:
        return evaluate(
            self.settings.eval,
            self.workers.rollout,
            self.workers.rewards,
            self.heldout,
            wave=wave,
            step=step,
            temperature=self.settings.algorithm.temperature,
            seed=wave_seed(self.settings.run.seed, "eval", step),
            watch=self.workers.silent,
        )

    def _evaluate_set(self, held_out: HeldOutSet, step: int) -> dict[str, float]:
        """The metrics of one set. Without a reward function nothing could judge responses, so none
        are sampled.
        """
        metrics = {}
        kind = seed_kind(held_out.name)
        if self.settings.reward.functions:
            seed = wave_seed(self.settings.run.seed, kind, step)
            metrics = self._repeated(
                f"{kind}-{step}",
                lambda wave: evaluate_set(
                    held_out,
                    self.workers.rollout,
                    self.workers.rewards,
                    wave=wave,
                    seed=seed,
                    watch=self.workers.silent,
                ),
            )
        prompts = with_responses(self.settings, held_out.prompts)
        of_data = self._on_data(prompts, f"{kind}-data-{step}", step)
        own = {
            f"eval/{held_out.name}/{key.removeprefix('eval/')}": value
            for key, value in of_data.items()
        }
        return metrics | own

    def _repeated(self, wave: str, evaluation: Callable[[str], T]) -> T:
        """Evaluate. If a worker fails, evaluate again in a wave of another name, since the
        remaining engines still have chunks of the earlier wave.
        """
        self.workers.enter(Phase.sample)
        for again in count():
            try:
                return evaluation(f"{wave}.{again}")
            except WorkerError as error:
                self.workers.lose(error)
        raise AssertionError("count never ends")

    def _on_data(self, prompts: Sequence[Prompt], wave: str, step: int) -> dict[str, float]:
        """The loss on the data's own responses to held-out prompts (eval/loss, ...); empty if
        `prompts` is empty.
        """
        if not prompts:
            return {}
        drawn = self.sampling.heldout(prompts, wave=wave)
        headers = self.sampling.headers(drawn)
        arrived = self.sampling.arrived(drawn, headers, step)
        self.sampling.scores(drawn)
        self.workers.enter(Phase.learn)
        batch = divide(arrived, num_ranks=self.settings.learner.ranks)
        plan = update_plan(
            batch,
            0,
            self.settings,
            self.coefficients,
            step=step,
            num_groups=self.sampling.num_pairs(batch.part([0])),
        )
        groups = [of_rank[0] for of_rank in batch.groups]  # of the one mini-batch
        return self.workers.learner.evaluate(plan, groups, batch.values).metrics


def evaluation_is_due(settings: RunSettings, step: int) -> bool:
    """Whether an evaluation follows step `step`: every eval.every steps, and after the last one."""
    every = settings.eval.every
    return step == settings.train.steps or bool(every and step % every == 0)


def with_responses(settings: RunSettings, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with exactly as many responses as the run learns from; none if the run does not
    learn from data.
    """
    if not settings.algorithm.data_fraction:
        return []
    needed = settings.algorithm.responses_per_prompt
    return [prompt for prompt in prompts if len(prompt.responses) == needed]
