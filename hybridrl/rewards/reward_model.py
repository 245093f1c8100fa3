"""A trained reward model as a reward function.

It computes the score that algorithm=reward_model trains (Bradley-Terry): the exported value head,
w, at the last hidden state before the response's last token. In training, a token's value comes
from the state that predicts the token (batch.micro_batch), and the score is the last token's value
(objectives.pairs), so the model never reads the last token.

    P0 P1 | A0 A1 EOS      score = w . h(P0 P1 A0 A1), the state at A1

Scores are computed in float32, on the CPU or, with reward.gpus, on a GPU. For a model that was
trained in bfloat16 they do not have the rounding of its forward pass, unless `dtype` is bfloat16
too.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hybridrl.batch.balance import micro_batches
from hybridrl.core.errors import ConfigError
from hybridrl.models.loading import load_model, load_tokenizer, load_value_head

if TYPE_CHECKING:  # child processes import this module and must not load Hydra
    from hybridrl.settings.rewards import RewardConfig

MAX_TOKENS = 8192  # padded tokens of one forward pass


class RewardModel:
    """A reward model, loaded once and then called with columns.

    Example: RewardModel("runs/rm/export/step_000100")(prompt_ids=[[1, 5]], completion_ids=[[7, 8,
    2]]) returns [0.31...].

    Args:
        path: the folder that a run with algorithm=reward_model exported.
        dtype: of the model's body, float32 or bfloat16; the value head is in float32.
        device: cpu or cuda; in a run, by reward.gpus.

    Raises:
        ConfigError: there is no such folder, or no model or value head in it.
    """

    def __init__(self, path: str, dtype: str = "float32", device: str = "cpu") -> None:
        self.device = torch.device(device)
        head = load_value_head(path, setting="options.path")  # [1, H] float32
        self.value_head = head.to(self.device)
        body = load_model(path, dtype, setting="options.path").base_model
        self.body = body.to(self.device)

    @torch.no_grad()
    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        """One score per sequence, [N].

        Raises:
            ValueError: a response has no tokens, so it has no score.
        """
        if not all(completion_ids):
            raise ValueError("a response without tokens has no score")
        inputs = [  # each [T] int64, without the last token
            torch.tensor([*prompt, *completion][:-1])
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        scores = torch.zeros(len(inputs))  # [N] float32
        for batch in micro_batches([len(ids) for ids in inputs], MAX_TOKENS):
            lengths = torch.tensor([len(inputs[i]) for i in batch])
            rows = [inputs[i] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, T] int64
            mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
            output = self.body(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=False,
            )
            states = output.last_hidden_state  # [B, T, H]
            last = states[torch.arange(len(batch)), lengths - 1].float()  # [B, H]
            scores[batch] = (last @ self.value_head[0]).cpu()
        return scores.tolist()


def check_reward_models(config: "RewardConfig", vocabulary: Mapping[str, int]) -> None:
    """Refuse a reward model whose tokenizer differs from the student's.

    loaded_rewards must have loaded the reward model before, so its folder exists.

    Args:
        vocabulary: of the student's tokenizer.

    Raises:
        ConfigError: the reward model's tokenizer has another vocabulary.
    """
    for name, function in config.functions.items():
        if function.function != "reward_model":
            continue
        setting = f"reward.functions.{name}.options.path"
        path = function.options["path"]
        if load_tokenizer(path, setting=setting).get_vocab() != vocabulary:
            raise ConfigError(
                f"{setting}={path}: its vocabulary differs from that of model.path, whose tokens "
                "it would score; train the reward model with the same tokenizer"
            )
