"""Student and teacher compared at each token of a few responses of a batch, for the report.

The student runs no pass for this: log pi is the sampler's, and log q comes from what the teacher
sent.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridrl.batch.groups import select_groups
from hybridrl.batch.views import response_ids
from hybridrl.data.route import takes
from hybridrl.kernels.head import HeadRule
from hybridrl.settings.choices import Source
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.types import ScoredBatch, TokenSample, UpdatePlan


def token_samples(
    batches: Sequence[ScoredBatch],
    inbox: TeacherInbox,
    rule: HeadRule,
    tokenizer: PreTrainedTokenizerBase,
    plan: UpdatePlan,
    count: int,
) -> tuple[TokenSample, ...]:
    """The first response to each of the first `count` prompts that the student answered and a
    teacher scored. Each is compared with the first teacher that scores its prompt.

    Args:
        batches: the batches of this rank.
        plan: of their mini-batch.
    """
    samples: list[TokenSample] = []
    for batch in batches:
        if batch.rollout.source is not Source.student:
            continue
        for group, columns in enumerate(batch.rollout.columns):
            scoring = [i for i, route in enumerate(plan.teacher_routes) if takes(route, columns)]
            if len(samples) < count and scoring:
                chosen = select_groups(batch, [group])
                samples.append(
                    _sample(chosen, inbox, scoring[0], rule, tokenizer, step=plan.step + 1)
                )
    return tuple(samples)


def _sample(
    batch: ScoredBatch,
    inbox: TeacherInbox,
    teacher: int,
    rule: HeadRule,
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
) -> TokenSample:
    """The first response of a batch compared with one of its teachers."""
    rollout = batch.rollout
    scores = batch.scores[teacher]
    length = int(rollout.response_lengths[0])
    mask = rollout.response_mask
    ids = response_ids(rollout)[:length]
    log_q = scores.logprobs[mask][:length]
    evidence = inbox.evidence[teacher]
    rebuilt = evidence.drawn_logprobs(scores.rows[:length], ids, inbox.heads[teacher], rule)
    if rebuilt is not None:
        log_q = rebuilt.float().numpy()
    ratios = rollout.rollout_logprobs[mask][:length] - log_q
    return TokenSample(
        step=step,
        uid=rollout.uids[0],
        prompt=rollout.prompt_texts[0],
        teacher=scores.teacher,
        tokens=tuple(str(tokenizer.decode([token])) for token in ids.tolist()),
        log_ratios=tuple(np.asarray(ratios, np.float64).tolist()),
        reward=float("nan") if batch.rewards.errors[0] else float(batch.rewards.values[0]),
    )
