"""A pruned model beside the whole one, in its domain and outside of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.artifacts import Evaluation, Plan
from equipoise.errors import TextError
from equipoise.evaluation.evaluate import ALL_TEXTS, evaluate


def evaluate_pruned(
    whole: Any, pruned: Any, tokenizer: Any, plan: Plan, texts: Mapping[str, Sequence[str]], **options: Any
) -> Evaluation:
    """Measure a pruned model beside the model it was made from, with paired intervals.

    Args:
        whole: the model as it was.
        pruned: what `execution.prune` made of it.
        tokenizer: of both.
        plan: that was carried out.
        texts: name -> documents; those under names of the plan's domains are in domain, all others outside of it.
        options: of `evaluate`: tokens, seq_len, batch_size, seed, tasks, ...

    Returns:
        The evaluation, whose contender is of class `capacity`. Its balance is over as many units as the whole model has
        experts, an expert on each; with fewer experts it says nothing of what balancing would bring.

    Raises:
        TextError: a text is called as the evaluation calls all of them together.
        EquipoiseError: as `evaluate`.
    """
    if ALL_TEXTS in texts:
        raise TextError(f"a text is called '{ALL_TEXTS}', which is how all of them together are called; choose another name.")
    found = evaluate(whole, {"pruned": pruned}, tokenizer, texts=texts, **options)
    mine = found.contenders[0].model_copy(update={"plan_method": plan.method, "exactness": plan.exactness})
    return found.model_copy(update={"contenders": (mine,)})


def in_and_out(evaluation: Evaluation, plan: Plan) -> tuple[list[str], list[str]]:
    """The names of an evaluation's texts that are of a plan's domains, and those that are not."""
    names = [text.name for text in evaluation.contenders[0].texts if text.name != ALL_TEXTS]
    domains = set(plan.options.get("domains", ()))
    return [name for name in names if name in domains], [name for name in names if name not in domains]
