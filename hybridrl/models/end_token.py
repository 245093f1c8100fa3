"""The end token of responses that model.eos or teachers.NAME.eos names."""

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError

SHOWN = 8
"""Largest number of special tokens that an error lists."""


def end_token_id(eos: str, tokenizer: PreTrainedTokenizerBase, setting: str) -> int:
    """The id of the special token with this text or this id.

    Example: end_token_id("<eos>", tiny_tokenizer(), "model.eos") and the same with "2" are both 2.

    Args:
        eos: the text or the id of a token.
        setting: how an error names the value, e.g. "model.eos".

    Raises:
        ConfigError: there is no such token, or it is an ordinary one, which a text may contain.
    """
    special = {token_id: str(t) for token_id, t in tokenizer.added_tokens_decoder.items()}
    for token_id, token in special.items():
        if eos == token or (eos.isdecimal() and int(eos) == token_id):
            return token_id
    names = [repr(token) for token in special.values()]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise ConfigError(
        f"{setting}={eos}: is not one of the tokenizer's special tokens, which no text contains; "
        f"give the text or the id of one: {', '.join(names[:SHOWN])}{more}"
    )
