"""What an objective needs from the other workers, and from the learner before its update."""

from dataclasses import dataclass

from hybridrl.teachers.evidence import Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one objective needs. Example: the preset raft has Needs(rewards=True)."""

    evidence: tuple[Evidence, ...] = ()  # of each scored teacher
    rewards: bool = False
    siblings: bool = False  # several responses to each prompt, which it compares
    pairs: bool = False  # groups with a best and a worst response, over which its loss is averaged
    learner_logprobs: bool = False  # log p(y_t) before each update: one more forward pass
    learner_values: bool = False  # the value head's outputs before each update, in the same pass
    old_logprobs: bool = False  # log p(y_t) before a batch's first update: one pass over the batch

    @property
    def learner_view(self) -> bool:
        """Whether the learner runs a forward pass before each update."""
        return self.learner_logprobs or self.learner_values

    @property
    def sampler_support(self) -> int:
        """How many of its most likely tokens the sampler must send with each token; 0: none."""
        return max((e.sampler_support for e in self.evidence), default=0)
