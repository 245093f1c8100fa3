"""The production code path on enumerated sequences: objective, head rule, teachers and head op, all
in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridrl.controller.coefficients import Weights
from hybridrl.kernels.head import hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher, SupportTeacher, Teacher, VocabularyTeacher
from hybridrl.kernels.terms import TokenTerms
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Credit, LearnerView, Signal, moments, per_token
from hybridrl.objectives.hybrid import response_rows, teacher_weight
from hybridrl.oracle.exact import author
from hybridrl.oracle.mdp import Mdp
from hybridrl.policy.student import head_rule
from hybridrl.settings.choices import Source, SupportSource
from hybridrl.settings.run import RunSettings
from hybridrl.types import FinishReason, Rewards, RolloutBatch, ScoredBatch, TokenScores, UpdatePlan

COLUMNS = {"domain": "here"}
"""What routes of teachers may look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What the head pass is given: R response tokens of B groups of K sequences."""

    prefixes: Tensor  # [R] int64
    terms: TokenTerms
    teachers: tuple[Teacher, ...]
    group: Tensor  # [R] int64, whose token it is


class Estimator:
    """One configuration's gradient. Subclasses that override one method are how a broken one is
    made.
    """

    def __init__(self, settings: RunSettings, mdp: Mdp, values: Tensor | None = None) -> None:
        """values: [P] what the value head says; None: the MDP's own, unrelated ones."""
        self.settings, self.mdp = settings, mdp
        self.values = mdp.values if values is None else values
        self.objective, self.rule, self.weights = (
            make_objective(settings),
            head_rule(settings),
            Weights(settings),
        )

    def rows(self, members: Tensor, source: Source) -> Rows:
        """members: [B, K] indices of sequences; each group is a global batch of its own, all with
        the same number of tokens.
        """
        batch = self.batch(members, source)
        plan = self.plan(int(self.mdp.lengths[members[0]].sum()), members.shape[1])
        credit = self.credit(batch, plan, members)
        terms = TokenTerms(
            token_ids=response_rows(batch.rollout, batch.rollout.input_ids).long(),
            token_weight=credit.token_weight,
            sparse=credit.cost,
            sampler_logprobs=response_rows(batch.rollout, batch.rollout.rollout_logprobs),
        )
        owner = torch.arange(len(members)).repeat_interleave(members.shape[1])
        mask = self.mdp.mask[members.flatten()]
        return Rows(
            prefixes=self.mdp.prefixes[members.flatten()][mask],
            terms=terms,
            teachers=self.teachers(batch, plan),
            group=per_token(owner, batch.rollout),
        )

    def loss(self, hidden: Tensor, lm_head: Tensor, rows: Rows, terms: TokenTerms) -> Tensor:
        return hybrid_head_loss(hidden, lm_head, rows.teachers, terms, self.rule)[0]

    def plan(self, num_tokens: int, num_sequences: int) -> UpdatePlan:
        """As the controller orders the first step."""
        names = self.settings.scored_teachers
        return UpdatePlan(
            step=0,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            num_groups=1,
            num_micro_batches=1,
            lr=0.0,
            teacher_weights=self.weights.teachers(0),
            teacher_routes=tuple(self.settings.teachers[name].route for name in names),
            reward_weight=self.weights.reward(0),
        )

    def credit(self, batch: ScoredBatch, plan: UpdatePlan, members: Tensor) -> Credit:
        at, tokens = self._at(members)
        view = None
        if self.objective.signals & {Signal.learner_logprobs, Signal.learner_values}:
            view = LearnerView(
                logprobs=self.mdp.logp(self.mdp.student)[at, tokens], values=self.values[at]
            )
        credit = self.objective.credit(batch, plan, view)
        if not self.objective.standardises:
            return credit
        assert len(members) == 1, "a standardised batch is measured alone"
        count, total, squares = moments([credit])
        mean = total / count
        return credit.standardised(mean, (squares / count - mean.square()).clamp_min(0).sqrt())

    def teachers(self, batch: ScoredBatch, plan: UpdatePlan) -> tuple[Teacher, ...]:
        """As the learner makes them of what scorers sent."""
        signals, found = self.objective.signals, []
        for k, scores in enumerate(batch.scores):
            weight, rows = (
                per_token(teacher_weight(batch, plan, k), batch.rollout),
                torch.from_numpy(scores.rows),
            )
            if Signal.teacher_hidden in signals:
                found.append(
                    HiddenTeacher(hidden=rows, lm_head=self.mdp.teachers[k].T, weight=weight)
                )
            elif Signal.teacher_vocabulary in signals:
                found.append(VocabularyTeacher(logprobs=rows, weight=weight))
            elif Signal.teacher_support in signals:
                correction, ids = (
                    self.settings.algorithm.topk.correction,
                    torch.from_numpy(scores.support_ids.astype(np.int64)),
                )
                found.append(
                    SupportTeacher(ids=ids, logprobs=rows, weight=weight, correction=correction)
                )
        return tuple(found)

    def batch(self, members: Tensor, source: Source) -> ScoredBatch:
        """What rollout, scorers and rewards would send, in float64; a prompt of one token before
        each response.
        """
        mdp, (groups, k) = self.mdp, members.shape
        at, tokens = self._at(members)
        lengths = mdp.lengths[members.flatten()].numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
        mask = np.ones(offsets[-1], np.bool_)
        mask[offsets[:-1]] = False
        ids = np.zeros(len(mask), np.int32)
        ids[mask] = tokens
        support = (
            self.sampler_support(at, tokens, source)
            if Signal.sampler_support in self.objective.signals
            else torch.zeros(len(at), 0)
        )
        uids = tuple(f"g{g}" for g in range(groups))
        logp = mdp.logp(author(mdp, source))[at, tokens]
        rollout = RolloutBatch(
            uids=uids,
            columns=(COLUMNS,) * groups,
            prompt_texts=("",) * groups,
            group_size=k,
            offsets=offsets,
            input_ids=ids,
            response_mask=mask,
            rollout_logprobs=on_tokens(
                mask, torch.zeros_like(logp) if source is Source.data else logp
            ),
            policy_versions=np.zeros(len(mask), np.int32),
            finish_reasons=(FinishReason.stop,) * (groups * k),
            source=source,
            support_ids=support.numpy().astype(np.int32),
        )
        values = mdp.rewards[members.flatten()].numpy()
        rewards = Rewards(
            uids=uids,
            values=values,
            part_names=("it",),
            parts=values[None],
            errors=np.zeros(len(values), bool),
            keep=np.ones(len(values), bool),
            compressed=np.full(len(values), np.nan),
            repeated=np.full(len(values), np.nan),
        )
        names = self.settings.scored_teachers
        scores = tuple(
            self.scores(name, mdp.teachers[i], rollout, at, tokens) for i, name in enumerate(names)
        )
        return ScoredBatch(rollout=rollout, scores=scores, rewards=rewards)

    def sampler_support(self, at: Tensor, tokens: Tensor, source: Source) -> Tensor:
        """[R, K] the most likely tokens of who wrote the sequence."""
        return author(self.mdp, source)[at].topk(self.settings.algorithm.topk.k).indices

    def scores(
        self, name: str, teacher: Tensor, rollout: RolloutBatch, at: Tensor, tokens: Tensor
    ) -> TokenScores:
        """As a scorer fills them: hidden states here are one-hot prefixes, the teacher's table its
        output head.
        """
        signals, topk, logq = (
            self.objective.signals,
            self.settings.algorithm.topk,
            self.mdp.logp(teacher)[at],
        )
        ids, rows = torch.zeros(len(at), 0), torch.zeros(len(at), 0)
        if Signal.teacher_hidden in signals:
            rows = torch.eye(len(teacher), dtype=teacher.dtype)[at]
        elif Signal.teacher_vocabulary in signals:
            rows = logq
        elif Signal.teacher_support in signals:
            by_teacher = topk.source is SupportSource.teacher
            ids = (
                teacher[at].topk(topk.k).indices
                if by_teacher
                else torch.from_numpy(rollout.support_ids.astype(np.int64))
            )
            rows = logq.gather(1, ids)
        heard = Signal.teacher_logprobs in signals or Signal.teacher_support in signals
        drawn = (
            logq.gather(1, tokens[:, None])[:, 0]
            if heard
            else torch.zeros(len(at), dtype=logq.dtype)
        )
        return TokenScores(
            teacher=name,
            logprobs=on_tokens(rollout.response_mask, drawn),
            rows=rows.numpy(),
            support_ids=ids.numpy().astype(np.int32),
        )

    def _at(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """[R] the prefix before each response token, and the token."""
        chosen = members.flatten()
        mask = self.mdp.mask[chosen]
        return self.mdp.prefixes[chosen][mask], self.mdp.tokens[chosen][mask]


def on_tokens(mask: np.ndarray, rows: Tensor) -> np.ndarray:
    """[T] a per-token column that is 0 outside the responses."""
    column = np.zeros(len(mask), np.float64)
    column[mask] = rows.numpy()
    return column
