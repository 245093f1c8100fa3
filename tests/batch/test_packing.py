"""A model whose packed sequences attend to each other is refused; checked on tiny models of many
kinds.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hybridrl.batch.micro_batch import MicroBatch, collate
from hybridrl.batch.packing import check_packing
from hybridrl.core.errors import ConfigError

COMMON = {"vocab_size": 23, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
APART = {
    "llama": LLAMA,
    "gpt_neox": LLAMA,
    "gemma3_text": LLAMA | {"head_dim": 8},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
}
TOGETHER = {
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_head": 4},
    "mamba": {"hidden_size": 32, "state_size": 4},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": LLAMA | {"lru_width": 32, "attention_window_size": 16},
}


def tiny(kind: str, sizes: dict[str, object], dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **COMMON, **sizes)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def check(model: PreTrainedModel) -> None:
    @torch.no_grad()
    def logprobs(sequences: Sequence[MicroBatch]) -> Tensor:
        batch = collate(sequences, packed=True)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        logits = hidden[batch.hidden_rows] @ model.get_output_embeddings().weight.T
        return torch.log_softmax(logits.float(), -1).gather(1, batch.columns.token_ids[:, None])[
            :, 0
        ]

    check_packing(logprobs, vocabulary=23, dtype=model.dtype, model=type(model).__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", APART)
def test_a_model_that_keeps_packed_sequences_apart_is_let_through(kind: str, dtype: torch.dtype):
    check(tiny(kind, APART[kind], dtype))


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_model_whose_second_sequence_depends_on_the_first_is_refused(kind: str):
    model = tiny(kind, TOGETHER[kind], torch.float32)
    with pytest.raises(
        ConfigError, match=rf"{type(model).__name__} does not keep .*; set train\.packing=false"
    ):
        check(model)


def test_a_leak_is_seen_in_bfloat16_too():
    with pytest.raises(ConfigError, match="OPTForCausalLM does not keep"):
        check(tiny("opt", TOGETHER["opt"], torch.bfloat16))


def test_a_model_that_reads_positions_along_the_row_is_refused_although_nothing_leaks():
    model = tiny("gpt2", APART["gpt2"], torch.float32)
    forward = model.base_model.wpe.forward
    model.base_model.wpe.forward = lambda positions: forward(torch.arange(positions.shape[1])[None])
    with pytest.raises(ConfigError, match="GPT2LMHeadModel does not keep"):
        check(model)
