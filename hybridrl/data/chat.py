"""A conversation as the text that a model reads."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hybridrl.data.template_limits import bounded
from hybridrl.errors import DataError


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    row: str,
    *,
    answered: bool,
) -> str:
    """The model's chat template over `messages`, which end with the answer or ask for one: then the assistant's turn is opened.

    Raises:
        DataError: no chat template, or one that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{row}: the model's tokenizer has no chat template; use text prompts and data.chat_template=false"
        )
    try:
        with bounded(tokenizer.chat_template):
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=not answered
            )
    except (
        Exception
    ) as error:  # templates are programs of the model's author and raise what they like
        raise DataError(f"{row}: the model's chat template refuses it: {error}") from error
    assert isinstance(text, str)
    return text
