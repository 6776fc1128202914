"""Plain tables of counts: `.npz`, `.csv` and `.parquet`, for engines that Equipoise does not know and for one's own scripts.

Shapes: S scenarios, W windows, N rows (transformer layers or MoE layers, as the user counts), E logical experts, P slots.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.engines.model_config import MAX_EXPERTS, MAX_LAYERS
from equipoise.engines.records import Ints, Recording, Rows, as_counts, to_logical
from equipoise.engines.untrusted import MAX_BYTES, read_npz, refuse, size_of
from equipoise.errors import EquipoiseError, ProfileError, missing_package

COLUMNS = ("layer", "expert", "count")
NPZ_ARRAYS = ("counts", "scenarios", "windows", "window_scenario", "layers", "physical_to_logical_map", "top_k", "tokens")
MAX_CELLS = MAX_BYTES // 16
"""Scenarios * layers * experts of one table; both phases of a count take 16 bytes."""

Key = tuple[str, int]


def read(paths: Sequence[Path]) -> list[Recording]:
    """Read tables of counts.

    `.npz`: `counts` [S, N, E] (or [N, E], or [S, 2, N, E] with phases) and `scenarios` [S] names; optional: `windows` [W, N, E]
    with `window_scenario` [W] indices, `layers` [N] transformer layer of each row, `physical_to_logical_map` [N, P] when the
    counts are of physical slots, `top_k`, `tokens` [S]. `.csv` and `.parquet`: columns layer, expert, count and optionally
    scenario and window (whole numbers in order of time); pairs that are missing count as zero.

    Args:
        paths: tables; each scenario of each becomes a scenario.

    Raises:
        ProfileError: a table is damaged, or does not have these columns or arrays.
    """
    readers = {".npz": _npz, ".csv": _csv, ".parquet": _parquet}
    found = []
    for path in paths:
        if path.suffix not in readers:
            raise ProfileError(f"'{path}': tables are read from {', '.join(readers)}; give one of these, or another --from.")
        found += readers[path.suffix](path)
    return found


def _npz(path: Path) -> list[Recording]:
    arrays = read_npz(path, NPZ_ARRAYS)
    if "counts" not in arrays:
        raise ProfileError(f"'{path}' has no array `counts` [scenarios, layers, experts]; save it under that name.")
    counts = as_counts(arrays["counts"], f"'{path}': counts")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim not in (3, 4) or (counts.ndim == 4 and counts.shape[1] != 2):
        raise ProfileError(f"'{path}': counts have shape {counts.shape}; [scenarios, layers, experts] is expected.")
    names = (
        [str(name) for name in np.atleast_1d(arrays["scenarios"])]
        if "scenarios" in arrays
        else _default_names(path, len(counts))
    )
    if len(names) != len(counts):
        raise ProfileError(f"'{path}': {len(names)} scenarios are named, {len(counts)} are counted.")
    windows, scenario = _windows(path, arrays, counts)
    if "physical_to_logical_map" in arrays:
        slots = arrays["physical_to_logical_map"]
        counts = to_logical(counts, slots, f"'{path}'")
        windows = to_logical(windows, slots, f"'{path}'") if len(windows) else windows
    top_k = _scalar(path, arrays, "top_k")
    tokens = None if "tokens" not in arrays else as_counts(arrays["tokens"], f"'{path}': tokens", 1)
    if tokens is not None and len(tokens) != len(counts):
        raise ProfileError(f"'{path}': {len(tokens)} numbers of tokens for {len(counts)} scenarios.")
    return [
        Recording(
            name=name,
            counts=counts[i],
            rows=_rows(path, arrays, counts.shape[-2]),
            windows=windows[scenario == i],
            top_k=top_k,
            tokens=None if tokens is None else int(tokens[i]),
            files=(str(path),),
        )
        for i, name in enumerate(names)
    ]


def _default_names(path: Path, number: int) -> list[str]:
    return [path.stem] if number == 1 else [f"{path.stem}-{i}" for i in range(number)]


def _windows(path: Path, arrays: dict[str, NDArray[Any]], counts: Ints) -> tuple[Ints, Ints]:
    """Windows of a `.npz` and the scenario of each."""
    if "windows" not in arrays:
        return np.zeros((0, *counts.shape[-2:]), np.int64), np.zeros(0, np.int64)
    windows = as_counts(arrays["windows"], f"'{path}': windows", 3)
    scenario = as_counts(arrays.get("window_scenario", np.zeros(len(windows), np.int64)), f"'{path}': window_scenario", 1)
    if windows.shape[1:] != counts.shape[-2:] or len(scenario) != len(windows) or scenario.max() >= len(counts):
        raise ProfileError(f"'{path}': windows {windows.shape} of scenarios {scenario.shape} do not fit counts {counts.shape}.")
    return windows, scenario


def _rows(path: Path, arrays: dict[str, NDArray[Any]], number: int) -> Rows:
    if "layers" not in arrays:
        return "either"
    layers = as_counts(arrays["layers"], f"'{path}': layers", 1)
    if len(layers) != number:
        raise ProfileError(f"'{path}': {len(layers)} layers are named, {number} are counted.")
    return tuple(layers.tolist())


def _scalar(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> int | None:
    if name not in arrays:
        return None
    values = as_counts(np.atleast_1d(arrays[name]), f"'{path}': {name}", 1)
    if len(values) != 1:
        raise ProfileError(f"'{path}': {name} has {len(values)} values; one is expected.")
    return int(values[0])


def _csv(path: Path) -> list[Recording]:
    size_of(path)

    def lines() -> Iterator[tuple[Any, ...]]:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            where = _columns(path, header)
            for number, line in enumerate(reader, 2):
                if not line:
                    continue
                if len(line) != len(header):
                    raise ProfileError(f"'{path}', line {number}: {len(line)} fields, the header has {len(header)}.")
                yield tuple(None if i is None else line[i] for i in where)

    try:
        return _long(path, lines())
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        refuse(path, error, "a CSV table")


def _parquet(path: Path) -> list[Recording]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing_package(f"reading '{path}' needs", "pyarrow", instead="save the table as CSV") from error
    size_of(path)

    def lines() -> Iterator[tuple[Any, ...]]:
        with pq.ParquetFile(path) as file:
            header = [name.lower() for name in file.schema_arrow.names]
            where = _columns(path, header)
            names = [file.schema_arrow.names[i] for i in where if i is not None]
            for batch in file.iter_batches(batch_size=1 << 16, columns=names):
                columns = iter([batch.column(name).to_pylist() for name in names])
                yield from zip(*([None] * len(batch) if i is None else next(columns) for i in where), strict=True)

    try:
        return _long(path, lines())
    except EquipoiseError:
        raise
    except Exception as error:  # pyarrow raises whatever it trips over
        refuse(path, error, "a Parquet table")


def _columns(path: Path, header: Sequence[str]) -> tuple[int | None, ...]:
    """Positions of layer, expert, count, scenario, window."""
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ProfileError(
            f"'{path}' has no column {missing[0]!r}; it has {list(header)[:8]}, wanted are {', '.join(COLUMNS)}."
        )
    if len(set(header)) != len(header):
        raise ProfileError(f"'{path}' names a column twice: {list(header)[:8]}.")
    return tuple(header.index(name) if name in header else None for name in (*COLUMNS, "scenario", "window"))


def _long(path: Path, lines: Iterable[tuple[Any, ...]]) -> list[Recording]:
    """Recordings of a table in long form: one line per layer and expert."""
    cells: dict[Key, dict[tuple[int, int], int]] = defaultdict(dict)
    total = most_layer = most_expert = 0
    for number, (layer, expert, count, scenario, window) in enumerate(lines, 1):
        i, j = _id(path, number, "layer", layer, MAX_LAYERS), _id(path, number, "expert", expert, MAX_EXPERTS)
        n = _id(path, number, "count", count, 1 << 53)
        w = 0 if window is None else _id(path, number, "window", window, 1 << 20)
        cell = cells[(path.stem if scenario is None else str(scenario).strip(), w)]
        if (i, j) in cell:
            raise ProfileError(f"'{path}', record {number}: layer {i}, expert {j} is counted twice in one scenario.")
        cell[i, j] = n
        total, most_layer, most_expert = total + n, max(most_layer, i), max(most_expert, j)
    if not cells:
        raise ProfileError(f"'{path}' has a header and no lines; record again with traffic.")
    shape = (most_layer + 1, most_expert + 1)
    if len(cells) * shape[0] * shape[1] > MAX_CELLS:
        raise ProfileError(
            f"'{path}' names {len(cells)} stretches of {shape[0]} layers x {shape[1]} experts, too many for one table."
        )
    steps = {key: _dense(cell, shape) for key, cell in cells.items()}
    found = []
    for name in dict.fromkeys(scenario for scenario, _ in steps):
        windows = np.stack([steps[key] for key in sorted(steps) if key[0] == name])
        found.append(
            Recording(
                name=name,
                counts=windows.sum(0),
                rows="either",
                windows=windows if len(windows) > 1 else np.zeros((0, *shape), np.int64),
                files=(str(path),),
            )
        )
    return found


def _dense(cell: dict[tuple[int, int], int], shape: tuple[int, int]) -> Ints:
    table = np.zeros(shape, np.int64)
    index = np.array(list(cell), np.int64)
    table[index[:, 0], index[:, 1]] = list(cell.values())
    return table


def _id(path: Path, number: int, what: str, value: Any, limit: int) -> int:
    """A whole number from 0 below a limit."""
    try:
        if isinstance(value, bool) or len(str(value)) > 32:
            raise ValueError("not a whole number")
        whole = int(str(value)) if not isinstance(value, float) else int(value)
        if not 0 <= whole < limit or (isinstance(value, float) and whole != value):
            raise ValueError("out of range")
    except (ValueError, OverflowError) as error:
        shown = str(value)[:40]
        raise ProfileError(
            f"'{path}', record {number}: {what} is {shown!r}; allowed is a whole number from 0 to {limit - 1}."
        ) from error
    return whole
