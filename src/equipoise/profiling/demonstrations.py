"""Demonstrations of a domain: prompts with their answers, given or written by the model itself, as text to profile.

EASY-EP (arXiv:2504.06792) scores experts on 25 prompts of a domain, each with the model's own answer. These are drawn at random
from what is given. Every token of prompt and answer counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.artifacts.files import write_atomic
from equipoise.errors import EquipoiseError, ModelError, TextError
from equipoise.profiling.chats import chat_text
from equipoise.profiling.forward import evaluation_mode
from equipoise.profiling.texts import read_rows

COUNT = 25
"""Demonstrations of a domain, as published."""


@dataclass(frozen=True)
class Demonstration:
    """One prompt with its answer.

    Attributes:
        prompt: what the model is asked, without the marks of a chat.
        answer: what it answers; empty when there is none.
        text: both as the model reads them, a chat template's marks included.
        answered_by: "given", "self" or "none".
    """

    prompt: str
    answer: str
    text: str
    answered_by: str


def read_demonstrations(
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    count: int = COUNT,
    seed: int = 0,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> list[Demonstration]:
    """Draw demonstrations from JSON-lines files, at random, each at most once.

    Args:
        paths: files of one domain; a line's answer is optional.
        tokenizer: its chat template, where it has one, puts its marks around the prompt.
        count: demonstrations to draw; all of them when there are fewer.
        seed: of the draw.
        prompt_field: key of a line that holds the prompt.
        answer_field: key of a line that holds the answer.

    Raises:
        TextError: a file is missing or broken, no line has a prompt, or the number is out of range.
    """
    if count < 1:
        raise TextError(f"{count} demonstrations asked for; give at least 1.")
    rows = read_rows(paths)
    if not any(str(row.get(prompt_field) or "").strip() for row in rows):
        have = ", ".join(sorted({key for row in rows for key in row})) or "none"
        raise TextError(f"no line has a prompt in its field '{prompt_field}'; the fields are: {have}. Choose one of them.")
    rows = [row for row in rows if str(row.get(prompt_field) or "").strip()]
    chosen = np.random.default_rng([seed, 5]).permutation(len(rows))[:count]
    return [_demonstration(tokenizer, str(rows[i][prompt_field]), str(rows[i].get(answer_field) or "")) for i in chosen]


def answer_all(
    model: Any,
    tokenizer: Any,
    demonstrations: Sequence[Demonstration],
    *,
    most_tokens: int = 512,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Demonstration]:
    """Have the model write the answers itself, one prompt after the other.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: of the model.
        demonstrations: whose prompts are answered; answers that they have are not looked at.
        most_tokens: of an answer.
        temperature: of sampling; 0 takes the most likely token.
        top_p: part of the probability that is sampled from.
        seed: of sampling; an answer depends on it and on its prompt's place alone.
        advance: takes (done, total) demonstrations.

    Raises:
        ModelError: the model does not write text after a prompt.
        EquipoiseError: a number out of range.
    """
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ModelError(f"{type(model).__name__} does not continue a prompt, so it cannot write answers; give them instead.")
    if most_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise EquipoiseError(
            f"answers of {most_tokens} tokens at temperature {temperature} and top-p {top_p} cannot be written; give at least "
            "1 token, a temperature of at least 0, and a top-p above 0, at most 1."
        )
    how: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        how |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    device = next(model.parameters()).device
    answered = []
    with evaluation_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for done, asked in enumerate(demonstrations):
            torch.manual_seed(int(np.random.default_rng([seed, 6, done]).integers(2**31)))
            bare = _demonstration(tokenizer, asked.prompt, "")
            inputs = tokenizer(bare.text, return_tensors="pt").to(device)
            ids = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=most_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id, **how,
            )  # fmt: skip
            answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answered.append(Demonstration(asked.prompt, answer, bare.text + answer, "self"))
            advance(done + 1, len(demonstrations))
    return answered


def save_demonstrations(demonstrations: Sequence[Demonstration], path: str | Path) -> None:
    """Write demonstrations as JSON lines whose field `text` is what is profiled; whole or not at all."""
    lines = (json.dumps(asdict(demonstration), ensure_ascii=False) for demonstration in demonstrations)
    write_atomic(path, "\n".join(lines) + "\n")


def token_counts(demonstrations: Sequence[Demonstration], tokenizer: Any) -> tuple[int, int]:
    """Tokens of all texts together, and how many of them are the answers'."""
    texts, answers = (
        sum(len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in parts if part)
        for parts in ([d.text for d in demonstrations], [d.answer for d in demonstrations])
    )
    return texts, answers


def _demonstration(tokenizer: Any, prompt: str, answer: str) -> Demonstration:
    """Prompt and answer as the model reads them: in its chat template, or the answer on the line after the prompt."""
    if getattr(tokenizer, "chat_template", None):
        asked = chat_text(tokenizer, [{"role": "user", "content": prompt}], ask=True)
    else:
        asked = prompt if prompt[-1:].isspace() else f"{prompt}\n"
    return Demonstration(prompt, answer, asked + answer, "given" if answer else "none")
