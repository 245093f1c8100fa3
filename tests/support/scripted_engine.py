"""A stand-in for vLLM's engine. In each step it adds one token to every request, which is
determined by a rule, and it records the calls that it receives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, WeightVersionSpan

from hybridrl.rollout.rollouter import Completion, Sample, join_turns
from hybridrl.types import FinishReason, Prompt, Trajectory

END = 2
LONGEST_PROMPT = 20


@dataclass
class Request:
    """A request as the engine received it, and the number of tokens sampled so far."""

    name: str
    token_ids: list[int]
    salt: str
    params: SamplingParams
    arrival_time: float
    priority: int
    sampled: int = 0


class ScriptedEngine:
    """The stand-in. The log-prob of token t is -t / 10; the most likely tokens are always 20, 21,
    ...

    Args:
        rule: returns the response to a prompt's tokens; END ends a turn.
    """

    def __init__(self, rule: Callable[[list[int]], Sequence[int]]) -> None:
        self.rule = rule
        self.requests: list[Request] = []  # all requests that were ever added
        self.running: list[Request] = []
        self.events: list[str] = []  # "add NAME", "step", ..., in the order of the calls
        self.version = "0"
        self.engine_core = SimpleNamespace(call_utility=self.call_core)

    def add_request(
        self,
        request_id: str,
        prompt: TokensPrompt,
        params: SamplingParams,
        arrival_time: float,
        lora_request: None,
        priority: int,
    ) -> None:
        token_ids = prompt["prompt_token_ids"]
        if len(token_ids) > LONGEST_PROMPT:
            raise VLLMValidationError(f"the prompt has {len(token_ids)} tokens")
        salt = prompt["cache_salt"]
        request = Request(request_id, token_ids, salt, params, arrival_time, priority)
        self.requests.append(request)
        self.running.append(request)
        self.events.append(f"add {request_id}")

    def abort_request(self, names: Sequence[str]) -> None:
        self.running = [request for request in self.running if request.name not in names]
        self.events += [f"abort {name}" for name in names]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def reset_prefix_cache(self) -> None:
        self.events.append("reset prefixes")

    def set_weight_version(self, version: str) -> None:
        self.version = version
        self.events.append(f"version {version}")

    def call_core(self, method: str, *args: object) -> None:
        self.events.append(method)

    def step(self) -> list[SimpleNamespace]:
        self.events.append("step")
        finished = []
        for request in self.running:
            request.sampled += 1
            tokens = list(self.rule(request.token_ids))[: request.sampled]
            if tokens[-1] == END or len(tokens) == request.params.max_tokens:
                output = self.output(tokens, request.params.logprobs)
                finished.append(SimpleNamespace(request_id=request.name, outputs=[output]))
        ended = {output.request_id for output in finished}
        self.running = [request for request in self.running if request.name not in ended]
        return finished

    def output(self, tokens: list[int], support: int) -> CompletionOutput:
        likely = list(range(20, 20 + support))
        flat = FlatLogprobs(
            token_ids=[entry for token in tokens for entry in (token, *likely)],
            logprobs=[-entry / 10 for token in tokens for entry in (token, *likely)],
        )
        return CompletionOutput(
            index=0,
            text="",
            token_ids=tokens,
            cumulative_logprob=None,
            logprobs=flat,
            finish_reason="stop" if tokens[-1] == END else "length",
            weight_versions=[WeightVersionSpan(version=self.version, start=0, end=len(tokens))],
        )


class TwoTurns:
    """A rollouter in which the model answers, reads an observation, and answers again, unless its
    first answer was cut off.
    """

    def __init__(self, observation: Sequence[int]) -> None:
        self.observation = tuple(observation)

    async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
        turns: list[Completion | Sequence[int]] = [await sample(prompt.input_ids)]
        if turns[0].finish_reason is FinishReason.stop:
            read = (*prompt.input_ids, *turns[0].token_ids, *self.observation)
            turns += [self.observation, await sample(read)]
        return join_turns(prompt, turns)
