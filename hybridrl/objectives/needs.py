"""What an objective needs from the other workers, and from the learner before its update."""

from dataclasses import dataclass

from hybridrl.teachers.evidence import Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Example: the reward alone, as GRPO without a reference: Needs(rewards=True)."""

    evidence: tuple[Evidence, ...] = ()  # of each scored teacher
    rewards: bool = False
    siblings: bool = False  # it compares the responses to one prompt
    pairs: bool = False  # its loss is averaged over groups with a best and a worst response
    learner_logprobs: bool = False  # log p(y_t) before each update: one more forward pass
    learner_values: bool = False  # the value head's outputs before each update: likewise
    old_logprobs: bool = False  # log p(y_t) before a batch's first update: one pass over the batch

    @property
    def learner_view(self) -> bool:
        """Whether the learner runs a forward pass before its update."""
        return self.learner_logprobs or self.learner_values

    @property
    def sampler_support(self) -> int:
        """How many of its most likely tokens the sampler sends with each token; 0: none."""
        return max((e.sampler_support for e in self.evidence), default=0)
