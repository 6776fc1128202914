"""Recorded loads of any engine become a Profile; every check that they share is here.

Shapes: S scenarios, W windows, N rows as the engine wrote them (dense layers may be among them), L MoE layers,
E logical experts, P physical slots, K top-k, T tokens; 2 phases (prefill, decode).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import __version__
from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source
from equipoise.artifacts.profile import PHASES
from equipoise.engines.model_config import MAX_EXPERTS, MAX_LAYERS, ModelConfig
from equipoise.errors import ProfileError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rows = Literal["hidden", "moe", "either"] | tuple[int, ...]

MAX_COUNT = 1 << 53
"""Largest sum of counts: beyond it, float64 no longer tells one selection from the next."""

MAX_WINDOWS = 128
"""Stretches of one scenario that are kept; longer records are merged into as many of equal length."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What an engine recorded of one traffic.

    Attributes:
        name: of the traffic; the file's name unless the source has a better one.
        counts: [2, N, E] selections by phase, or [N, E] where the source does not tell phases apart.
        rows: what the N rows are. "hidden": all transformer layers, so rows of zeros are dense layers; "moe": MoE layers
            only; "either": as the user wrote them; numbers: the transformer layer of each row.
        windows: [W, N, E] selections in consecutive stretches of time; no windows when the source has none.
        top_k: experts per token, where the source tells.
        tokens: real tokens, where the source tells.
        files: that it was read from.
        hidden_layers: transformer layers of the model, where the source tells (rows of "hidden" tell it).
        gate_mass: [N, E] sum of gate weights, where the source tells.
        transitions: [N-1, E, E] tokens by (expert in one row, expert in the next), where the source has single tokens.
        coactivation: [N, E, E] tokens that chose both experts, likewise.
    """

    name: str
    counts: Ints
    rows: Rows
    windows: Ints = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    top_k: int | None = None
    tokens: int | None = None
    files: tuple[str, ...] = ()
    hidden_layers: int = 0
    gate_mass: Floats | None = None
    transitions: Ints | None = None
    coactivation: Ints | None = None


def as_counts(values: ArrayLike, what: str, ndim: int | None = None) -> Ints:
    """Counts as int64, checked: whole, not negative, and few enough to add up.

    Args:
        values: counts of any numeric type.
        what: named in errors ("'file.pt': logical_count").
        ndim: dimensions that are expected, when they are known.

    Raises:
        ProfileError: not numbers, ragged, negative, not whole, overflowing, or of another dimension.
    """
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ProfileError(f"{what} is not a table: its rows differ in length.") from error
    if array.dtype.kind not in "biuf":
        raise ProfileError(f"{what} holds {array.dtype}, not counts; whole numbers are allowed.")
    if ndim is not None and array.ndim != ndim:
        raise ProfileError(f"{what} has shape {array.shape}; {ndim} dimensions are expected.")
    if array.size == 0:
        raise ProfileError(f"{what} is empty (shape {array.shape}); record again with traffic.")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ProfileError(f"{what} holds NaN or infinity; counts are whole numbers.")
        if (array != np.rint(array)).any():
            raise ProfileError(
                f"{what} holds fractions such as {array[array != np.rint(array)].flat[0]:g}; give counts, not rates."
            )
    low, high = array.min(), array.max()
    if low < 0:
        raise ProfileError(
            f"{what} holds negative counts ({low}): the counter overflowed, or this is not a load; record again."
        )
    if float(high) * array.size >= MAX_COUNT and float(array.sum(dtype=np.float64)) >= MAX_COUNT:
        raise ProfileError(f"{what} adds up to more than {MAX_COUNT:,} selections: the counter overflowed; record again.")
    return array.astype(np.int64)


def merged(steps: Ints, limit: int = MAX_WINDOWS) -> Ints:
    """[W, N, E] stretches of equally many steps, at most `limit`; steps in which nothing was served are left out.

    Args:
        steps: [T, N, E] selections of each step, in order of time.
        limit: most stretches.
    """
    steps = steps[steps.any((1, 2))]
    if len(steps) <= 1:
        return np.zeros((0, *steps.shape[1:]), np.int64)  # one stretch says nothing of how load changes
    if len(steps) <= limit:
        return steps
    return np.asarray(np.add.reduceat(steps, np.linspace(0, len(steps), limit, endpoint=False).astype(int), axis=0))


def to_logical(physical: Ints, map_NP: Ints, what: str, experts: int | None = None) -> Ints:
    """[..., N, E] counts of logical experts from counts of physical slots.

    Args:
        physical: [..., N, P] counts of slots.
        map_NP: [N, P] logical expert of each slot (physical_to_logical).
        what: named in errors.
        experts: E, when it is known; otherwise the largest id of the map tells.

    Raises:
        ProfileError: the map does not fit the counts, or names experts that do not exist or have no slot.
    """
    map_NP = as_counts(map_NP, f"{what}: the physical_to_logical map", 2)
    if physical.shape[-2:] != map_NP.shape:
        raise ProfileError(f"{what}: counts of {physical.shape[-2:]} slots and a map of {map_NP.shape} do not belong together.")
    size = int(map_NP.max()) + 1 if experts is None else experts
    if int(map_NP.max()) >= size or size > map_NP.shape[1]:
        raise ProfileError(f"{what}: the map names expert {int(map_NP.max())} of {size} experts in {map_NP.shape[1]} slots.")
    for row, slots in enumerate(map_NP):
        missing = np.flatnonzero(np.bincount(slots, minlength=size) == 0)
        if len(missing):
            raise ProfileError(
                f"{what}: row {row} of the map has no slot for expert {missing[0]}; it is not a physical_to_logical map."
            )
    lead = physical.reshape(-1, *map_NP.shape)
    logical = np.zeros((len(lead), map_NP.shape[0], size), np.int64)
    for row, slots in enumerate(map_NP):
        np.add.at(logical[:, row].T, slots, lead[:, row].T)
    return logical.reshape(*physical.shape[:-1], size)


def to_profile(
    recordings: Sequence[Recording],
    *,
    engine: str,
    config: ModelConfig | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    phase: str = "prefill",
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Profile:
    """The Profile of recorded traffics, one scenario each.

    Args:
        recordings: what was read; all of one model.
        engine: who recorded it.
        config: the model's configuration, which fills in what records do not tell and refuses records of another model.
        experts: routed experts that the model is known to have; refuses records of physical slots.
        top_k: experts per token, where neither records nor configuration tell.
        phase: "prefill" or "decode", where the records do not tell.
        model: the model's name, for people.
        options: of the reader, to be kept in the profile.

    Raises:
        ProfileError: nothing was recorded, or layers, experts or phases that cannot be.
    """
    if not recordings:
        raise ProfileError(f"no {engine} records were found in what was given; give the files that the engine wrote.")
    if phase not in PHASES:
        raise ProfileError(f"phase: {phase!r} given; allowed are {', '.join(PHASES)}.")
    names = [r.name for r in recordings]
    twice, often = Counter(names).most_common(1)[0]
    if often > 1:
        raise ProfileError(f"{often} traffics are called '{twice}'; name each with --scenario.")
    checked = [_checked(r, phase) for r in recordings]
    rows, hidden = _layers(checked, config, experts)
    k = _top_k(checked, config, top_k, checked[0].counts.shape[2])
    parts = [_only(r, rows) for r in checked]
    counts = np.stack([r.counts for r in parts])
    tokens = [r.tokens if r.tokens is not None else int(-(-r.counts.sum(0).sum(1).max() // (k or 1))) for r in parts]
    windows, scenario = _windows(parts)
    facts = _facts(rows, hidden, counts.shape[3], k, config, model or (config.name if config else engine))
    notes = {} if k else {"top_k": "unknown; taken as 1, so tokens are selections"}
    if any(r.counts.ndim == 2 for r in recordings):
        notes["phase"] = f"not recorded; taken as {phase}"
    return Profile(
        model=facts,
        source=Source(
            origin=engine,
            scenarios=tuple(names),
            texts={r.name: list(r.files) for r in recordings if r.files},
            text_sha256=hashlib.sha256(np.ascontiguousarray(counts).tobytes()).hexdigest(),
            options=dict(options or {}) | notes,
            equipoise_version=__version__,
        ),
        counts=counts,
        gate_mass=np.stack([np.zeros(counts.shape[2:]) if r.gate_mass is None else r.gate_mass for r in parts]),
        tokens=np.array(tokens, np.int64),
        windows=windows,
        window_scenario=scenario,
        transitions=_sum(parts, "transitions", (counts.shape[2] - 1, counts.shape[3], counts.shape[3])),
        coactivation=_sum(parts, "coactivation", (counts.shape[2], counts.shape[3], counts.shape[3])),
    )


def _checked(recording: Recording, phase: str) -> Recording:
    """Counts and windows that are counts, with phases, and not empty."""
    what = f"scenario '{recording.name}'"
    counts = as_counts(recording.counts, what)
    if counts.ndim == 2:
        both = np.zeros((2, *counts.shape), np.int64)
        both[PHASES.index(phase)] = counts
        counts = both
    if counts.ndim != 3 or counts.shape[0] != 2:
        raise ProfileError(f"{what} has counts of shape {recording.counts.shape}; [layers, experts] is expected.")
    if counts.shape[1] > MAX_LAYERS or counts.shape[2] > MAX_EXPERTS:
        raise ProfileError(
            f"{what} has {counts.shape[1]} layers of {counts.shape[2]} experts; at most {MAX_LAYERS} of {MAX_EXPERTS} are read."
        )
    if not counts.any():
        raise ProfileError(
            f"{what} is empty: all its counts are zero. The recorder saw no traffic; start it, send traffic, dump again."
        )
    windows = recording.windows
    if windows.size:
        windows = as_counts(windows, f"{what}: windows", 3)
        if windows.shape[1:] != counts.shape[1:]:
            raise ProfileError(f"{what} has windows of shape {windows.shape[1:]} and counts of shape {counts.shape[1:]}.")
    else:
        windows = np.zeros((0, *counts.shape[1:]), np.int64)
    return replace(recording, counts=counts, windows=windows)


def _layers(
    recordings: Sequence[Recording], config: ModelConfig | None, experts: int | None
) -> tuple[list[tuple[int, int]], int]:
    """(row, transformer layer) of each MoE layer, and how many transformer layers there are (0 = unknown)."""
    first = recordings[0]
    for other in recordings[1:]:
        if other.counts.shape != first.counts.shape or other.rows != first.rows:
            raise ProfileError(
                f"'{first.name}' has {first.counts.shape[1]} layers of {first.counts.shape[2]} experts, '{other.name}' has "
                f"{other.counts.shape[1]} of {other.counts.shape[2]}; records of one model belong together."
            )
    size_n, size_e = first.counts.shape[1:]
    wanted = experts if experts is not None else config.num_experts if config else None
    if wanted is not None and size_e != wanted:
        slots = " They look like physical slots; give logical counts, or the physical_to_logical map with them." * (
            size_e > wanted
        )
        raise ProfileError(f"the records have {size_e} experts per layer, the model has {wanted}.{slots}")
    served = np.add.reduce([r.counts.sum((0, 2)) for r in recordings])
    if config is not None:
        return _layers_by_config(first, served, config)
    if isinstance(first.rows, tuple):
        layers, hidden = list(first.rows), first.hidden_layers
        if len(layers) != size_n or len(set(layers)) != size_n or (hidden and max(layers) >= hidden):
            raise ProfileError(f"{size_n} rows of counts belong to layers {layers[:8]}..., which cannot be.")
    elif first.rows == "moe":
        layers, hidden = list(range(size_n)), 0
    else:
        return [(i, i) for i in range(size_n) if served[i]], size_n
    silent = [i for i in range(size_n) if not served[i]]
    if silent:
        raise ProfileError(
            f"row {silent[0]} of {size_n} recorded nothing, though each row is a MoE layer; record again with traffic."
        )
    return list(enumerate(layers)), hidden


def _layers_by_config(first: Recording, served: Ints, config: ModelConfig) -> tuple[list[tuple[int, int]], int]:
    size_n, moe = len(served), config.moe_layers
    layers: list[int] | None = None
    if isinstance(first.rows, tuple):
        layers = list(first.rows)
    elif size_n == config.hidden_layers and first.rows != "moe":
        layers = list(range(size_n))
    elif size_n == len(moe) and first.rows != "hidden":
        layers = list(moe)
    if layers is None:
        raise ProfileError(
            f"the records have {size_n} layers; '{config.name}' has {config.hidden_layers}, {len(moe)} of them with routed "
            "experts. Give the model's own config.json, or records of this model."
        )
    row_of = {layer: row for row, layer in enumerate(layers)}
    for layer, row in row_of.items():
        if served[row] and layer not in moe:
            raise ProfileError(
                f"layer {layer} has counts, but is dense by the configuration of '{config.name}'; give the right one."
            )
    silent = [layer for layer in moe if layer not in row_of or not served[row_of[layer]]]
    if silent:
        raise ProfileError(
            f"MoE layer {silent[0]} of '{config.name}' recorded nothing ({len(silent)} such); record again with traffic."
        )
    return [(row_of[layer], layer) for layer in moe], config.hidden_layers


def _top_k(recordings: Sequence[Recording], config: ModelConfig | None, given: int | None, experts: int) -> int | None:
    """Experts per token: as given, by configuration, or as recorded; None when nobody tells."""
    found = {k for k in (given, config.top_k if config else None, *(r.top_k for r in recordings)) if k is not None}
    if len(found) > 1:
        raise ProfileError(
            f"top-k is {' and '.join(map(str, sorted(found)))} by different sources; give the right model's records."
        )
    for k in found:
        if not 1 <= k <= experts:
            raise ProfileError(f"top-k {k} of {experts} experts cannot be.")
        return k
    return None


def _only(recording: Recording, rows: Sequence[tuple[int, int]]) -> Recording:
    """The rows of MoE layers."""
    index = [row for row, _ in rows]
    mass = recording.gate_mass
    return replace(
        recording,
        counts=recording.counts[:, index],
        windows=recording.windows[:, index],
        gate_mass=None if mass is None else np.asarray(mass, np.float64)[index],
    )


def _windows(parts: Sequence[Recording]) -> tuple[Ints, Ints]:
    """All windows and their scenarios; a scenario without windows is one window, as soon as another has some."""
    if not any(len(r.windows) for r in parts):
        return np.zeros((0, *parts[0].counts.shape[1:]), np.int64), np.zeros(0, np.int64)
    each = [merged(r.windows) if len(r.windows) else r.windows for r in parts]
    each = [w if len(w) else r.counts.sum(0)[None] for w, r in zip(each, parts, strict=True)]
    return np.concatenate(each), np.repeat(np.arange(len(each)), [len(w) for w in each])


def _sum(parts: Sequence[Recording], name: str, shape: tuple[int, int, int]) -> Ints:
    """Pairs summed over scenarios; none unless every scenario recorded single tokens, of exactly these layers."""
    arrays = [getattr(r, name) for r in parts]
    if any(a is None or a.shape != shape for a in arrays):
        return np.zeros((0, 0, 0), np.int64)
    return np.asarray(np.add.reduce(arrays), np.int64)


def _facts(
    rows: Sequence[tuple[int, int]], hidden: int, experts: int, k: int | None, config: ModelConfig | None, name: str
) -> ModelFacts:
    """What is known of the model. Its fingerprint is its shape alone, so that records of any engine tell the same model."""
    shape = json.dumps({"moe_layers": len(rows), "experts": experts})
    return ModelFacts(
        name=name,
        model_type=config.model_type if config else "unknown",
        dtype=config.dtype if config else "bf16",
        fingerprint="records:" + hashlib.sha256(shape.encode()).hexdigest(),
        layers=tuple(
            LayerFacts(
                path=f"model.layers.{layer}.mlp.experts",
                model_layer=layer,
                num_experts=experts,
                top_k=k or 1,
                num_shared=config.num_shared if config else 0,
                matrices=config.matrices if config else (),
            )
            for _, layer in rows
        ),
        hidden_layers=hidden,
        expert_groups=config.expert_groups if config else 1,
    )
