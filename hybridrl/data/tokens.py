"""Converts text to token ids, with the special tokens that generation would have."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> list[int]:
    """The ids of `text`, without special tokens that the tokenizer adds at the end, so that the
    text can be continued.

    Args:
        special_tokens: the tokenizer adds its special tokens before the text, unless the text has
            them already. False for the output of a template, which writes them itself.
    """
    if not special_tokens:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    added = encoded["special_tokens_mask"]
    length = len(ids)
    while length > 1 and added[length - 1]:
        length -= 1
    if length > 1 and added[0] and ids[0] == ids[1]:
        return ids[1:length]
    return ids[:length]


def has_unknown(ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether some character had no token.

    If <unk> is also another special token, this cannot be determined and the answer is False; such
    tokenizers are byte-level and never emit it.
    """
    unknown = tokenizer.unk_token_id
    return unknown in ids and unknown not in (
        None,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def closed(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    templated: bool,
    eos: int | None = None,
) -> tuple[int, ...]:
    """A response that ends with exactly one end token.

    The end token is the special token with which a template ends the turn, else the tokenizer's.

    Args:
        ids: the response; white space after the template's end token is removed.
        templated: a template wrote the response.
        eos: model.eos, which is then the end token instead of both; None: it is not set.
    """
    end = _end_of_turn(ids, tokenizer) if templated else None
    body = list(ids[:end])
    last = tokenizer.eos_token_id if end is None else ids[end]
    if eos is not None:
        last = eos
    while body and body[-1] == last:  # the text of the data may already contain it
        body.pop()
    return (*body, last)


def _end_of_turn(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    positions = [i for i, token_id in enumerate(ids) if token_id in special]
    if not positions or not _is_space(ids[positions[-1] + 1 :], tokenizer):
        return None
    # In "<|end|>\n<eos>", <eos> ends the whole conversation and <|end|> the turn.
    end = positions.pop()
    while positions and end - positions[-1] > 1:
        if not _is_space(ids[positions[-1] + 1 : end], tokenizer):
            break
        end = positions.pop()
    return end


def _is_space(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str), "of one sequence"
    return not text.strip()
