"""SGLang: the files of its expert distribution recorder, and its `--init-expert-location` file.

Shapes: T steps or tokens, N transformer layers (dense ones are rows of zeros), E logical experts, P physical slots, K = 8.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.engines.per_token import choices, count_pairs
from equipoise.engines.placement import Written, checked_slots, physical_slots, transformer_layers
from equipoise.engines.records import Ints, Recording, Rows, as_counts, merged, to_logical
from equipoise.engines.untrusted import read_json, read_torch, torch_bytes
from equipoise.errors import PlanError, ProfileError

MAX_PAIRS = 1 << 27
"""Most cells of transitions and co-activation together (8 bytes each); larger models are read without them."""

KEY = "physical_to_logical_map"
DECODE_MODES = {2, 5}
"""`forward_mode` values of SGLang (an enumeration from 1) in which each sequence adds the tokens it generates: DECODE, and
TARGET_VERIFY of speculative decoding; the others read prompts."""


def read(paths: Sequence[Path], *, pairs: bool = True) -> list[Recording]:
    """Read recorder files of modes `stat`, `stat_approx`, `per_pass` and `per_token`.

    A `stat` file is one scenario. `per_pass` and `per_token` files come one per rank; those of one dump become one scenario,
    their physical slots are mapped back to logical experts. A directory stands for the `.pt` files in it.

    Args:
        paths: files or directories.
        pairs: also count transitions and co-activation, where single tokens are recorded.

    Raises:
        ProfileError: damaged, not a recorder's file, ranks missing from a dump, or ids that are no slots.
    """
    found: list[Recording] = []
    dumps: list[_Dump] = []
    seen: Counter[int] = Counter()
    for path in (f for p in paths for f in (sorted(p.glob("*.pt")) if p.is_dir() else [p])):
        content = read_json(path) if path.suffix == ".json" else read_torch(path)
        if isinstance(content, dict) and "logical_count" in content:
            found.append(_stat(path, content))
        elif isinstance(content, dict) and isinstance(content.get("records"), list):
            # Every rank writes one file per dump, at its own time: the n-th file of each rank is of the n-th dump.
            rank = _rank(path, content)
            if seen[rank] == len(dumps):
                dumps.append(_Dump())
            dumps[seen[rank]].add(path, content)
            seen[rank] += 1
        else:
            keys = list(content)[:6] if isinstance(content, dict) else type(content).__name__
            raise ProfileError(
                f"'{path}' is not a file of SGLang's recorder: it holds {keys}; `logical_count` (modes stat, stat_approx) or "
                "`records` (modes per_pass, per_token) is expected."
            )
    if len(set(seen.values())) > 1 or sorted(seen) != list(range(len(seen))):
        raise ProfileError(
            f"files per rank are {dict(sorted(seen.items()))}; every rank from 0 writes one per dump. Give all of them."
        )
    return found + [dump.recording(pairs) for dump in dumps]


def _stat(path: Path, content: dict[str, Any]) -> Recording:
    counts = as_counts(content["logical_count"], f"'{path}': logical_count")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3:
        raise ProfileError(f"'{path}': logical_count has shape {counts.shape}; [steps, layers, experts] is expected.")
    # A buffer that was not filled ends in steps of zeros; `merged` leaves them out.
    return Recording(name=path.stem, counts=counts.sum(0), rows="hidden", windows=merged(counts), files=(str(path),))


def _rank(path: Path, content: dict[str, Any]) -> int:
    records = content["records"]
    rank = records[0].get("rank") if records and isinstance(records[0], dict) else None
    match = re.search(r"_(\d{1,6})$", path.stem)
    if isinstance(rank, int):
        return rank
    if match is None:
        raise ProfileError(f"'{path}' does not tell its rank; keep the name that SGLang gave it (..._<time>_<rank>.pt).")
    return int(match[1])


class _Dump:
    """One dump of all ranks, file by file: passes become windows, slots become experts."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._map_NP = np.zeros((0, 0), np.int64)
        self._passes: dict[int, Ints] = {}  # [N, P] counts by forward pass, ranks added up
        self._by_phase: Ints | None = None  # [2, N, P], where single tokens are recorded
        self._tokens: list[NDArray[np.integer]] = []  # [N, T, K] slots

    def add(self, path: Path, content: dict[str, Any]) -> None:
        """Add the file of one rank."""
        if "last_physical_to_logical_map" not in content:
            raise ProfileError(f"'{path}' has no last_physical_to_logical_map; without it slots cannot be told apart.")
        own = as_counts(content["last_physical_to_logical_map"], f"'{path}': last_physical_to_logical_map", 2)
        if self._files and (own.shape != self._map_NP.shape or (own != self._map_NP).any()):
            raise ProfileError(f"'{path}' has another physical_to_logical_map than '{self._files[0]}'; give files of one dump.")
        self._map_NP = own
        self._files.append(path)
        for number, record in enumerate(content["records"]):
            self._add_record(record, f"'{path}', record {number}")

    def _add_record(self, record: Any, what: str) -> None:
        if not isinstance(record, dict) or "global_physical_count" not in record:
            raise ProfileError(f"{what} has no global_physical_count; it is not of SGLang's recorder.")
        counts = as_counts(record["global_physical_count"], f"{what}: global_physical_count", 2)
        if counts.shape != self._map_NP.shape:
            raise ProfileError(f"{what} counts {counts.shape} slots, the map has {self._map_NP.shape}.")
        key = record.get("forward_pass_id")
        if not isinstance(key, int):
            raise ProfileError(f"{what} has no forward_pass_id.")
        self._passes[key] = self._passes[key] + counts if key in self._passes else counts
        if "topk_ids_of_layer" in record:
            self._tokens.append(_slots(record["topk_ids_of_layer"], self._map_NP, counts, what))
            if self._by_phase is None:
                self._by_phase = np.zeros((2, *counts.shape), np.int64)
            self._by_phase[int(record.get("forward_mode") in DECODE_MODES)] += counts

    def recording(self, pairs: bool) -> Recording:
        """The dump as one traffic of logical experts."""
        what = f"'{self._files[0]}'"
        if not self._passes:
            raise ProfileError(f"{what} and its {len(self._files)} ranks hold no records: the recorder saw no traffic.")
        steps = np.stack([self._passes[key] for key in sorted(self._passes)])
        windows = to_logical(merged(steps), self._map_NP, what)
        counts = to_logical(steps.sum(0) if self._by_phase is None else self._by_phase, self._map_NP, what)
        single = _single_tokens(self._tokens, self._map_NP, pairs) if self._tokens else {}
        rows: Rows = "hidden"
        if "transitions" in single:  # pairs are of MoE layers only, so counts must be as well
            moe = np.flatnonzero(counts.sum((0, 2)))
            rows, counts, windows = tuple(moe.tolist()), counts[:, moe], windows[:, moe]
        return Recording(
            name=re.sub(r"_\d{1,6}$", "", self._files[0].stem),
            counts=counts,
            rows=rows,
            windows=windows,
            hidden_layers=len(self._map_NP),
            files=tuple(map(str, self._files)),
            **single,
        )


def _slots(ids: Any, map_NP: Ints, counts: Ints, what: str) -> NDArray[np.integer]:
    """[N, T, K] physical slots that a pass's tokens chose, checked against the map and the counts beside them."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 3 or ids.dtype.kind not in "iu" or len(ids) != len(map_NP):
        raise ProfileError(f"{what}: topk_ids_of_layer is not [{len(map_NP)} layers, tokens, k] ids.")
    if ids.size and (int(ids.max()) >= map_NP.shape[1] or int(ids.min()) < -1):
        raise ProfileError(
            f"{what}: slot ids from {ids.min()} to {ids.max()} of {map_NP.shape[1]}. Shared experts were fused with the routed "
            "ones; record with --disable-shared-experts-fusion."
        )
    if int((ids >= 0).sum()) != int(counts.sum()):
        raise ProfileError(f"{what}: {int((ids >= 0).sum())} choices and a count of {int(counts.sum())}; the file is damaged.")
    return ids.astype(np.int16 if map_NP.shape[1] < 1 << 15 else np.int32)


def _single_tokens(passes: Sequence[NDArray[np.integer]], map_NP: Ints, pairs: bool) -> dict[str, Any]:
    """Tokens and top-k, and pairs between MoE layers."""
    ids_NTK = np.concatenate(passes, axis=1)
    moe = [row for row in range(len(map_NP)) if (ids_NTK[row] >= 0).any()]
    if not moe:
        return {}
    chosen = (ids_NTK[moe[0]] >= 0).sum(1)
    facts = {"tokens": int((chosen > 0).sum()), "top_k": int(chosen.max())}
    if not pairs or 2 * len(moe) * (int(map_NP.max()) + 1) ** 2 > MAX_PAIRS:
        return facts
    logical_TLK = np.stack([np.where(ids_NTK[row] >= 0, map_NP[row][ids_NTK[row]], -1) for row in moe], axis=1)
    experts = int(map_NP.max()) + 1
    transitions, together = count_pairs(choices(logical_TLK, experts, "per_token records"), experts)
    return facts | {"transitions": transitions, "coactivation": together}


def expert_location(plan: Plan, *, config: Path | None = None) -> NDArray[np.int64]:
    """[H, P] physical_to_logical_map with a row for each transformer layer; rows of dense layers are expert p % E, unused.

    Args:
        plan: a plan with equally many slots everywhere.
        config: the model's config.json, for a plan that does not know its dense layers.

    Raises:
        PlanError: SGLang cannot hold the plan.
    """
    physical = physical_slots(plan, "sglang")
    layers, hidden = transformer_layers(plan.model, "sglang", config)
    table = np.tile(np.arange(len(physical[0])) % plan.model.max_experts, (hidden, 1))
    table[layers] = np.stack(physical)
    return table


def write(plan: Plan, out: Path, *, config: Path | None = None) -> Written:
    """Write the `--init-expert-location` file, as `.json` or `.pt`; it holds the map and no other key, as SGLang demands.

    Args:
        plan: a plan with equally many slots everywhere.
        out: the file; its ending tells the format.
        config: the model's config.json, for a plan that does not know its dense layers.

    Raises:
        PlanError: SGLang cannot hold the plan, or the ending is another.
    """
    table = expert_location(plan, config=config)
    if out.suffix == ".pt":
        write_atomic(out, torch_bytes({KEY: table}))
    elif out.suffix == ".json":
        write_atomic(out, json.dumps({KEY: table.tolist()}, separators=(",", ":")) + "\n")
    else:
        raise PlanError(f"'{out}': SGLang tells the format by the ending; name the file .json or .pt.")
    redundant = table.shape[1] - plan.model.max_experts
    flags = (
        f"--init-expert-location {out} --ep-size {plan.units} --ep-num-redundant-experts {redundant} "
        "--ep-dispatch-algorithm static\n"
        "# without --enable-eplb, which would plan anew; --ep-dispatch-algorithm dynamic picks a copy at random for each token"
    )
    return Written((out,), flags)


def read_plan(path: Path, model: ModelFacts, ranks: int, *, config: Path | None = None) -> list[Ints]:
    """The physical slots of each MoE layer from an `--init-expert-location` file.

    Args:
        path: `.json` or `.pt`.
        model: facts of the model that it is for.
        ranks: R.
        config: the model's config.json, when the facts do not know the dense layers.

    Raises:
        PlanError: another key, another shape, or slots that are no placement.
    """
    content = read_torch(path) if path.suffix == ".pt" else read_json(path)
    if not isinstance(content, dict) or KEY not in content:
        raise PlanError(f"'{path}' has no {KEY}; it is not a plan for SGLang.")
    others = sorted(map(str, set(content) - {KEY}))
    if others:
        raise PlanError(
            f"'{path}' has keys beside {KEY} ({', '.join(others[:4])}), which SGLang passes on as arguments and fails."
        )
    rows = list(content[KEY]) if isinstance(content[KEY], list | np.ndarray) else []
    layers, hidden = transformer_layers(model, "sglang", config)
    if len(rows) != hidden:
        raise PlanError(f"'{path}' has {len(rows)} rows, the model has {hidden} transformer layers.")
    if len({len(row) if isinstance(row, list | np.ndarray) else -1 for row in rows}) != 1:
        raise PlanError(f"'{path}': rows of {KEY} differ in length.")
    return checked_slots([rows[i] for i in layers], model, ranks, f"'{path}'")
