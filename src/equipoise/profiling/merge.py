"""Profiles of separate runs of one model as one profile; numpy alone, no model and no torch.

Counts, gate mass, tokens, transitions and co-activation add up exactly, so two runs over different traffic and one run over
both give the same arrays; windows are set one after the other. What was drawn by sampling, or measured on each run's own text,
is put together as its formula allows; the merged profile says for each score how.

Shapes: S scenarios, W windows, L MoE layers, E logical experts of the widest layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Profile, Source
from equipoise.errors import ProfileError
from equipoise.precisions import precision

Floats = NDArray[np.float64]

OF_ONE_RUN = {"tokens", "seed", "remarks", "merged", "merged_importance", "calibration"}
"""Options that may differ between profiles to be merged: which text it was, and how much of it."""

PARTS, HOW = "merged", "merged_importance"
"""Options of a merged profile: what it was made from, and how each score was put together."""


def merge(profiles: Sequence[Profile]) -> Profile:
    """One profile from those of separate runs of one model.

    A scenario that several have becomes one, its windows in the order of the profiles; others stay apart.

    Args:
        profiles: two or more, of one model, routing policy and options; their text must differ.

    Returns:
        The merged profile; `source.options` lists what it was made from.

    Raises:
        ProfileError: fewer than two, or two that do not belong together; the message names both and what differs.
    """
    if len(profiles) < 2:
        raise ProfileError(f"{len(profiles)} profile(s) given; merging takes at least two.")
    for number, other in enumerate(profiles[1:], start=2):
        _check_pair(profiles[0], other, f"profile 1 and profile {number}")
    _check_texts(profiles)
    scenarios = list(dict.fromkeys(name for profile in profiles for name in profile.source.scenarios))
    rows = [[scenarios.index(name) for name in profile.source.scenarios] for profile in profiles]

    def by_scenario(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """[S, ...] sum of arrays whose first axes are each profile's own scenarios."""
        total = np.zeros((len(scenarios), *arrays[0].shape[1:]), arrays[0].dtype)
        for array, at in zip(arrays, rows, strict=True):
            total[at] += array
        return total

    importance, how = _importance(profiles)
    errors = {name: _errors(profiles, name) for name in profiles[0].output_error}
    energy = _sum([p.output_energy for p in profiles])
    if "output_error" in importance:  # the score is the relative error of the coarsest format
        coarsest = min(map(precision, errors), key=lambda form: form.bits).name
        score = np.divide(errors[coarsest], energy[:, None], out=np.zeros_like(errors[coarsest]), where=energy[:, None] > 0)
        importance["output_error"] = score
    return Profile(
        model=profiles[0].model,
        source=_source(profiles, scenarios, how),
        counts=by_scenario([p.counts for p in profiles]),
        gate_mass=by_scenario([p.gate_mass for p in profiles]),
        tokens=by_scenario([p.tokens for p in profiles]),
        windows=np.concatenate([p.windows for p in profiles]),
        window_scenario=np.concatenate(
            [np.array(at, np.int64)[p.window_scenario] for p, at in zip(profiles, rows, strict=True)]
        ),
        transitions=_sum([p.transitions for p in profiles]),
        coactivation=_sum([p.coactivation for p in profiles]),
        importance=importance,
        scenario_importance={
            name: by_scenario([p.scenario_importance[name] for p in profiles]) for name in profiles[0].scenario_importance
        },
        output_error=errors,
        output_energy=energy,
        sensitivity=_mean([p.sensitivity for p in profiles], _watched(profiles)),
    )


def _check_pair(one: Profile, other: Profile, who: str) -> None:
    """Raise unless two profiles are of one model, policy and options."""
    mine, theirs = (p.model.model_dump(exclude={"name"}) for p in (one, other))
    differ = [f"model {name}" for name in mine if mine[name] != theirs[name]]
    differ += [name for name in ("origin", "routing_policy") if getattr(one.source, name) != getattr(other.source, name)]
    options = [{k: v for k, v in p.source.options.items() if k not in OF_ONE_RUN} for p in (one, other)]
    differ += [f"option {name}" for name in sorted({*options[0], *options[1]}) if options[0].get(name) != options[1].get(name)]
    if ("calibration" in one.source.options) != ("calibration" in other.source.options):
        differ.append("option calibration")
    for what in ("transitions", "coactivation", "output_energy", "sensitivity"):
        if getattr(one, what).shape != getattr(other, what).shape:
            differ.append(what)
    for what in ("importance", "scenario_importance", "output_error"):
        if getattr(one, what).keys() != getattr(other, what).keys():
            differ.append(f"names of {what}")
    if differ:
        raise ProfileError(
            f"{who} cannot be merged: they differ in {', '.join(differ)}. Profile the same model with the same options, apart "
            "from text, --tokens and --seed."
        )


def _check_texts(profiles: Sequence[Profile]) -> None:
    """Raise when the same text would be counted twice."""
    seen: dict[str, int] = {}
    for number, profile in enumerate(profiles, start=1):
        for part in _parts(profile):
            digest = part["text_sha256"]
            if digest and digest in seen:
                raise ProfileError(
                    f"profile {seen[digest]} and profile {number} are of the same text, which would count twice; leave one out."
                )
            seen[digest] = number


def _parts(profile: Profile) -> list[dict[str, Any]]:
    """What a profile was made from: its one run, or those that were merged into it."""
    source = profile.source
    own = {name: source.options[name] for name in ("tokens", "seed", "calibration", "remarks") if name in source.options}
    whole = {
        "text_sha256": source.text_sha256,
        "scenarios": list(source.scenarios),
        "equipoise_version": source.equipoise_version,
    }
    return list(source.options.get(PARTS, [whole | own]))


def _source(profiles: Sequence[Profile], scenarios: list[str], how: Mapping[str, str]) -> Source:
    parts = [part for profile in profiles for part in _parts(profile)]
    texts: dict[str, list[str]] = {}
    for profile in profiles:
        for name, files in profile.source.texts.items():
            texts.setdefault(name, []).extend(file for file in files if file not in texts.get(name, []))
    digests = [part["text_sha256"] for part in parts]
    first = profiles[0].source
    options = {name: value for name, value in first.options.items() if name not in OF_ONE_RUN}
    return Source(
        origin=first.origin,
        scenarios=tuple(scenarios),
        texts=texts,
        text_sha256=hashlib.sha256("".join(digests).encode()).hexdigest() if all(digests) else "",
        options=options | {PARTS: parts, HOW: dict(how)},
        routing_policy=first.routing_policy,
        equipoise_version=first.equipoise_version,
    )


def _importance(profiles: Sequence[Profile]) -> tuple[dict[str, Floats], dict[str, str]]:
    """Each score of all profiles together, and in words how."""
    scores, how = {}, {}
    for name in profiles[0].importance:
        if name not in RULES:
            raise ProfileError(
                f"there is no rule to merge importance '{name}' (there is for: {', '.join(RULES)}); profile all text at once."
            )
        how[name], rule = RULES[name]
        scores[name] = rule(profiles, [p.importance[name] for p in profiles])
    return scores, how


def _errors(profiles: Sequence[Profile], name: str) -> Floats:
    """[L, E] summed output errors of a format.

    A run that has drawn too few tokens of an expert has put the layer's error per token in their place; where another run has
    measured that expert, its own error per token takes the place of this.
    """
    measured = [~_few(profile) for profile in profiles]
    known = _sum([p.output_error[name] * sure for p, sure in zip(profiles, measured, strict=True)])
    of = _sum([p.load * sure for p, sure in zip(profiles, measured, strict=True)])
    every = _sum([p.output_error[name] for p in profiles])
    return np.where(of > 0, known * (_sum([p.load for p in profiles]) / np.maximum(of, 1)), every)


def _few(profile: Profile) -> NDArray[np.bool_]:
    """[L, E] experts of which no run of this profile has drawn enough tokens to measure their output error."""
    few = np.ones(profile.load.shape, bool)
    for part in _parts(profile):
        told = part.get("remarks", {}).get("output_error", {}).get("experts_with_few_tokens", {})
        mine = np.zeros_like(few)
        for layer, experts in told.items():
            mine[int(layer), experts] = True
        few &= mine
    return few


def _frequency(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    load_LE = _sum([p.load for p in profiles])
    return np.asarray(load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1), np.float64)


def _gate_norm(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    options = profiles[0].source.options.get("importance_options", {}).get("gate_norm", {})
    if options.get("reduce") == "sum":
        return _sum(scores)
    return _mean(scores, [p.load for p in profiles])


def _wanda(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    return np.asarray(np.sqrt(_sum([score**2 for score in scores])))


def _leave_one_out(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    tokens = [sum(part["remarks"]["leave_one_out"]["scored_tokens"] for part in _parts(p)) for p in profiles]
    return _mean(scores, [np.asarray(count) for count in tokens])


def _easy_ep(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    apart: dict[str, Floats] = {}
    for profile in profiles:
        for name, score_LE in zip(profile.source.scenarios, profile.scenario_importance["easy_ep"], strict=True):
            apart[name] = apart[name] + score_LE if name in apart else score_LE
    if len(apart) == 1:
        return next(iter(apart.values()))
    return _sum([score_LE / np.maximum(score_LE.sum(1, keepdims=True), 1e-300) for score_LE in apart.values()])


def _left(profiles: Sequence[Profile], scores: Sequence[Floats]) -> Floats:
    return scores[0]


RULES: dict[str, tuple[str, Callable[[Sequence[Profile], Sequence[Floats]], Floats]]] = {
    "frequency": ("exact: share of all selections", _frequency),
    "gate_norm": ("mean weighted by each expert's load", _gate_norm),
    "leave_one_out": ("mean weighted by the tokens scored", _leave_one_out),
    "easy_ep": ("exact up to rounding: sum of each scenario", _easy_ep),
    "output_error": ("relative error of the summed errors and energies", _left),
    "wanda": ("approximate: root of the summed squares, exact if each channel has its share of the energy in all", _wanda),
}
"""Name of a score -> how those of several runs make one, in words and as a function."""


def _watched(profiles: Sequence[Profile]) -> list[NDArray[Any]]:
    """Tokens of each profile, to weigh its measurements by."""
    return [np.asarray(p.tokens.sum()) for p in profiles]


def _sum(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.asarray(sum(arrays[1:], start=arrays[0].copy()))


def _mean(arrays: Sequence[Floats], weights: Sequence[NDArray[Any]]) -> Floats:
    """Mean by weights; zero where they are."""
    total = _sum([np.asarray(weight, np.float64) for weight in weights])
    parts = [array * weight for array, weight in zip(arrays, weights, strict=True)]
    return np.asarray(_sum(parts) / np.where(total > 0, total, 1.0))
