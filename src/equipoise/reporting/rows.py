"""The three values as plain dictionaries: what tables show and what `--json` prints; nan and infinity become null.

Shapes: S scenarios, W windows, L MoE layers, E logical experts.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from equipoise.artifacts import Evaluation, Plan, Profile
from equipoise.metrics import METRICS, cumulative_lis, lis

Rows = dict[str, Any]

FEW_SELECTIONS = 100
"""Mean selections of an expert in a layer below which chance alone scatters its load by more than a tenth."""


def profile_rows(profile: Profile) -> Rows:
    """What was measured: balance of every layer, scenario and window, and how importance goes with load.

    Returns:
        `model` and `source` (identity); `layers` (the metrics of each over all scenarios, with its heaviest expert) and their
        `mean` and `max`; `scenarios` (tokens and LIS of each); `windows` (LIS of each window alone, instantaneous, and of all
        so far, cumulative, mean over layers); `importance` (mean over layers of Spearman's rank correlation with the load);
        `notes` (scenarios with too few tokens to tell loads from chance).
    """
    load_LE, width_L = profile.load, profile.widths
    scores = {name: metric(load_LE, width_L) for name, metric in METRICS.items()}
    layers = []
    for i, facts in enumerate(profile.model.layers):
        load = load_LE[i, : facts.num_experts]
        total = load.sum()
        layers.append(
            {
                "layer": i,
                "path": facts.path,
                "stack": facts.stack,
                "experts": facts.num_experts,
                "top_k": facts.top_k,
                "selections": int(total),
                **{name: _number(values[i]) for name, values in scores.items()},
                "heaviest": int(load.argmax()),
                "heaviest_share": _number(load.max() / total) if total else None,
                "unused": int((load == 0).sum()),
            }
        )
    scenarios = []
    for s, name in enumerate(profile.source.scenarios):
        score = lis(profile.scenario_load[s], width_L)
        decode = profile.counts[s, 1].sum()
        scenarios.append(
            {
                "scenario": name,
                "tokens": int(profile.tokens[s]),
                "decode_share": _number(decode / max(profile.counts[s].sum(), 1)),
                "lis_mean": _mean(score),
                "lis_max": _max(score),
            }
        )
    return {
        "model": _model(profile.model),
        "source": profile.source.model_dump(mode="json"),
        "layers": layers,
        "mean": {name: _mean(values) for name, values in scores.items()},
        "max": {name: _max(values) for name, values in scores.items()},
        "scenarios": scenarios,
        "windows": _windows(profile),
        "importance": _importance(profile),
        "output_error": sorted(profile.output_error),
        "notes": _scarce(profile),
    }


def plan_rows(plan: Plan) -> Rows:
    """What was decided: the slots of every layer, and what the planner predicts of them."""
    layers = []
    forecasts = plan.predicted.layers if plan.predicted is not None else ()
    for i, (layer, facts) in enumerate(zip(plan.layers, plan.model.layers, strict=True)):
        copies = Counter(layer.experts)
        expert, most = min(copies.items(), key=lambda item: (-item[1], item[0]))
        layers.append(
            {
                "layer": i,
                "path": facts.path,
                "experts": facts.num_experts,
                "slots": layer.num_slots,
                "copied_experts": sum(n > 1 for n in copies.values()),
                "most_copied": expert if most > 1 else None,
                "most_copies": most,
                "precisions": dict(sorted(Counter(layer.precisions).items(), key=lambda item: -item[1])),
                "bytes": int(layer.slot_bytes(facts).sum()),
                "forecast": forecasts[i].model_dump(mode="json") if forecasts else None,
            }
        )
    predicted = None
    if plan.predicted is not None:
        predicted = {**plan.predicted.model_dump(mode="json", exclude={"layers"}), "gap": plan.predicted.gap}
    used = plan.bytes_by_unit()
    return {
        "model": _model(plan.model),
        "method": plan.method,
        "options": plan.options,
        "seed": plan.seed,
        "dispatch": plan.dispatch,
        "exactness": plan.exactness,
        "routing_policy": plan.routing_policy,
        "kept": None if plan.kept is None else [list(kept) for kept in plan.kept],
        "units": plan.units,
        "nodes": plan.nodes,
        "unit_bytes": plan.unit_bytes,
        "fullest_unit_bytes": int(used.max()),
        "bytes": int(used.sum()),
        "predicted": predicted,
        "layers": layers,
    }


def evaluation_rows(evaluation: Evaluation) -> Rows:
    """What was proved: the file's own fields, and what follows from them.

    Each contender also has `bytes_of_base`, and `excess_removed`: the part of the base's LIS above 1 that is gone on its
    last text (all texts together where there are several); null without texts or excess.
    """
    rows: Rows = evaluation.model_dump(mode="json", by_alias=True)
    for contender in rows["contenders"]:
        contender["bytes_of_base"] = _number(contender["expert_bytes"] / max(evaluation.base_expert_bytes, 1))
        text = contender["texts"][-1] if contender["texts"] else None
        excess = text["lis_base"] - 1 if text else 0.0
        contender["excess_removed"] = _number(1 - (text["lis"] - 1) / excess) if text and excess > 0 else None
    return rows


def _model(facts: Any) -> Rows:
    return {
        "name": facts.name,
        "model_type": facts.model_type,
        "dtype": facts.dtype,
        "fingerprint": facts.fingerprint,
        "moe_layers": len(facts.layers),
        "max_experts": facts.max_experts,
    }


def _scarce(profile: Profile) -> list[str]:
    """A sentence for every scenario whose experts were selected too rarely: counts of n scatter by sqrt(n)."""
    mean_S = profile.scenario_load.sum((1, 2)) / profile.widths.sum()
    return [
        f"scenario '{name}' has {mean:,.1f} selections per expert and layer; below {FEW_SELECTIONS}, chance alone moves an "
        "expert's load by more than 10 %. Give more text (and --tokens), or longer records."
        for name, mean in zip(profile.source.scenarios, mean_S, strict=True)
        if mean < FEW_SELECTIONS
    ]


def _windows(profile: Profile) -> list[Rows]:
    rows = []
    for s, name in enumerate(profile.source.scenarios):
        load_WLE = profile.windows[profile.window_scenario == s]
        if not len(load_WLE):
            continue
        running = cumulative_lis(load_WLE, profile.widths)
        for w, (now, so_far) in enumerate(zip(lis(load_WLE, profile.widths), running, strict=True)):
            rows.append(
                {
                    "scenario": name,
                    "window": w,
                    "selections": int(load_WLE[w].sum()),
                    "lis_instantaneous": _mean(now),
                    "lis_cumulative": _mean(so_far),
                }
            )
    return rows


def _importance(profile: Profile) -> list[Rows]:
    from scipy.stats import spearmanr  # takes longer to import than all else that tables need

    rows = []
    for name, score_LE in profile.importance.items():
        correlations, coincide = [], 0
        for layer, score, load in zip(profile.model.layers, score_LE, profile.load, strict=True):
            score, load = score[: layer.num_experts], load[: layer.num_experts]
            coincide += int(score.argmax() == load.argmax())
            if np.ptp(score) > 0 and np.ptp(load) > 0:
                correlations.append(float(spearmanr(score, load).statistic))
        rows.append(
            {
                "estimator": name,
                "rank_correlation_with_load": _mean(correlations),
                "layers_whose_heaviest_is_most_important": coincide,
                "layers": len(profile.model.layers),
            }
        )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: ArrayLike) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def _max(values: ArrayLike) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.max()) if known.size else None
