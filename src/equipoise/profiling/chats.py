"""Chats as the text that a model reads: each message between the marks of the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.errors import TextError


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, ask: bool = False) -> str:
    """Write a chat out as its model is trained to read it.

    Args:
        tokenizer: of the model.
        messages: objects with `role` and `content`, in order.
        ask: end with the marks after which the model is to answer.

    Returns:
        The text, without the begin-of-text token where the tokenizer puts one before every row of text anyway.

    Raises:
        TextError: the tokenizer has no chat template, or its template does not take these messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the model's tokenizer has no chat template, which would tell how a chat is written for it; give the chats as text "
            "instead, or put a chat_template.jinja beside the tokenizer."
        )
    try:
        text = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False))
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise TextError(f"the model's chat template does not take the chat ({error}).") from error
    begin = tokenizer.bos_token
    added = begin is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if added else text
