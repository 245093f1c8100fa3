"""A rollouter makes one response to one prompt, out of completions that an engine samples for it.

prompt ---> Rollouter.run ---> Trajectory
              |       ^
    token ids |       | Completion
              v       |
               engine
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hybridrl.types import FinishReason, Float, Prompt, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The tokens that the model wrote in one turn, including the end token. engine -> rollouter.

    `finish_reason` is `length` if the response has no room for more tokens (r may be 0 then): the
    rollouter should end the response there. It is never `aborted`.
    """

    token_ids: tuple[int, ...]  # [r]
    logprobs: Float  # [r] from the sampler
    policy_versions: NDArray[np.int32]  # [r] weight version that sampled the token
    support_ids: NDArray[np.int32]  # [r, K] the sampler's most likely tokens, K as in the order
    finish_reason: FinishReason


Sample = Callable[[Sequence[int]], Awaitable[Completion]]
"""A function that continues a sequence of tokens, which begins with those of the prompt, until the
model ends its turn or the response reaches `rollout.max_new_tokens`.

It raises asyncio.CancelledError when the response is aborted, so a rollouter needs no code for that
(`finally` blocks run): the trajectory then has no response and its group is not trained on.
"""


class Rollouter(Protocol):
    """Makes responses. One object makes all responses of an engine; its calls of `run` overlap."""

    async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
        """Make one response to the prompt.

        Each call of `sample` has its own seed, derived from the wave, the prompt, the sample's
        index and the number of the call. `join_turns` makes the trajectory.
        """
        ...


class SingleTurn:
    """The rollouter whose response is one completion of the prompt."""

    async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
        return join_turns(prompt, [await sample(prompt.input_ids)])


def join_turns(prompt: Prompt, turns: Sequence[Completion | Sequence[int]]) -> Trajectory:
    """Join a prompt and the turns that followed it into a trajectory.

    Args:
        turns: in order, Completions, which the model wrote (at least one), and token ids of
            observations, which the model read between its turns.
    """
    completions = [turn for turn in turns if isinstance(turn, Completion)]
    assert completions, f"prompt {prompt.uid}: a response needs at least one completion"
    ids = [turn.token_ids if isinstance(turn, Completion) else turn for turn in turns]
    parts = [np.asarray(part, np.int32) for part in (prompt.input_ids, *ids)]
    sampled = [False, *(isinstance(turn, Completion) for turn in turns)]
    mask = np.repeat(sampled, [len(part) for part in parts])  # [T]
    logprobs = np.zeros(len(mask), np.float32)
    logprobs[mask] = np.concatenate([completion.logprobs for completion in completions])
    versions = np.zeros(len(mask), np.int32)
    versions[mask] = np.concatenate([completion.policy_versions for completion in completions])
    return Trajectory(
        uid=prompt.uid,
        prompt_length=len(prompt.input_ids),
        input_ids=np.concatenate(parts),
        response_mask=mask,
        rollout_logprobs=logprobs,
        policy_versions=versions,
        support_ids=np.concatenate([completion.support_ids for completion in completions]),
        finish_reason=completions[-1].finish_reason,
    )


def aborted_trajectory(prompt: Prompt, support: int) -> Trajectory:
    """A trajectory without a response, which is not trained on.

    Args:
        support: K, the width of `support_ids`.
    """
    no_tokens = Completion(
        token_ids=(),
        logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
        support_ids=np.zeros((0, support), np.int32),
        finish_reason=FinishReason.aborted,
    )
    return join_turns(prompt, [no_tokens])


def cut_response(trajectory: Trajectory, limit: int) -> Trajectory:
    """Cut a trajectory to at most `limit` response tokens, including observations.

    Completions never exceed the limit, so only observations are cut off. A response that was cut
    counts as truncated.
    """
    end = trajectory.prompt_length + limit
    if len(trajectory.input_ids) <= end:
        return trajectory
    mask = trajectory.response_mask[:end]
    return replace(
        trajectory,
        input_ids=trajectory.input_ids[:end],
        response_mask=mask,
        rollout_logprobs=trajectory.rollout_logprobs[:end],
        policy_versions=trajectory.policy_versions[:end],
        support_ids=trajectory.support_ids[: np.count_nonzero(mask)],
        finish_reason=FinishReason.length,
    )
