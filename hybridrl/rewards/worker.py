"""The worker that computes the rewards of whole prompt groups.

It decodes the responses, calls every reward function and applies `reward.on_error`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hybridrl.core import failpoints
from hybridrl.core.errors import RewardError
from hybridrl.data.route import takes
from hybridrl.models.loading import load_tokenizer
from hybridrl.rewards.pool import LOAD_S, Failure, Outcome, RewardPool, reward_calls
from hybridrl.rewards.repetition import compressed_share, repeated_share
from hybridrl.settings.choices import OnError
from hybridrl.settings.rewards import FUNCTIONS_SHARE, RewardConfig
from hybridrl.types import Bool, FinishReason, Rewards, RolloutBatch, Sample

logger = logging.getLogger(__name__)
MOST_LOGGED = 10  # failures that are logged one by one, per function and batch


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class RewardWorker:
    """Computes rewards with a pool of child processes in which the functions run and can be killed.

    A function of weight 0 is only reported: if it fails, its part is NaN, without other effects.

    Args:
        tokenizer_path: as model.path; its tokenizer decodes the responses.
        watch_only: nothing is learned from the rewards, so a failure neither stops the run nor
            excludes a group.
        deadline_s: of `score`; calls that hang are ended early enough to meet it.
        start_s: deadline of this constructor; functions that take too long to load are refused
            before it.
        eos: as model.eos; a special token, which decoding leaves out.
        device: of the reward models, cpu or cuda.
        load: returns the tokenizer for tokenizer_path, revision and eos.

    Raises:
        ConfigError: a reward function or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer_path: str,
        revision: str | None = None,
        *,
        watch_only: bool,
        deadline_s: float = math.inf,
        start_s: float = LOAD_S,
        eos: str | None = None,
        device: str = "cpu",
        load: Callable[..., Tokenizer] = load_tokenizer,
    ) -> None:
        self.config = config
        self.watch_only = watch_only
        self.tokenizer = load(tokenizer_path, revision, eos=eos)
        calls = reward_calls(config, device)
        # The time for one function, at least one round of tasks. A task may begin just before this
        # time is over and take timeout_s, which is therefore subtracted.
        budget_s = max(
            FUNCTIONS_SHARE * deadline_s / max(len(calls), 1) - config.timeout_s,
            config.timeout_s,
        )
        limits = {
            "timeout_s": config.timeout_s,
            "max_timeouts": config.max_error_rate,
            "budget_s": budget_s,
            "load_s": FUNCTIONS_SHARE * start_s,
        }
        # None: there are no reward functions.
        self.pool = RewardPool(calls, processes=config.processes, **limits) if calls else None

    def ping(self) -> None:
        """Returns once the worker is built, with every function loaded."""

    def score(
        self, batch: RolloutBatch, weights: Sequence[float], only: str | None = None
    ) -> Rewards:
        """The weighted sum of all functions, for each of the N sequences.

        A function that returns None, or whose route does not take the prompt, does not apply to the
        sequence and adds nothing to its sum. A sequence is an error if a function whose weight in
        the settings is not 0 failed on it, or if none of these functions applies to it. Then
        on_error=value gives it `reward.error_value`, and drop_group gives it NaN and excludes the K
        siblings. With watch_only a failed function adds 0, and no group is excluded.

        A cancelled response, whose group is never trained on, reaches no function: its parts are
        NaN, its sum is 0, and it is no error.

        Args:
            weights: [P] the weights of the functions at this step, in the order of
                `config.functions`.
            only: the function that is called, as if there were no others; None: all of them.

        Raises:
            RewardError: a function failed, or none applied, under on_error=fail.
        """
        failpoints.hit("reward.score", uid=batch.uids[0])
        assert len(weights) == len(self.config.functions), (weights, self.config.functions)
        weight_of = {
            name: weight
            for name, weight in zip(self.config.functions, weights, strict=True)
            if only in (None, name)
        }
        names = tuple(weight_of)
        columns = self._columns(batch)
        outcomes = [self._call(name, batch, columns) for name in names]
        shape = (len(names), batch.num_sequences)  # [P, N]
        parts = np.array(
            [[o if isinstance(o, float) else np.nan for o in row] for row in outcomes]
        ).reshape(shape)  # float64
        failed = np.array([[isinstance(o, Failure) for o in row] for row in outcomes], bool)
        failed = failed.reshape(shape)
        counted = np.array([self.config.functions[name].weight != 0 for name in names], bool)  # [P]
        errors = failed[counted].any(axis=0)  # [N]
        if counted.any():
            judged = np.array(
                [reason is not FinishReason.aborted for reason in batch.finish_reasons]
            )
            without = np.isnan(parts[counted]).all(axis=0) & ~errors & judged
            errors |= self._without_value(batch, without, only)
        # A function that does not apply adds 0. If a counted function failed, the sum is
        # meaningless and is replaced below.
        weighted = np.array([*weight_of.values()], float)[counted]
        values = weighted @ np.nan_to_num(parts[counted], nan=0.0)  # [N]
        if not self.watch_only:
            replaced = self.config.error_value if self.config.on_error is OnError.value else np.nan
            values = np.where(errors, replaced, values)
        return Rewards(
            uids=batch.uids,
            values=values.astype(np.float32),
            part_names=names,
            parts=parts.astype(np.float32),
            errors=errors,
            keep=self._kept(errors, batch.group_size),
            compressed=np.array(
                [compressed_share(text) for text in columns["completions"]], np.float32
            ),
            repeated=np.array(
                [repeated_share(ids) for ids in columns["completion_ids"]], np.float32
            ),
        )

    def samples(
        self, batch: RolloutBatch, rewards: Rewards, step: int, count: int
    ) -> tuple[Sample, ...]:
        """The first `count` sequences as text, or all if the batch has fewer."""
        unjudged = rewards.errors | (not rewards.part_names)  # [N]
        return tuple(
            Sample(
                step=step,
                uid=batch.uids[i // batch.group_size],
                prompt=batch.prompt_texts[i // batch.group_size],
                response=self._decode(batch.trajectory(i).response_ids.tolist()),
                reward=float("nan") if unjudged[i] else float(rewards.values[i]),
                finish_reason=batch.finish_reasons[i],
                parts=dict(zip(rewards.part_names, rewards.parts[:, i].tolist(), strict=True)),
            )
            for i in range(min(count, batch.num_sequences))
        )

    def close(self) -> None:
        """Kill the child processes."""
        if self.pool is not None:
            self.pool.close()

    def _columns(self, batch: RolloutBatch) -> dict[str, list[Any]]:
        """The arguments of the functions, lists [N]: those that TRL passes, and prompt_ids.

        A column is None for a problem that lacks it. A completion is all text after the prompt,
        including the observations between two turns of the model.
        """
        trajectories = [batch.trajectory(i) for i in range(batch.num_sequences)]
        ids = [t.response_ids.tolist() for t in trajectories]
        k = batch.group_size
        names = dict.fromkeys(name for columns in batch.columns for name in columns)
        return {
            name: _repeat([columns.get(name) for columns in batch.columns], k) for name in names
        } | {
            "prompts": _repeat(batch.prompt_texts, k),
            "completions": [self._decode(response) for response in ids],
            "completion_ids": ids,
            "prompt_ids": [t.prompt_ids.tolist() for t in trajectories],
        }

    def _call(
        self, name: str, batch: RolloutBatch, columns: Mapping[str, list[Any]]
    ) -> list[Outcome]:
        """The outcomes [N] of one function, None if its route does not take the prompt or the
        response was cancelled. Failures are logged.

        Raises:
            RewardError: a call failed, under on_error=fail.
        """
        assert self.pool is not None
        function = self.config.functions[name]
        routed = [
            i
            for i in range(batch.num_sequences)
            if batch.finish_reasons[i] is not FinishReason.aborted
            and takes(function.route, batch.columns[i // batch.group_size])
        ]
        if not routed:
            return [None] * batch.num_sequences
        columns = {column: [values[i] for i in routed] for column, values in columns.items()}
        if not function.skip_special_tokens:
            texts = [self._decode(ids, skip_special=False) for ids in columns["completion_ids"]]
            columns["completions"] = texts
        called = self.pool.call(name, columns)
        failed = [
            (batch.uids[i // batch.group_size], o)
            for i, o in zip(routed, called, strict=True)
            if isinstance(o, Failure)
        ]
        lines = [
            f"reward.functions.{name} failed on {uid}: {failure.kind}: {failure.text}"
            for uid, failure in failed
        ]
        counts = self.config.functions[name].weight != 0 and not self.watch_only
        if lines and self.config.on_error is OnError.fail and counts:
            raise RewardError(
                f"{lines[0]}; {len(lines)} of {len(called)} calls failed and reward.on_error=fail"
            )
        for line in lines[:MOST_LOGGED]:
            logger.warning(line)
        if len(lines) > MOST_LOGGED:
            logger.warning("reward.functions.%s failed on %d more", name, len(lines) - MOST_LOGGED)
        of_sequence = dict(zip(routed, called, strict=True))
        return [of_sequence.get(i) for i in range(batch.num_sequences)]

    def _without_value(self, batch: RolloutBatch, rows: Bool, only: str | None) -> Bool:
        """Log the sequences to which no function applies, and return `rows`.

        They count as errors, because a reward of 0 would be invented.

        Args:
            rows: [N] True for these sequences.
            only: as in score.

        Raises:
            RewardError: there is such a sequence, under on_error=fail.
        """
        uids = [batch.uids[i // batch.group_size] for i in np.flatnonzero(rows)]
        if not uids:
            return rows
        line = (
            f"no reward function applies to {uids[0]}: each one with a weight other than 0 "
            "returned None for it or has another route"
            if only is None
            else f"reward.functions.{only} does not apply to {uids[0]}: it returned None for it or "
            "has another route"
        )
        if self.config.on_error is OnError.fail and not self.watch_only:
            raise RewardError(f"{line}; {len(uids)} such responses and reward.on_error=fail")
        logger.warning("%s, as for %d of %d responses", line, len(uids), batch.num_sequences)
        return rows

    def _kept(self, errors: Bool, group_size: int) -> Bool:
        """[N] False for all sequences of a group with an error, if such groups are excluded."""
        if self.config.on_error is not OnError.drop_group or self.watch_only:
            return np.ones_like(errors)
        return np.repeat(~errors.reshape(-1, group_size).any(axis=1), group_size)

    def _decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)


def _repeat(per_group: Sequence[Any], k: int) -> list[Any]:
    return [value for value in per_group for _ in range(k)]
