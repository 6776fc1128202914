"""What a trained model is worth as a fixture: beside a trigram and a dense model, its balance, and which experts matter.

All on held-out text, on the weights as they are stored. Shapes: D domains, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import spearmanr

from equipoise.artifacts.evaluation import Interval
from equipoise.evaluation.statistics import perplexity_change
from equipoise.lab.recipe import Recipe
from equipoise.lab.rows import RowOrder, heldout_rows
from equipoise.lab.text import Stream
from equipoise.lab.trigram import Trigram
from equipoise.lab.watch import HeldOut, measure
from equipoise.metrics import jensen_shannon
from equipoise.profiling.calibrate import profile
from equipoise.profiling.sequences import Framing, Rows
from equipoise.reporting.numbers import percent, span_text

ROWS = 64
"""Held-out rows of each domain that models are judged on."""


class Judgement(BaseModel):
    """Measured on held-out text.

    Attributes:
        tokens: scored.
        perplexity, domain_perplexity: of the model as stored.
        trigram_perplexity, trigram_domain_perplexity: of a Kneser-Ney trigram model of the same training rows.
        beside_trigram: relative difference of the two perplexities, with its 95 % interval over rows.
        dense_perplexity: of the dense model of equal active size, on the same tokens; None when it was not given.
        active_parameters, dense_parameters: of a token's way through the model without embeddings, and of the dense model's.
        parameters: of the whole model.
        lis, domain_lis: mean over layers of the LIS over experts, of all domains together and of each.
        lis_by_layer: of all domains together.
        divergence: mean over layers and pairs of domains of the Jensen-Shannon divergence between their loads, in bits.
        divergence_max: of the two domains that differ most, mean over layers; `divergence_pair` names them.
        importance_correlation: mean over layers of Spearman's correlation between the loss without an expert and its load;
            a layer where one of the two is the same for all experts has none.
        removal_max: largest increase of the loss by the removal of one expert, nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    perplexity: float
    domain_perplexity: dict[str, float]
    trigram_perplexity: float
    trigram_domain_perplexity: dict[str, float]
    beside_trigram: Interval
    dense_perplexity: float | None
    parameters: int
    active_parameters: int
    dense_parameters: int | None
    lis: float
    domain_lis: dict[str, float]
    lis_by_layer: list[float]
    divergence: float
    divergence_max: float
    divergence_pair: tuple[str, str]
    importance_correlation: float
    importance_correlation_by_layer: list[float | None]
    removal_max: float

    def sentence(self) -> str:
        """For people."""
        beside = "" if self.dense_perplexity is None else f", dense {self.dense_perplexity:.1f}"
        trigram = f"trigram {self.trigram_perplexity:.1f}, {in_percent(self.beside_trigram)}"
        return f"perplexity {self.perplexity:.1f} ({trigram}{beside}), LIS {self.lis:.2f}"


def in_percent(change: Interval) -> str:
    """A relative difference with its interval, for people."""
    return f"{percent(change.value, sign=True)} ({span_text(change.low, change.high, 100, '+.1f')})"


def judge(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    train: Mapping[str, Stream],
    heldout: Mapping[str, Stream],
    heldout_documents: Mapping[str, list[str]],
    *,
    dense: Any | None = None,
    rows: int = ROWS,
    removal_tokens: int = 6144,
    progress: bool = True,
) -> Judgement:
    """Judge a trained MoE model.

    Args:
        model: as stored on the shelf.
        tokenizer: of the model.
        recipe: that it was trained by; says which rows it saw.
        train: domain -> tokens of the training text.
        heldout: domain -> tokens of the held-out text.
        heldout_documents: domain -> documents, for the removal study.
        dense: the dense model of equal active size.
        rows: held-out rows of each domain.
        removal_tokens: that the loss without each expert is measured on.
        progress: show progress bars.
    """
    setting = recipe.training
    framing = Framing.of(tokenizer, model.config)
    chosen = heldout_rows(heldout, framing, seq_len=setting.seq_len, rows=rows)
    seen = measure(model, chosen, batch_size=1)  # a row a pass, for the interval
    beside = measure(dense, chosen) if dense is not None else None
    trigram_rows = _trigram_loss(recipe, train, framing, chosen, len(tokenizer))
    trigram = {name: float(loss.sum()) for name, loss in trigram_rows.items()}
    passes = np.concatenate([seen.passes_D[name] for name in trigram_rows])
    importance = profile(
        model, tokenizer, {name: list(texts) for name, texts in heldout_documents.items()}, tokens=setting.seq_len * 4,
        seq_len=setting.seq_len, batch_size=1, importance=("leave_one_out",),
        importance_options={"leave_one_out": {"tokens": removal_tokens}}, progress=progress,
    )  # fmt: skip
    correlations = [
        _rank_correlation(importance.importance["leave_one_out"][layer, :width], importance.load[layer, :width])
        for layer, width in enumerate(importance.widths)
    ]
    divergence = _divergences(seen)
    pair = max(divergence, key=divergence.__getitem__)
    tokens = sum(seen.scored_D.values())
    return Judgement(
        tokens=tokens,
        perplexity=seen.perplexity,
        domain_perplexity=seen.domain_perplexity(),
        trigram_perplexity=math.exp(sum(trigram.values()) / tokens),
        trigram_domain_perplexity={name: math.exp(loss / seen.scored_D[name]) for name, loss in trigram.items()},
        beside_trigram=perplexity_change(np.concatenate(list(trigram_rows.values())), passes[:, 0], passes[:, 1]),
        dense_perplexity=None if beside is None else beside.perplexity,
        parameters=_parameters(model),
        active_parameters=active_parameters(model, importance),
        dense_parameters=None if dense is None else _parameters(dense) - _embedding(dense),
        lis=float(np.mean(seen.balance()["lis"])),
        domain_lis=seen.domain_lis(),
        lis_by_layer=seen.balance()["lis"],
        divergence=float(np.mean(list(divergence.values()))),
        divergence_max=divergence[pair],
        divergence_pair=pair,
        importance_correlation=float(np.mean([value for value in correlations if value is not None] or [0.0])),
        importance_correlation_by_layer=correlations,
        removal_max=float(importance.importance["leave_one_out"].max()),
    )


def dense_beside(dense: Any, tokenizer: Any, recipe: Recipe, heldout: Mapping[str, Stream]) -> tuple[float, int]:
    """Perplexity of a dense model on the rows that MoE models are judged on, and its parameters without embeddings."""
    framing = Framing.of(tokenizer, dense.config)
    chosen = heldout_rows(heldout, framing, seq_len=recipe.training.seq_len, rows=ROWS)
    return measure(dense, chosen).perplexity, _parameters(dense) - _embedding(dense)


def active_parameters(model: Any, measured: Any) -> int:
    """Parameters on a token's way through the model, embeddings left out: all, less those of the experts it is not sent to."""
    idle = sum(
        (layer.num_experts - layer.top_k) * (sum(rows * columns for rows, columns in layer.matrices) + layer.vector_elements)
        for layer in measured.model.layers
    )
    return int(_parameters(model) - _embedding(model) - idle)


def _parameters(model: Any) -> int:
    return int(sum(parameter.numel() for parameter in model.parameters()))


def _embedding(model: Any) -> int:
    """Of the embeddings and the output matrix, each tied one once."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(int(weight.numel()) for weight in {id(part.weight): part.weight for part in parts if part is not None}.values())


def _trigram_loss(
    recipe: Recipe, train: Mapping[str, Stream], framing: Framing, chosen: Mapping[str, Rows], vocabulary: int
) -> dict[str, NDArray[np.float64]]:
    """Domain -> [rows] loss in nats of a trigram model of the training rows, over the tokens that the model predicts."""
    setting = recipe.training
    order = RowOrder(
        train, {name: domain.weight for name, domain in recipe.mix.domains.items()}, framing,
        seq_len=setting.seq_len, batch_size=setting.batch_size, seed=setting.seed, text_tokens=setting.text_tokens,
    )  # fmt: skip
    # A row that was read twice is counted once: doubled counts would spoil the discounts, which are of n-grams seen once.
    read = {row.tobytes(): row for step in range(setting.steps) for row in order.content(step)}
    trigram = Trigram(read.values(), vocabulary)
    loss = {}
    for name, rows in chosen.items():
        parts = [-np.log(trigram.probabilities(row)) for row in rows.content]
        if framing.decoder_start is not None:  # the encoder's half is read, not predicted
            parts = [part[-(len(row) // 2) :] for part, row in zip(parts, rows.content, strict=True)]
        loss[name] = np.array([part.sum() for part in parts])
    return loss


def _divergences(seen: HeldOut) -> dict[tuple[str, str], float]:
    """Pair of domains -> mean over layers of the divergence of their loads."""
    names = list(seen.passes_D)
    return {
        (names[i], names[j]): float(np.mean(jensen_shannon(seen.load_DLE[i], seen.load_DLE[j])))
        for i, j in combinations(range(len(names)), 2)
    }


def _rank_correlation(importance_E: NDArray[np.float64], load_E: NDArray[np.int64]) -> float | None:
    """Spearman's; None where one of the two is the same for all experts."""
    if len(set(importance_E.tolist())) < 2 or len(set(load_E.tolist())) < 2:
        return None
    return float(spearmanr(importance_E, load_E).statistic)
