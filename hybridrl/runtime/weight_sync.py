"""Sending weight versions from the learner to every engine."""

from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.choices import WeightTransfer


class WeightSync:
    """Publishes weight versions. An engine serves a version only after every worker in it has
    acknowledged the digest of the bytes.

    consumes the learner's weights / produces engines that serve them / waits for the learner, then
    for the engines.
    """

    def __init__(
        self, learner: LearnerGroup, rollout: RolloutGroup, backend: WeightTransfer
    ) -> None:
        self.learner = learner
        self.rollout = rollout
        self.backend = backend
        # The version that the channel sent last; None: none yet, or an update is under way.
        self.version: int | None = None
        if backend is not WeightTransfer.object_store:
            rollout.fleet.joined = self._send_again

    def publish(self, version: int) -> int:
        """Make every engine serve `version`.

        Returns:
            The bytes that each engine received.

        Raises:
            WeightSyncError: no engine loaded the weights, and some received other bytes or did not
                load all of them.
            WorkerError: an engine failed while nccl or ipc sent weights to it.
        """
        if self.backend is WeightTransfer.object_store:
            manifest, packed = self.learner.pack_weights(version)
            self.rollout.load_weights(manifest, packed)
            return manifest.nbytes
        self.rollout.check()  # NCCL would wait for an engine that has died
        return self._send(version)

    # -- the channel of nccl or ipc ----------------------------------------------------------------

    def _send(self, version: int) -> int:
        """Send to all engines that serve, after admitting those that are ready. The channel is
        reopened whenever an engine was lost or has joined.
        """
        self.version = None  # engines that join from here on get the weights with the others
        self.rollout.fleet.admit()
        if not self.learner.is_connected(self.rollout):
            self.rollout.leave_channel()
            self.rollout.fleet.admit()
            self.learner.connect_engines(self.backend, self.rollout)
        num_bytes = self.learner.send_weights(version)
        self.version = version
        return num_bytes

    def _send_again(self) -> None:
        """Send the last version again after an engine has joined, which has only read the weights
        on disk. Between two updates the learner still has the weights that it sent last.
        """
        if self.version is not None:
            self._send(self.version)
