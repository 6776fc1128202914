"""Tables of measured kernel latencies as cost models: the layout of ai-dynamo/aiconfigurator, or a plain one of a user's own.

A plain table (`.csv` or `.parquet`) has the columns `experts` (activated on the rank), `pairs` (token-expert pairs on the
rank) and `latency` (ms). The other layout has `num_tokens` (of all ranks together), `hidden_size`, `inter_size`, `topk`,
`num_experts`, `moe_tp_size`, `moe_ep_size`, `moe_dtype`, `distribution` and `latency`; what was timed is one rank.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import ModelFacts
from equipoise.errors import PlanError, missing_package
from equipoise.planning.cost import ActivatedCost, CostModel, PairCost
from equipoise.planning.cost_measured import GroupCost, PointCost, curve, fit_roofline, point_cost

COSTS = {
    "tokens": "time follows token-expert pairs: arithmetic bound, as in prefill",
    "activated": "time follows activated replicas: memory bound, as in small decode batches",
}
"""Cost models without a table, by name; anything else is the path of a table."""
MOST_BYTES = 1 << 28
"""Largest table file that is read."""
MOST_ROWS = 1_000_000
MOST_TOKENS = 1 << 20
EVEN = ("balanced", "uniform")
"""Distributions in which a rank's pairs and activated experts follow from the row."""


def cost_model(cost: str, model: ModelFacts | None = None, **columns: str | int) -> CostModel:
    """The cost model of a name or of a table of measured latencies.

    Args:
        cost: `tokens`, `activated`, or the path of a table, which columns may follow: `TABLE.parquet:moe_dtype=fp8_block`,
            several with commas between.
        model: the model that is served; of a table in aiconfigurator's layout its shape selects the rows.
        **columns: values that select rows of a table (`moe_dtype="fp8_block"`, `hidden_size=7168`); they overrule the model's.

    Raises:
        PlanError: no such name or file, an unusable table, no row of that shape, or rows that differ in something that was
            not selected.
    """
    if cost in COSTS:
        if columns:
            raise PlanError(f"cost '{cost}' takes no options; {', '.join(columns)} given. They select rows of a table.")
        return PairCost() if cost == "tokens" else ActivatedCost()
    path, chosen = Path(cost), dict(columns)
    name, colon, selection = cost.rpartition(":")
    if colon and "=" in selection and not path.is_file():
        path = Path(name)
        chosen = {**dict(_column(part) for part in selection.split(",")), **chosen}
    if not path.is_file():
        raise PlanError(f"cost: '{cost}' given; allowed are {', '.join(COSTS)}, or the path of a .csv or .parquet table.")
    return read_table(path, model, **chosen)


def _column(part: str) -> tuple[str, str]:
    column, equals, value = part.partition("=")
    if not equals or not column.strip() or not value.strip():
        raise PlanError(f"cost: '{part}' given after the table; rows are selected by column=value, with commas between.")
    return column.strip(), value.strip()


def read_table(path: Path, model: ModelFacts | None = None, **columns: str | int) -> PointCost | GroupCost:
    """The cost model of a table file; see `cost_model`."""
    table = _columns(path)
    name = path.name
    for column in columns:
        if column not in table:
            raise PlanError(f"cost '{name}' has no column '{column}'; it has: {', '.join(table)}.")
    keep = np.ones(len(table["latency"]), bool)
    plain = {"experts", "pairs"} <= table.keys()
    wanted: dict[str, str | int] = {**({} if plain else _shape_of(model)), **columns}
    for column, value in wanted.items():
        there = table[column]
        match = there == (str(value) if there.dtype.kind in "UO" else _number(name, column, value))
        if not (keep & match).any():
            found = ", ".join(_distinct(there[keep]))
            raise PlanError(f"cost '{name}' has no row with {column} = {value}; with the rest as asked there are: {found}.")
        keep &= match
    if plain:
        return point_cost(name, table["experts"][keep], table["pairs"][keep], table["latency"][keep])
    return _from_ranks(name, {column: values[keep] for column, values in table.items()})


def _shape_of(model: ModelFacts | None) -> dict[str, str | int]:
    """What a model says about the rows that time its layers."""
    if model is None:
        return {}
    widest = max(model.layers, key=lambda layer: layer.num_experts)
    shape: dict[str, str | int] = {"num_experts": widest.num_experts, "topk": widest.top_k}
    if widest.matrices:
        down_rows, down_columns = widest.matrices[-1]  # of the down projection: model width, expert width
        shape |= {"hidden_size": down_rows, "inter_size": down_columns}
    return shape


def _from_ranks(name: str, table: Mapping[str, NDArray[Any]]) -> GroupCost:
    """Rows that time one of several equal ranks under even routing."""
    need = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size", "distribution")
    missing = [column for column in need if column not in table]
    if missing:
        raise PlanError(
            f"cost '{name}' lacks {', '.join(missing)}; it needs experts, pairs, latency, or aiconfigurator's layout."
        )
    keep = np.isin(table["distribution"].astype(str), EVEN)
    if "moe_tp_size" in table:
        keep &= table["moe_tp_size"] == 1
    if not keep.any():
        found = ", ".join(sorted(set(table["distribution"].astype(str))))
        raise PlanError(f"cost '{name}' has no row of an even distribution ({', '.join(EVEN)}) at moe_tp_size 1, but {found}.")
    for column in ("hidden_size", "inter_size", "topk", "num_experts", "moe_dtype"):
        values = _distinct(table[column][keep]) if column in table else []
        if len(values) > 1:
            raise PlanError(f"cost '{name}' has rows of several {column}: {', '.join(values)}; select one ({column}=...).")
    width, top_k = int(table["num_experts"][keep][0]), int(table["topk"][keep][0])
    tokens, ranks, ms = (table[column][keep].astype(np.float64) for column in ("num_tokens", "moe_ep_size", "latency"))
    whole = np.isfinite(tokens) & np.isfinite(ms) & (tokens >= 1) & (tokens <= MOST_TOKENS) & (ranks >= 1) & (ms > 0)
    if not whole.all() or not 1 <= top_k <= width <= MOST_TOKENS:
        raise PlanError(f"cost '{name}': a row has no usable num_tokens, moe_ep_size, topk or latency; correct the table.")
    counts = {t: _even_counts(int(t), width, top_k) for t in np.unique(tokens).tolist()}
    on_rank = [counts[t][: max(int(width // r), 1)] for t, r in zip(tokens.tolist(), ranks.tolist(), strict=True)]
    activated = np.array([(row > 0).sum() for row in on_rank], np.float64)
    pairs = np.array([row.sum() for row in on_rank], np.float64)
    sizes = np.unique(ranks)
    curves = tuple(curve(tokens[ranks == r], ms[ranks == r]) for r in sizes)
    return GroupCost(name, width, top_k, sizes, curves, fit_roofline(tokens, activated, pairs, ms))


def _even_counts(tokens: int, width: int, top_k: int) -> NDArray[np.int64]:
    """[E] pairs of each expert under the even routing that these tables were timed with.

    Column i of token t goes to expert t + i * ceil(E / K) modulo E; fewer tokens than that stride are spread over it.
    """
    stride = -(-width // top_k)
    first = np.arange(tokens) * (1.0 if tokens >= stride else stride / tokens)
    chosen = (first[:, None] + np.arange(top_k) * stride).astype(np.int64) % width
    return np.bincount(chosen.ravel(), minlength=width)


def _number(name: str, column: str, value: str | int) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise PlanError(f"cost '{name}': {column} = {value} given; that column holds numbers.") from error


def _distinct(values: NDArray[Any]) -> list[str]:
    """The first 20 values of a column, in order, for an error's text."""
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in np.unique(values)[:20].tolist()]


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    """All columns of a table file; numbers as float64, the rest as text."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise PlanError(f"cost '{path.name}' has {size:,} bytes; at most {MOST_BYTES:,} are read. Keep the rows of one model.")
    table = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    if "latency" not in table or not len(table["latency"]):
        raise PlanError(f"cost '{path.name}' has no rows with a column 'latency'; it has: {', '.join(table) or 'nothing'}.")
    return table


def _parquet(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("reading .parquet tables needs", "pyarrow", instead="give the table as .csv") from error
    try:
        file = parquet.ParquetFile(path)
        if file.metadata.num_rows > MOST_ROWS:
            raise PlanError(f"cost '{path.name}' has {file.metadata.num_rows:,} rows; at most {MOST_ROWS:,} are read.")
        columns = {name: file.read([name]).column(0).to_numpy() for name in file.schema_arrow.names}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PlanError(f"cost '{path.name}' is not a readable parquet table ({error}).") from error
    return {name: _array(path.name, name, values) for name, values in columns.items()}


def _csv(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"cost '{path.name}' is not a readable CSV table ({error}).") from error
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise PlanError(f"cost '{path.name}' has no rows; it needs the columns experts, pairs, latency and rows below them.")
    head = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(head):
            raise PlanError(f"cost '{path.name}' line {number} has {len(row)} fields, its head has {len(head)}.")
    return {name: _array(path.name, name, [row[i] for row in rows[1:]]) for i, name in enumerate(head)}


def _array(file: str, name: str, values: list[str] | NDArray[Any]) -> NDArray[Any]:
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        if name in ("latency", "experts", "pairs", "num_tokens", "topk", "num_experts", "moe_ep_size", "moe_tp_size"):
            raise PlanError(f"cost '{file}': column '{name}' must hold numbers ({error}).") from error
        return np.array([str(value) for value in values])
