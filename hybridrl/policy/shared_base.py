"""Teachers whose scores the learner computes with its own weights, the adapters switched off."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.models.adapters import without_adapters
from hybridrl.objectives.head_rule import head_rule
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import RolloutBatch, ScoredBatch, TokenScores


class Base:
    """The student before training, as a TeacherModel: the learner's model without its adapters."""

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, None]],
        model: PreTrainedModel,
        head: Tensor,
        *,
        together: bool,
    ) -> None:
        """
        Args:
            forward: of the (possibly sharded) Student that contains the model.
            head: [V, H] the model's output embedding, whole and on the device.
            together: all ranks must run each forward pass together, because ZeRO 3 gathers weights
                in it.
        """
        self.forward = forward
        self.model = model
        self.head = head
        self.together = together
        self.nothing = TokenColumns.unlearned(
            torch.zeros(0, dtype=torch.int64, device=head.device),
            torch.zeros(0, device=head.device),
        )

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        if self.together:
            self._is_any_busy(True)
        every = torch.arange(input_ids.numel(), device=input_ids.device)
        with without_adapters(self.model), torch.no_grad():
            states, _ = self.forward(
                input_ids, attention_mask, position_ids, every, (), self.nothing, None
            )
        return states.reshape(*input_ids.shape, -1)

    def wait_for_others(self) -> None:
        """Run forward passes until every rank has finished its own. Every rank calls this after its
        last pass.
        """
        token = torch.ones(1, 1, dtype=torch.int64, device=self.head.device)
        while self.together and self._is_any_busy(False):
            with without_adapters(self.model), torch.no_grad():
                self.forward(token, token, token - 1, token[0] - 1, (), self.nothing, None)

    def _is_any_busy(self, busy: bool) -> bool:
        flag = torch.tensor(int(busy), device=self.head.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class SharedTeachers:
    """The scored teachers with share_base, which the learner scores itself.

    It scores a batch with a Scorer of its own just before it learns from the batch.
    """

    def __init__(self, settings: RunSettings, evidence: Sequence[Evidence], base: Base) -> None:
        """
        Args:
            evidence: of each scored teacher.
        """
        self.base = base
        self.scorers = {
            position: Scorer(
                settings,
                teacher=name,
                device=str(base.head.device),
                evidence=evidence[position],
                rule=head_rule(settings),
                model=base,
            )
            for position, name in enumerate(settings.scored_teachers)
            if settings.teachers[name].share_base
        }

    def scored(self, batches: Sequence[ScoredBatch]) -> list[ScoredBatch]:
        """The batches with the scores of all scored teachers in their order, those of these
        teachers inserted. All ranks call this together.
        """
        whole = [replace(batch, scores=self._scores(batch)) for batch in batches]
        self.base.wait_for_others()
        return whole

    def _scores(self, batch: ScoredBatch) -> tuple[TokenScores, ...]:
        scores = list(batch.scores)
        for position, scorer in self.scorers.items():  # in rising order
            scores.insert(position, scorer.scores(batch.rollout))
        return tuple(scores)

    def answers(self, batch: RolloutBatch) -> list[TokenScores]:
        """The scores of a batch, one for each of these teachers. All ranks call this together."""
        scores = [scorer.scores(batch) for scorer in self.scorers.values()]
        self.base.wait_for_others()
        return scores
