"""A small recurrent language model in float64, responses, and the gradient that the production code
computes from them.

The production code runs as in the learner, but in this process: settings, objective, the learner's
view, credit, sequences, micro-batch, student, backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from hybridrl.batch.micro_batch import (
    MicroBatch,
    collate,
    train_sequences,
    unlearned_sequences,
)
from hybridrl.controller.coefficients import Coefficients
from hybridrl.objectives import make_objective
from hybridrl.objectives.credit import Objective, assign_credit
from hybridrl.objectives.head_rule import head_rule
from hybridrl.policy.student import Look, Student
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.teachers.scores import empty_scores, fill_scores
from hybridrl.types import RolloutBatch, ScoredBatch, TokenScores, UpdatePlan
from tests.support.batches import make_batch, make_plan, make_rewards

VOCABULARY = 7
MAX_NEW_TOKENS = 6
MODELS = {"student": (0, 5), "initial": (1, 5), "main": (2, 4), "second": (3, 6)}  # seed and width


class Recurrence(nn.Module):
    """h_t = tanh(W h_{t-1} + e(x_t)), in which padding on the right changes no state before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.mixing = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)

    def forward(
        self, input_ids: Tensor, **_: object
    ) -> SimpleNamespace:  # [B, T] -> last_hidden_state [B, T, H]
        state, states = (
            torch.zeros(len(input_ids), self.mixing.in_features, dtype=self.mixing.weight.dtype),
            [],
        )
        for t in range(input_ids.shape[1]):
            state = torch.tanh(self.mixing(state) + self.embedding(input_ids[:, t]))
            states.append(state)
        return SimpleNamespace(last_hidden_state=torch.stack(states, 1))


class Toy(nn.Module):
    """A model with the parts of a causal language model that the student module and the scorer use,
    and a value head.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        seed, width = MODELS[name]
        torch.manual_seed(seed)
        self.base_model = Recurrence(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.value_head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.lm_head.weight)  # in float32, the dtype in which a head is stored
        self.config = PreTrainedConfig()
        self.double()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.base_model

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        states = self.base_model(input_ids).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states))

    def before(self, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
        """[T, H] the hidden states before each token of one response."""
        return self.base_model(torch.tensor([[*prompt, *ids]])).last_hidden_state[
            0, len(prompt) - 1 : -1
        ]


def gradient_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter by name; zeros if it has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response. In a sequence of them, the responses to one prompt must be adjacent."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    reward: float = 0.0
    source: Source = Source.student
    domain: str = "a"
    keep: bool = True
    drift: tuple[
        float, ...
    ] = ()  # log mu(y) - log p(y) of each token; empty: the sampler is the student


def save_heads(folder: Path) -> None:
    """Write folders with the parts of a teacher's model that the learner reads. A teacher whose
    path is null uses the student's folder.
    """
    for name, of in (("student", "initial"), ("main", "main"), ("second", "second")):
        (folder / name).mkdir()
        LlamaConfig(vocab_size=VOCABULARY).save_pretrained(folder / name)
        save_file(
            {"lm_head.weight": Toy(of).lm_head.weight.detach().float()},
            folder / name / "model.safetensors",
        )


def preset(name: str, folder: Path, *overrides: str) -> RunSettings:
    return load_config(
        [
            "run.dir=here",
            "experiment=quickstart",
            f"algorithm={name}",
            f"model.path={folder}/student",
            f"teachers.main.path={folder}/main",
            f"rollout.max_new_tokens={MAX_NEW_TOKENS}",
            "train.head_chunk=5",
            *overrides,
        ]
    )


def sampler_logprobs(response: Response) -> Tensor:
    """[T] float64 log mu(y): the writer's log-probs plus the drift, or 0 for responses of the data.

    The writer is the student, or the teacher `main` for its own responses.
    """
    if response.source is Source.data:
        return torch.zeros(len(response.ids), dtype=torch.float64)
    writer = Toy("student" if response.source is Source.student else "main")
    with torch.no_grad():
        logprobs = torch.log_softmax(
            writer.lm_head(writer.before(response.prompt, response.ids)), -1
        )
    drawn = logprobs.gather(1, torch.tensor(response.ids)[:, None])[:, 0]
    return drawn + torch.tensor(response.drift or (0.0,) * len(response.ids), dtype=torch.float64)


class Production:
    """Computes the gradient of one preset by the production code.

    Columns are float32 as in a run, or float64 with `wide`, so that only rounding errors of float64
    remain.
    """

    def __init__(self, settings: RunSettings, *, wide: bool) -> None:
        self.settings, self.dtype = settings, np.float64 if wide else np.float32
        self.objective: Objective = make_objective(settings)
        self.model = Toy("student")
        self.with_value = self.objective.needs.learner_values
        self.rule = head_rule(settings)
        self.student = Student(self.model, self.rule, with_value=self.with_value)
        if self.student.value_head is not None:
            self.student.value_head = self.model.value_head

    def gradient(self, responses: Sequence[Response], step: int = 0) -> dict[str, Tensor]:
        """The gradient of each parameter by name. The responses of one source must be adjacent."""
        sources = groupby(responses, lambda r: r.source)
        batches = [self._scored(list(of_source)) for _, of_source in sources]
        plan = self._plan(batches, step)
        if self.objective.needs.learner_view:
            batches = [self._with_own_columns(batch) for batch in batches]
        credits = assign_credit(self.objective, batches, plan)
        dtype = torch.float64 if self.dtype is np.float64 else torch.float32
        inbox = TeacherInbox.load(self.settings, self.objective.needs.evidence, torch.device("cpu"))
        sequences: list[MicroBatch] = []
        for batch, credit in zip(batches, credits, strict=True):
            teachers = inbox.head_inputs(batch, credit.teacher_weights)
            sequences += train_sequences(batch.rollout, credit.learned(dtype), teachers)
        loss, _ = self._forward(collate(sequences), Look.learn)
        loss.backward()
        return gradient_of(self.model)

    # -- rollouts, scores and rewards --------------------------------------------------------------

    def _scored(self, responses: list[Response]) -> ScoredBatch:
        groups = [
            (prompt, list(siblings)) for prompt, siblings in groupby(responses, lambda r: r.prompt)
        ]
        rollout = make_batch([(prompt, [r.ids for r in siblings]) for prompt, siblings in groups])
        rollout = replace(
            rollout,
            columns=tuple({"domain": siblings[0].domain} for _, siblings in groups),
            rollout_logprobs=self._column(
                rollout, torch.cat([sampler_logprobs(r) for r in responses])
            ),
            source=responses[0].source,
        )
        scores = tuple(
            self._scores(name, rollout, responses) for name in self.settings.scored_teachers
        )
        rewards = make_rewards(rollout, [r.reward for r in responses], [r.keep for r in responses])
        return ScoredBatch(rollout=rollout, scores=scores, rewards=rewards)

    @torch.no_grad()
    def _scores(
        self, name: str, rollout: RolloutBatch, responses: Sequence[Response]
    ) -> TokenScores:
        """The scores of a teacher in the form in which the production code sends them."""
        teacher = Toy(name)
        evidence = self.objective.needs.evidence[self.settings.scored_teachers.index(name)]
        kind = torch.from_numpy(np.zeros(0, self.dtype)).dtype
        head = teacher.lm_head.weight.to(kind)
        hidden = torch.cat([teacher.before(r.prompt, r.ids) for r in responses])
        scores = empty_scores(evidence, name, rollout, head)
        rows = np.arange(len(hidden))
        tokens = np.flatnonzero(rollout.response_mask)
        wide = empty_scores(evidence, name, rollout, teacher.lm_head.weight)
        fill_scores(
            wide, evidence, rollout, hidden, teacher.lm_head.weight, self.rule, rows, tokens
        )
        return replace(
            wide,
            logprobs=wide.logprobs.astype(scores.logprobs.dtype),
            rows=wide.rows.astype(scores.rows.dtype),
        )

    def _column(self, rollout: RolloutBatch, values: Tensor) -> np.ndarray:
        column = np.zeros(len(rollout.input_ids), self.dtype)
        column[rollout.response_mask] = values.numpy()
        return column

    def _plan(self, batches: Sequence[ScoredBatch], step: int) -> UpdatePlan:
        keeps = [b.rewards.keep for b in batches]
        settings, weights = self.settings, Coefficients(self.settings)
        groups = [b.rewards.values.reshape(-1, b.rollout.group_size) for b in batches]
        num_complete = sum(
            int(b.rewards.keep.reshape(-1, b.rollout.group_size).all(1).sum()) for b in batches
        )
        # The rewards of a dropped group are NaN, for which the comparison is false.
        num_pairs = sum(int((g.max(1) > g.min(1)).sum()) for g in groups)
        return make_plan(
            batches[0].rollout,
            step=step,
            num_tokens=sum(
                int(b.rollout.response_lengths[k].sum())
                for b, k in zip(batches, keeps, strict=True)
            ),
            num_sequences=sum(int(k.sum()) for k in keeps),
            num_groups=num_pairs if self.objective.needs.pairs else num_complete,
            teacher_weights=weights.teachers(step),
            teacher_routes=tuple(
                settings.teachers[name].route for name in settings.scored_teachers
            ),
            reward_weight=weights.reward(step),
        )

    # -- what the learner does ---------------------------------------------------------------------

    @torch.no_grad()
    def _with_own_columns(self, batch: ScoredBatch) -> ScoredBatch:
        logprobs, values = self._forward(collate(unlearned_sequences(batch.rollout)), Look.view)
        return replace(
            batch,
            learner_logprobs=logprobs.numpy().astype(self.dtype),
            learner_values=values.numpy().astype(self.dtype),
        )

    def _forward(self, micro: MicroBatch, look: Look) -> tuple:
        return self.student(*micro.arguments(), look)
