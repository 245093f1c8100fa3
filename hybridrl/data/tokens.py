"""Text as token ids, with each special token where generation would have it and as often."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> list[int]:
    """The ids of `text`, ready to be continued: no token that the tokenizer itself would add stands
    at its end.

    Args:
        special_tokens: the tokenizer puts its own before the text. A template writes its special
            tokens itself. A first token that the text brings already is not repeated.
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

    Where the unknown token serves as another special token too, this cannot be seen; such
    tokenizers know every byte.
    """
    unknown = tokenizer.unk_token_id
    return unknown in ids and unknown not in (
        None,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def closed(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, templated: bool
) -> tuple[int, ...]:
    """A response that ends with one end token: the special token with which a template ends the
    turn, else the tokenizer's.

    Args:
        ids: of the response; white space may follow the template's end token, and is cut off with
            it.
        templated: a template wrote the response.
    """
    end = _end_of_turn(ids, tokenizer) if templated else None
    if end is None:
        last = tokenizer.eos_token_id
        body = list(ids)
    else:
        last = ids[end]
        body = list(ids[:end])
    while body and body[-1] == last:  # the data's own text may hold it too
        body.pop()
    return (*body, last)


def _end_of_turn(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = {
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    positions = [i for i, token_id in enumerate(ids) if token_id in special]
    if not positions or tokenizer.decode(ids[positions[-1] + 1 :]).strip():
        return None
    # After white space another token is the end of the whole conversation, as in "<|end|>\n<eos>".
    end = positions.pop()
    while positions and end - positions[-1] > 1:
        if tokenizer.decode(ids[positions[-1] + 1 : end]).strip():
            break
        end = positions.pop()
    return end
