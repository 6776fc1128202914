"""Demonstrations: drawn at random, with the answers given or the model's own."""

from __future__ import annotations

import json

import pytest

from equipoise.errors import EquipoiseError, TextError
from equipoise.profiling.demonstrations import (
    answer_all,
    read_demonstrations,
    save_demonstrations,
    token_counts,
)
from equipoise.profiling.texts import read_documents


@pytest.fixture
def file(tmp_path):
    lines = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(40)] + [{"other": 1}, {"prompt": " "}]
    path = tmp_path / "math.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_as_many_as_asked_for_are_drawn_and_not_the_first(file, tokenizer):
    found = read_demonstrations([file], tokenizer)
    assert len({d.prompt for d in found}) == len(found) == 25
    assert [d.prompt for d in found] != [f"question {i}" for i in range(25)]
    assert found == read_demonstrations([file], tokenizer)
    assert found != read_demonstrations([file], tokenizer, seed=1)
    assert len(read_demonstrations([file], tokenizer, count=99)) == 40
    assert all(d.text == f"{d.prompt}\n{d.answer}" and d.answered_by == "given" for d in found)


def test_a_chat_template_puts_its_marks_around_the_prompt_once(file, make_tokenizer):
    chat = make_tokenizer(begin=True)
    chat.chat_template = "{{ bos_token }}<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    text = read_demonstrations([file], chat, count=1)[0].text
    number = text.split("</u>")[0].removeprefix("<u>question ")
    assert text == f"<u>question {number}</u><a>answer {number}"


def test_the_model_answers_itself_and_its_tokens_are_counted(file, make_model, tokenizer, tmp_path):
    model = make_model("mixtral")
    asked = read_demonstrations([file], tokenizer, count=3)
    answered = answer_all(model, tokenizer, asked, most_tokens=6, seed=1)
    assert [d.prompt for d in answered] == [d.prompt for d in asked]
    assert all(d.answered_by == "self" and d.answer not in ("", a.answer) for d, a in zip(answered, asked, strict=True))
    assert answered == answer_all(model, tokenizer, asked, most_tokens=6, seed=1)
    assert answered != answer_all(model, tokenizer, asked, most_tokens=6, seed=2)
    greedy = [answer_all(model, tokenizer, asked, most_tokens=6, temperature=0.0, seed=s) for s in (1, 2)]
    assert greedy[0] == greedy[1]
    tokens, of_answers = token_counts(answered, tokenizer)
    assert 0 < of_answers < tokens
    save_demonstrations(answered, tmp_path / "demos.jsonl")
    assert read_documents([tmp_path / "demos.jsonl"]) == [d.text for d in answered]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "0 demonstrations asked for"),
        ({"prompt_field": "question"}, "no line has a prompt in its field 'question'; the fields are: answer, other, prompt"),
    ],
)
def test_what_cannot_be_read_is_refused(file, tokenizer, options, message):
    with pytest.raises(TextError, match=message):
        read_demonstrations([file], tokenizer, **options)


def test_files_and_models_that_will_not_do_are_refused(file, make_model, tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(TextError, match=r"does not end in \.jsonl"):
        read_demonstrations([tmp_path / "x.txt"], tokenizer)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(TextError, match="line 2 is a JSON list"):
        read_demonstrations([tmp_path / "bad.jsonl"], tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TextError, match="no lines in"):
        read_demonstrations([tmp_path / "empty.jsonl"], tokenizer)
    asked = read_demonstrations([file], tokenizer, count=1)
    with pytest.raises(EquipoiseError, match="does not continue a prompt"):
        answer_all(make_model("switch"), tokenizer, asked)
    with pytest.raises(EquipoiseError, match="at temperature -1"):
        answer_all(make_model("mixtral"), tokenizer, asked, temperature=-1)
