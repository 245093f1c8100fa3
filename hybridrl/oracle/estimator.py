"""Runs the production code on enumerated sequences: objective, head rule, teachers and head pass.

All values are float64.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import collate, train_sequences
from hybridrl.controller.coefficients import Coefficients
from hybridrl.kernels.head import hybrid_head_loss
from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Credit, assign_credit
from hybridrl.objectives.head_rule import head_rule
from hybridrl.oracle.exact import author
from hybridrl.oracle.mdp import Mdp
from hybridrl.settings.choices import Source
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.teachers.scores import empty_scores, fill_scores
from hybridrl.types import FinishReason, Rewards, RolloutBatch, ScoredBatch, TokenScores, UpdatePlan

COLUMNS = {"domain": "here"}
"""The columns of every prompt, for the routes of teachers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The input of the head pass: R response tokens of B groups of K sequences."""

    prefixes: Tensor  # [R] int64
    columns: TokenColumns
    teachers: tuple[Teacher, ...]
    group: Tensor  # [R] int64, the group of each token


class Estimator:
    """The gradient of one configuration, computed by the production code.

    Tests override single methods to show that the oracle detects a wrong gradient.
    """

    def __init__(self, settings: RunSettings, mdp: Mdp, values: Tensor | None = None) -> None:
        """
        Args:
            values: [P] outputs of the value head; None: those of the MDP, which are random.
        """
        self.settings = settings
        self.mdp = mdp
        self.values = mdp.values if values is None else values
        self.objective = make_objective(settings)
        self.rule = head_rule(settings)
        self.weights = Coefficients(settings)
        heads = [teacher.T for teacher in mdp.teachers]
        self.inbox = TeacherInbox(
            self.objective.needs.evidence,
            [
                head if evidence.needs_head else None
                for evidence, head in zip(self.objective.needs.evidence, heads, strict=False)
            ],
            vocabulary=mdp.student.shape[1],
        )

    def rows(self, members: Tensor, source: Source) -> Rows:
        """The rows of B groups. Each group is a global batch of its own, and all have the same
        number of tokens.

        Args:
            members: [B, K] indices of sequences.
        """
        batch = self.batch(members, source)
        plan = self.plan(int(self.mdp.lengths[members[0]].sum()), members.shape[1])
        credit = self.credit(batch, plan, members)
        teachers = self.inbox.head_inputs(batch, credit.teacher_weights)
        sequences = train_sequences(batch.rollout, credit.learned(torch.float64), teachers)
        micro = collate(sequences, packed=True)
        mask = self.mdp.mask[members.flatten()]
        return Rows(
            prefixes=self.mdp.prefixes[members.flatten()][mask],
            columns=micro.columns,
            teachers=micro.teachers,
            group=micro.owner // members.shape[1],
        )

    def loss(self, hidden: Tensor, lm_head: Tensor, rows: Rows, columns: TokenColumns) -> Tensor:
        """The loss [] of the head pass, for hidden states [R, H] and an output head [V, H]."""
        return hybrid_head_loss(hidden, lm_head, rows.teachers, columns, self.rule)[0]

    def plan(self, num_tokens: int, num_sequences: int) -> UpdatePlan:
        """The plan of the first step, as the controller makes it."""
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
        """The objective's coefficients of the batch's tokens."""
        at, tokens = self._at(members)
        if self.objective.needs.learner_view:
            batch = replace(
                batch,
                learner_logprobs=self.mdp.logp(self.mdp.student)[at, tokens].numpy(),
                learner_values=self.values[at].numpy(),
            )
        if self.objective.needs.old_logprobs:
            old = self.mdp.logp(self.mdp.old)[at, tokens]
            batch = replace(batch, old_logprobs=old.numpy())
        assert not self.objective.standardises or len(members) == 1, (
            "a standardised batch is measured alone"
        )
        return assign_credit(self.objective, [batch], plan)[0]

    def batch(self, members: Tensor, source: Source) -> ScoredBatch:
        """The batch that rollout, scorers and rewards would send, in float64."""
        rollout = self.rollout(members, source)
        values = self.mdp.rewards[members.flatten()].numpy()
        rewards = Rewards(
            uids=rollout.uids,
            values=values,
            part_names=("it",),
            parts=values[None],
            errors=np.zeros(len(values), bool),
            keep=np.ones(len(values), bool),
            compressed=np.full(len(values), np.nan),
            repeated=np.full(len(values), np.nan),
        )
        at, _ = self._at(members)
        names = self.settings.scored_teachers
        scores = tuple(
            self.scores(name, self.mdp.teachers[i], evidence, rollout, at)
            for i, (name, evidence) in enumerate(
                zip(names, self.objective.needs.evidence, strict=True)
            )
        )
        return ScoredBatch(rollout=rollout, scores=scores, rewards=rewards)

    def rollout(self, members: Tensor, source: Source) -> RolloutBatch:
        """The sequences as an engine would send them, each with a prompt of one token."""
        mdp = self.mdp
        groups, k = members.shape
        at, tokens = self._at(members)
        lengths = mdp.lengths[members.flatten()].numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
        mask = np.ones(offsets[-1], np.bool_)
        mask[offsets[:-1]] = False
        ids = np.zeros(len(mask), np.int32)
        ids[mask] = tokens
        support = self.sampler_support(at, tokens, source)
        logp = mdp.logp(author(mdp, source))[at, tokens]
        return RolloutBatch(
            uids=tuple(f"g{g}" for g in range(groups)),
            columns=(COLUMNS,) * groups,
            prompt_texts=("",) * groups,
            prompt_lengths=(1,) * groups,
            teacher_prompts=({},) * groups,
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

    def sampler_support(self, at: Tensor, tokens: Tensor, source: Source) -> Tensor:
        """[R, K] the most likely tokens of the policy that wrote the sequences, as an engine sends
        them.
        """
        return author(self.mdp, source)[at].topk(self.objective.needs.sampler_support).indices

    def scores(
        self, teacher: str, table: Tensor, evidence: Evidence, rollout: RolloutBatch, at: Tensor
    ) -> TokenScores:
        """The scores that a scorer would send.

        Args:
            table: [P, V] the teacher's logits at each prefix.
            at: [R] the prefix before each response token.
        """
        head = table.T
        scores = empty_scores(evidence, teacher, rollout, head)
        fill_scores(
            scores,
            evidence,
            rollout,
            torch.eye(len(table), dtype=table.dtype)[at],
            head,
            self.rule,
            np.arange(len(at)),
            np.flatnonzero(rollout.response_mask),
        )
        return scores

    def _at(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """[R] the prefix before each response token, and [R] the token."""
        chosen = members.flatten()
        mask = self.mdp.mask[chosen]
        return self.mdp.prefixes[chosen][mask], self.mdp.tokens[chosen][mask]


def on_tokens(mask: np.ndarray, rows: Tensor) -> np.ndarray:
    """[T] a column over all tokens: `rows` at the response tokens of `mask`, 0 elsewhere."""
    column = np.zeros(len(mask), np.float64)
    column[mask] = rows.numpy()
    return column
