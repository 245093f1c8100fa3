"""A user's class of student weights, as hybridrl/weights/README.md shows it."""

from torch import nn

from hybridrl.weights.parameters import FullFineTuning


class FrozenEmbedding(FullFineTuning):
    """Trains all weights but the input embedding and an output head that is tied to it."""

    def trained(self) -> dict[str, nn.Parameter]:
        frozen = self.model.get_input_embeddings().weight
        return {name: p for name, p in super().trained().items() if p is not frozen}
