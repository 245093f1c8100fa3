"""A given response as the tokens that generation would have made: what follows the prompt's tokens, the end token last."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybridrl.data.chat import render
from hybridrl.errors import DataError


def response_ids(
    response: str,
    messages: Sequence[dict[str, Any]] | None,
    prompt: str,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    row: str,
) -> tuple[int, ...]:
    """Tokens of `response` after `prompt`; an empty response is the end token alone.

    Prompt and response together are the tokenization of the whole text, as far as the template writes it before its
    end token. Where a tokenizer would merge the prompt's last token with the response's first, which no generation
    can do, the response is tokenized by itself.

    Args:
        messages: the prompt as a conversation; None: plain text, closed by the tokenizer's end token.
        prompt: the text that became prompt_ids.

    Raises:
        DataError: a character without a token, or a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{row}: the model's tokenizer has no end token, so a response cannot end")
    whole = prompt + response
    if messages is not None:
        answered = render(
            [*messages, {"role": "assistant", "content": response}], tokenizer, row, answered=True
        )
        # A template may open a turn with text that it leaves out of answered ones; then the response itself follows.
        whole = answered if answered.startswith(prompt) else whole
    ids = _after(prompt, prompt_ids, whole, tokenizer, special_tokens=messages is None)
    ids = _closed(ids, tokenizer) if messages is not None else [*ids, tokenizer.eos_token_id]
    if has_unknown(ids[:-1], tokenizer):
        raise DataError(
            f"{row}: the tokenizer has no token for some character of {response[:80]!r}"
        )
    return tuple(ids)


def has_unknown(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a character had no token. Where that token is one that a template writes too, nobody can tell, and such tokenizers know
    every byte."""
    unknown = tokenizer.unk_token_id
    return unknown in ids and unknown not in (
        None,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def _after(
    prompt: str,
    prompt_ids: Sequence[int],
    whole: str,
    tokenizer: PreTrainedTokenizerBase,
    special_tokens: bool,
) -> list[int]:
    ids = tokenizer(whole, add_special_tokens=special_tokens)["input_ids"]
    if ids[: len(prompt_ids)] == list(prompt_ids):
        return ids[len(prompt_ids) :]
    return tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to the special token that ends the turn, which only white space may follow; without one, the end token is added."""
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    last = max((i for i, token_id in enumerate(ids) if token_id in special), default=None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        return [*ids, tokenizer.eos_token_id]
    return ids[: last + 1]
