"""Tokenizes a response of the data as generation would have produced it, with the end token."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import DataError
from hybridrl.data.tokens import closed, encode, has_unknown


def response_ids(
    text: str,
    prompt: str,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    row: str,
    *,
    templated: bool,
    eos: int | None = None,
) -> tuple[int, ...]:
    """The tokens of `text` after `prompt`; an empty response is the end token alone.

    Prompt and response are tokenized together. If the tokenizer would merge the prompt's last token
    with the response's first, which generation cannot do, the response is tokenized separately.

    Args:
        text: the response; if a template wrote it, with the end of its turn
            (ChatTemplate.response).
        prompt: the text of prompt_ids.
        templated: whether a chat template wrote both.
        eos: as in data.tokens.closed.

    Raises:
        DataError: the tokenizer has no token for a character or no end token, or there is an end
            token inside the response.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(f"{row}: the model's tokenizer has no end token, so a response cannot end")
    ids = _after(prompt, prompt_ids, text, tokenizer, templated)
    response = closed(ids, tokenizer, templated=templated, eos=eos)
    if has_unknown(response[:-1], tokenizer):
        raise DataError(f"{row}: the tokenizer has no token for some character of {text[:80]!r}")
    for end in (response[-1], tokenizer.eos_token_id):
        if end in response[:-1]:
            raise DataError(
                f"{row}: the response {text[:80]!r} holds the end token "
                f"{tokenizer.decode([end])!r} before its end, where generation would have "
                "stopped; remove it from the text, since one is added at the end"
            )
    return response


def _after(
    prompt: str,
    prompt_ids: Sequence[int],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    templated: bool,
) -> list[int]:
    ids = encode(prompt + text, tokenizer, special_tokens=not templated)
    if ids[: len(prompt_ids)] == list(prompt_ids):
        return ids[len(prompt_ids) :]
    return encode(text, tokenizer, special_tokens=False)
