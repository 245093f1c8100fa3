"""Forward passes of the learner without learning: log-probs and values of sampled tokens by its
present weights.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hybridrl.batch.balance import micro_batches
from hybridrl.batch.micro_batch import MicroBatch, collate, unlearned_sequences
from hybridrl.policy.student import Look
from hybridrl.settings.training import TrainConfig
from hybridrl.types import RolloutBatch, ScoredBatch


class ForwardPasses:
    """How the sequences of one rank are divided into forward passes.

    Args:
        idle: one sequence of weight 0, which a rank runs while others still have sequences.
    """

    def __init__(self, train: TrainConfig, idle: MicroBatch) -> None:
        self.train = train
        self.idle = idle

    def divided(self, sequences: Sequence[MicroBatch], count: int = 0) -> list[list[int]]:
        """The indices of the sequences of each pass.

        Args:
            count: fill up with empty passes to exactly this number, which must suffice; 0: as many
                as needed.
        """
        passes = micro_batches(
            [s.num_tokens for s in sequences],
            self.train.max_tokens_per_micro_batch,
            packed=self.train.packing,
        )
        assert not count or len(passes) <= count, (len(passes), count)
        return passes + [[]] * (count - len(passes))

    def collated(self, sequences: Sequence[MicroBatch]) -> MicroBatch:
        """The micro-batch of one forward pass; without sequences, that of the idle sequence."""
        return collate(sequences or [self.idle], packed=self.train.packing)


class LearnerView:
    """The forward passes of one rank. Every method is called on all ranks together, each with its
    own sequences, because ZeRO 3 gathers weights in each pass.
    """

    def __init__(
        self, engine: DeepSpeedEngine, passes: ForwardPasses, device: torch.device
    ) -> None:
        self.engine = engine
        self.passes = passes
        self.device = device

    def with_own_columns(
        self, batches: Sequence[ScoredBatch], num_micro_batches: int
    ) -> list[ScoredBatch]:
        """The batches with log-probs and values by the present weights. This is one more forward
        pass, in the micro-batches of the update.

        Args:
            num_micro_batches: of the update, the same on every rank.
        """
        sequences = [s for batch in batches for s in unlearned_sequences(batch.rollout)]
        logprobs = [torch.empty(0)] * len(sequences)
        values = [torch.empty(0)] * len(sequences)
        for indices in self.passes.divided(sequences, num_micro_batches):
            outputs = self._outputs([sequences[i] for i in indices])
            lengths = [len(sequences[i].hidden_rows) for i in indices]
            parts = [output.cpu()[: sum(lengths)].split(lengths) for output in outputs]
            for i, of_logprobs, of_values in zip(indices, *parts, strict=True):
                logprobs[i] = of_logprobs
                values[i] = of_values
        completed = []
        first = 0
        for batch in batches:
            last = first + batch.rollout.num_sequences
            completed.append(
                replace(
                    batch,
                    learner_logprobs=torch.cat(logprobs[first:last]).numpy(),
                    learner_values=torch.cat(values[first:last]).numpy(),
                )
            )
            first = last
        return completed

    def logprob_gaps(self, batches: Sequence[RolloutBatch]) -> list[float]:
        """Mean |log p(y) - log mu(y)| of each batch's response tokens in nats; NaN without tokens.

        Args:
            batches: those of this rank; ranks may have different numbers of them.
        """
        passes = [
            (batch, [sequences[i] for i in indices])
            for batch, sequences in enumerate(map(unlearned_sequences, batches))
            for indices in self.passes.divided(sequences)
        ]
        idle = self._most_on_a_rank(len(passes)) - len(passes)
        parts: list[list[Tensor]] = [[torch.zeros(0)] for _ in batches]
        for batch, part in passes:
            sampled = torch.cat([s.columns.sampler_logprobs for s in part])
            parts[batch].append((self.logprobs(part) - sampled).abs())
        for _ in range(idle):
            self.logprobs([])
        return [float(torch.cat(of_batch).mean()) for of_batch in parts]

    def logprobs(self, sequences: Sequence[MicroBatch]) -> Tensor:
        """[R] log p of the sequences' response tokens in one forward pass, on CPU."""
        logprobs, _ = self._outputs(sequences)
        return logprobs.cpu()

    def _outputs(self, sequences: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """[R] log-probs and [R] values of one forward pass, on the device; those of the idle
        sequence if there are no sequences.
        """
        micro = self.passes.collated(sequences).to(self.device)
        with torch.no_grad():
            return self.engine(*micro.arguments(), Look.view)

    def _most_on_a_rank(self, count: int) -> int:
        """The largest count of all ranks."""
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)
