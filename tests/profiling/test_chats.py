"""Chats become the text that the model was trained to read."""

from __future__ import annotations

import pytest

from equipoise.errors import TextError
from equipoise.profiling.chats import chat_text

CHAT = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


@pytest.mark.parametrize("begin", [True, False])
def test_marks_of_the_template_and_one_begin_token_in_all(make_tokenizer, begin):
    tokenizer = make_tokenizer(begin=begin)
    tokenizer.chat_template = TEMPLATE
    text = chat_text(tokenizer, CHAT)
    assert text == ("" if begin else "<begin>") + "<user>who<assistant>me"
    assert list(tokenizer(text)["input_ids"]).count(tokenizer.bos_token_id) == 1
    assert chat_text(tokenizer, CHAT[:1], ask=True).endswith("<user>who<assistant>")


def test_what_no_template_tells_is_refused(make_tokenizer):
    strict = make_tokenizer()
    with pytest.raises(TextError, match="no chat template"):
        chat_text(strict, CHAT)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TextError, match="does not take the chat"):
        chat_text(strict, CHAT)
