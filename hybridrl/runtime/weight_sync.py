"""From the learner to every engine: one weight version after another."""

from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.choices import WeightTransfer


class WeightSync:
    """Publishes versions. An engine serves a version only after every worker in it has acknowledged
    the digest of the bytes.

    consumes the learner's weights / produces engines that serve them / waits for the learner, then
    for the engines.
    """

    def __init__(
        self, learner: LearnerGroup, rollout: RolloutGroup, backend: WeightTransfer
    ) -> None:
        self.learner = learner
        self.rollout = rollout
        self.backend = backend
        if backend is not WeightTransfer.object_store:
            learner.connect_engines(backend, rollout)

    def publish(self, version: int) -> int:
        """Make every engine serve `version`.

        Returns:
            The bytes that each engine received.

        Raises:
            WeightSyncError: every engine received other bytes, or did not load all of them.
        """
        if self.backend is WeightTransfer.object_store:
            manifest, packed = self.learner.pack_weights(version)
            self.rollout.load_weights(manifest, packed)
            return manifest.nbytes
        return self.learner.send_weights(version)
