"""lm-eval's Hugging Face model with a mask on every forward pass, so that padding is told from text when load is counted."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.models.huggingface import HFLM

from equipoise.profiling.sequences import Framing

Request = tuple[Any, list[int], list[int]]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log lines and progress bars of lm-eval and what it stands on; errors still raise."""
    names = ("lm_eval", "lm-eval", "datasets", "transformers", "huggingface_hub")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    tqdm, commit = lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash
    # Two that have no switch: the bar over building prompts, and git's complaint outside of a repository.
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash = tqdm, commit
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


class MaskedLM(HFLM):  # type: ignore[misc]
    """A model in memory for lm-eval, with the scores that lm-eval's own wrapper gives.

    lm-eval pads a batch without a mask: right for the scores of a causal model, wrong for counting what experts serve.
    Here every pass carries its mask. Generation runs one prompt at a time, since a sequence that ends before the others
    of its batch is fed padding until they end.

    Args:
        model: a model with an LM head.
        tokenizer: its tokenizer.
        batch_size: sequences of one forward pass of scoring.
        advance: called with the number of requests just done and the number of all requests.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, advance: Callable[[int, int], None]) -> None:
        # lm-eval gives a tokenizer without a padding token one; the caller's stays as it is.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._advance = advance
        self._start = Framing.of(tokenizer, model.config).decoder_start

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate at most: lm-eval's 256, or half of a shorter context."""
        return min(256, int(self.max_length) // 2)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """The score of each request; progress is told to `advance` alone."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """(sum of log likelihoods of the continuation, whether it is the greedy one) of each request, in the given order."""
        # Requests that differ in their last token only (A, B, C, D after one question) are answered by one sequence.
        groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault(self._model_input(context, continuation), []).append(i)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        keys = sorted(groups, key=lambda key: -len(key[0]) - len(key[1]))
        size = override_bs or self.batch_size
        for start in range(0, len(keys), size):
            batch = keys[start : start + size]
            logits_BSV = self._forward(batch)
            for row, key in enumerate(batch):
                end = len(key[1]) or len(key[0])
                for i in groups[key]:
                    target = torch.tensor(requests[i][2], device=logits_BSV.device)
                    log_p = torch.log_softmax(logits_BSV[row, end - len(target) : end], -1, dtype=torch.float32)
                    score = log_p.gather(1, target[:, None]).sum()
                    answers[i] = (float(score), bool((log_p.argmax(-1) == target).all()))
                self._advance(len(groups[key]), len(requests))
        return answers

    def _model_input(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the model reads: (tokens, ()) of a causal model, (encoder's, decoder's tokens) of a seq2seq one."""
        if self.backend == "seq2seq":
            assert self._start is not None, "an encoder-decoder model has a token for its decoder to start with"
            return tuple(context[-self.max_length :]), (self._start, *continuation[:-1])
        return tuple((context + continuation)[-(self.max_length + 1) : -1]), ()

    def _forward(self, batch: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> torch.Tensor:
        ids, mask = self._pad([key[0] for key in batch])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.backend == "seq2seq":
            inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = self._pad([key[1] for key in batch])
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def _pad(self, rows: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        ids = torch.tensor([[*row] + [0] * (length - len(row)) for row in rows], device=self.device)
        mask = torch.arange(length, device=self.device) < torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        return ids, mask.long()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The text generated for each request, one prompt at a time."""
        texts: list[str] = []
        self.batch_size_per_gpu = 1
        for request in requests:
            texts += super().generate_until([request], disable_tqdm=True)
            self._advance(1, len(requests))
        return texts
