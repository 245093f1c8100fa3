"""The engine of `hybridrl chat`, which answers one prompt after the other and yields each piece of
text as soon as it is sampled.
"""

from collections.abc import Generator, Sequence
from functools import partial
from itertools import count

from hybridrl.core.errors import DataError
from hybridrl.rollout.engine import engine_args, start_engine, stop_token_ids
from hybridrl.rollout.vllm_internals import refusals
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings


class ChatEngine:
    """Answers one prompt at a time.

    Example:
        for piece in ChatEngine(settings, model, "cpu").answer([1, 15, 9], temperature=0.0, seed=0):
            print(piece, end="", flush=True)

    Args:
        settings: settings of the engine.
        model: the weights that the engine loads.
        device: cpu or cuda.
    """

    def __init__(self, settings: RunSettings, model: ModelConfig, device: str) -> None:
        backend = str(WeightTransfer.object_store)  # no weights arrive
        self.engine, _ = start_engine(
            partial(engine_args, settings, model, device, backend),
            own_process=settings.rollout.tensor_parallel > 1,
        )
        self.max_new_tokens = settings.rollout.response_limit
        self.stop_token_ids = stop_token_ids(model)
        self._requests = count()

    def answer(self, token_ids: Sequence[int], *, temperature: float, seed: int) -> Generator[str]:
        """Sample a response; yields each piece of its text, without special tokens. Closing the
        iterator before its end stops the sampling.

        Args:
            token_ids: the tokens of the prompt.
            temperature: 0: always take the most likely token.

        Raises:
            DataError: the engine refuses the prompt.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            max_tokens=self.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            seed=None if temperature == 0 else seed,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"chat/{next(self._requests)}"
        try:
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=list(token_ids)), params)
        except refusals() as error:
            raise DataError(f"the conversation: {error}") from error
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    yield output.outputs[0].text
        finally:
            self.engine.abort_request([name])  # does nothing to one that is finished
