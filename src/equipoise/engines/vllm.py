"""vLLM: `routed_experts` of its outputs and its load statistics are read, its proposed static mapping is written.

`--enable-return-routed-experts` (`LLM(enable_return_routed_experts=True)`) makes vLLM return each request's routing as an
array [tokens - 1, transformer layers, K] of logical expert ids; the last sampled token was never run. Offline it is
`CompletionOutput.routed_experts`, in OpenAI-style responses `choices[i].routed_experts`: a `.npy` file in base64. Dense layers
are rows of zeros. The load statistics (records of type `eplb_load_stats`) are loads of physical slots with their map; they and
the mapping file are the format of vLLM's pull request 41141, which no release has. Released vLLM takes a plan by our plug-in
(`vllm_plugin.py`) or as a permuted checkpoint (`permuted.py`).

Shapes: T tokens of a request, N transformer layers, L MoE layers, E logical experts, P physical slots, K top-k.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.engines.model_config import MAX_EXPERTS, ModelConfig
from equipoise.engines.placement import Written, checked_slots, physical_slots
from equipoise.engines.records import Recording, as_counts, to_logical
from equipoise.engines.token_tally import Stretches, TokenTally
from equipoise.engines.untrusted import MAX_TEXT_BYTES, npz_bytes, parse_json, read_json, read_npy, read_npz, refuse, size_of
from equipoise.errors import PlanError, ProfileError

LOAD_STATS, LOAD_META, MAPPING = "eplb_load_stats", "eplb_load_meta", "eplb_initial_mapping"
MAX_LINE_BYTES = 1 << 26
"""Longest line of a JSONL file that is parsed."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request's routing.

    Attributes:
        experts_TNK: [T, N, K] expert ids, or None where vLLM returned none (the request was aborted).
        prompt: tokens of the prompt, which are prefill; None when not known.
        skip: leading tokens that were not run for this request: cached, or counted with another choice of the same prompt.
    """

    experts_TNK: NDArray[Any] | None
    prompt: int | None = None
    skip: int = 0


def read_vllm(path: Path, name: str, *, config: ModelConfig | None = None, experts: int | None = None) -> Recording:
    """The recording that one file of vLLM's holds.

    Args:
        path: `.npy` (one request's array), `.npz` (of `save_outputs`, or one array per request), `.json` or `.jsonl`
            (responses, one or many), or `.jsonl` of load statistics.
        name: of the traffic.
        config: the model's configuration, which tells how many experts there are.
        experts: the same, where there is no configuration.

    Raises:
        ProfileError: not such a file, not whole, or not of this model.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _of_requests([Request(read_npy(path))], path, name, config, experts)
    if suffix == ".npz":
        return _of_requests(_of_npz(path), path, name, config, experts)
    if suffix not in (".json", ".jsonl"):
        raise ProfileError(
            f"'{path}' is of no kind that is read for vLLM; give .npy or .npz arrays, .json or .jsonl responses or statistics."
        )
    first, objects = _peek(_objects(path))
    if isinstance(first, Mapping) and "record_type" in first:
        return _of_load_stats(objects, path, name)
    return _of_requests(_of_responses(objects, path), path, name, config, experts)


def save_outputs(outputs: Sequence[Any], path: str | Path) -> None:
    """Write what `LLM.generate` returned under `enable_return_routed_experts=True` to one `.npz` that `read_vllm` reads.

    Args:
        outputs: vLLM's `RequestOutput`s.
        path: where to.

    Raises:
        ProfileError: no output carries routed experts.
    """
    arrays, rows = [], []
    for output in outputs:
        for number, choice in enumerate(output.outputs):
            if choice.routed_experts is None:
                continue
            prompt = len(output.prompt_token_ids or ())
            skip = prompt if number else int(output.num_cached_tokens or 0)
            arrays.append(np.asarray(choice.routed_experts))
            rows.append((len(arrays[-1]), prompt, min(skip, len(arrays[-1]))))
    if not arrays:
        raise ProfileError("no output carries routed experts; make the LLM with enable_return_routed_experts=True.")
    tokens, prompt_tokens, skipped = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    joined = {
        "routed_experts": np.concatenate(arrays),
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "skipped_tokens": skipped,
    }
    write_atomic(path, npz_bytes(joined))


def write_mapping(plan: Plan, out: Path) -> Written:
    """Write a plan as vLLM's proposed static mapping, and say how released vLLM takes it.

    Args:
        plan: of one number of slots for all layers and one precision; ranks are vLLM's expert-parallel ranks.
        out: the JSONL file; layers are counted from 0 over MoE layers only.

    Raises:
        PlanError: vLLM cannot hold the plan.
    """
    physical_LP = physical_slots(plan, "vllm")
    slots, experts = len(physical_LP[0]), plan.model.max_experts
    record = {
        "record_type": MAPPING,
        "version": 1,
        "num_redundant_experts": slots - experts,
        "num_slots": slots,
        "initial_global_assignments": {str(layer): slots_P.tolist() for layer, slots_P in enumerate(physical_LP)},
    }
    write_atomic(out, json.dumps(record) + "\n")
    return Written((out,), eplb_flags(plan, out))


def eplb_flags(plan: Plan, mapping: Path) -> str:
    """What to give vLLM so that it runs with a plan: by our plug-in today, by its own option once it has one.

    Args:
        plan: the plan, saved as PLAN.
        mapping: the same as vLLM's mapping file.
    """
    redundant = plan.layers[0].num_slots - plan.model.max_experts
    never = '"step_interval": 1000000000, "window_size": 1'
    return "\n".join(
        [
            f"# vLLM 0.32 with the Equipoise plug-in, on {plan.units} expert-parallel ranks (tensor x data parallel size):",
            f"EQUIPOISE_PLAN=PLAN vllm serve MODEL --data-parallel-size {plan.units} --enable-expert-parallel --enable-eplb "
            f"--eplb-config '{{\"num_redundant_experts\": {redundant}, {never}}}'",
            "# vLLM built with pull request 41141 (option as proposed there, not released):",
            f'--enable-expert-parallel --enable-eplb --eplb-config \'{{"num_redundant_experts": {redundant}, '
            f'"initial_mapping_path": "{mapping}", "disable_online_rebalancing": true}}\'',
        ]
    )


def read_mapping(path: Path, model: ModelFacts, ranks: int) -> list[NDArray[np.int64]]:
    """The placement that a mapping file holds, checked by the rules that vLLM's proposal states.

    Args:
        path: the JSONL file.
        model: the model that it is for.
        ranks: expert-parallel ranks R.

    Returns:
        L arrays [P] of expert ids, rank-major.

    Raises:
        PlanError: not such a file, or of another model.
    """
    what = f"'{path}'"
    records = [r for r in _objects(path) if isinstance(r, Mapping) and r.get("record_type") == MAPPING]
    if len(records) != 1 or not _is_whole(records[0].get("version"), 1):
        raise PlanError(f"{what} holds {len(records)} records of type {MAPPING}; one of version 1 is expected.")
    rows = records[0].get("initial_global_assignments")
    keys = [str(layer) for layer in range(len(model.layers))]
    if not isinstance(rows, Mapping) or sorted(rows) != sorted(keys):
        raise PlanError(f"{what} does not assign the model's MoE layers 0 to {len(keys) - 1}; it is of another model.")
    physical_LP = checked_slots([rows[key] for key in keys], model, ranks, what)
    stated = records[0].get("num_slots"), records[0].get("num_redundant_experts")
    wanted = {(len(p), len(p) - model.max_experts) for p in physical_LP}
    if len(wanted) != 1 or not all(_is_whole(one, other) for one, other in zip(stated, *wanted, strict=True)):
        raise PlanError(f"{what} states {stated[0]} slots and {stated[1]} redundant experts, but assigns others.")
    return physical_LP


def _is_whole(value: object, number: int) -> bool:
    """Whether a JSON value is this whole number; in Python, true and 1.0 equal 1 as well."""
    return type(value) is int and value == number


def _of_requests(
    requests: Iterator[Request] | Sequence[Request], path: Path, name: str, config: ModelConfig | None, experts: int | None
) -> Recording:
    """Sum requests; the layers that never got anything but zeros are dense."""
    size_e = config.num_experts if config else experts
    if size_e is None:
        raise ProfileError(
            f"'{path}' does not tell how many experts the model has; give its config.json (--config) or the number (--experts)."
        )
    if not 1 <= size_e <= MAX_EXPERTS:
        raise ProfileError(f"experts: {size_e} given; allowed is 1 to {MAX_EXPERTS}.")
    tally: TokenTally | None = None
    for number, request in enumerate(requests):
        if request.experts_TNK is None:
            continue
        what = f"'{path}', request {number}"
        ids = _ids(request.experts_TNK, what)
        if tally is None:
            _fits(ids.shape[1:], config, what)
            tally = TokenTally(ids.shape[1], size_e, ids.shape[2], config.moe_layers if config else None)
        tally.add(ids, what, prompt=request.prompt, skip=request.skip)
    if tally is None:
        raise ProfileError(
            f"'{path}' carries no routed experts; serve with --enable-return-routed-experts and keep the whole responses."
        )
    return tally.recording(name)


def _ids(experts_TNK: NDArray[Any], what: str) -> NDArray[Any]:
    if experts_TNK.ndim != 3 or experts_TNK.dtype.kind not in "ui":
        raise ProfileError(
            f"{what}: routed experts are {experts_TNK.dtype} of shape {experts_TNK.shape}; "
            "whole numbers [tokens, layers, top-k] are expected."
        )
    return experts_TNK


def _fits(shape: tuple[int, ...], config: ModelConfig | None, what: str) -> None:
    if config is not None and shape != (config.hidden_layers, config.top_k):
        raise ProfileError(
            f"{what} has {shape[0]} layers, top-{shape[1]}; '{config.name}' has {config.hidden_layers}, top-{config.top_k}."
        )


def _of_npz(path: Path) -> Iterator[Request]:
    arrays = read_npz(path)
    joined = arrays.get("routed_experts")
    if joined is None or "tokens" not in arrays:
        yield from (Request(array) for key, array in arrays.items() if key not in ("prompt_tokens", "skipped_tokens"))
        return
    tokens = as_counts(arrays["tokens"], f"'{path}': tokens", 1)
    prompt, skip = (
        as_counts(arrays[key], f"'{path}': {key}", 1) if key in arrays else None for key in ("prompt_tokens", "skipped_tokens")
    )
    lengths = {len(column) for column in (tokens, prompt, skip) if column is not None}
    if joined.ndim != 3 or tokens.sum() != len(joined) or len(lengths) > 1:
        raise ProfileError(f"'{path}': {len(joined)} rows of routed experts and {tokens.sum()} tokens do not belong together.")
    for number, end in enumerate(np.cumsum(tokens).tolist()):
        yield Request(
            joined[end - int(tokens[number]) : end],
            prompt=None if prompt is None else int(prompt[number]),
            skip=0 if skip is None else int(skip[number]),
        )


def _objects(path: Path) -> Iterator[Any]:
    """The JSON values of a file, one at a time where it has one a line."""
    if path.suffix.lower() == ".json":
        content = read_json(path)
        yield from content if isinstance(content, list) else [content]
        return
    size_of(path, MAX_TEXT_BYTES * 16)
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ProfileError(f"'{path}', line {number} is longer than {MAX_LINE_BYTES:,} bytes; write one record a line.")
            if line.strip():
                try:
                    yield parse_json(line.decode("utf-8"), path)
                except UnicodeDecodeError as error:
                    refuse(path, f"line {number}: {error}", "a JSONL file")


def _peek(values: Iterator[Any]) -> tuple[Any, Iterator[Any]]:
    first = next(values, None)
    return first, itertools.chain([first] if first is not None else [], values)


def _of_responses(responses: Iterator[Any], path: Path) -> Iterator[Request]:
    for number, response in enumerate(responses):
        what = f"'{path}', response {number}"
        choices = response.get("choices") if isinstance(response, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
            raise ProfileError(f"{what} is no OpenAI-style response: it has no list of choices.")
        usage = response.get("usage")
        usage = usage if isinstance(usage, Mapping) else {}
        details = usage.get("prompt_tokens_details")
        cached = _number(details.get("cached_tokens")) if isinstance(details, Mapping) else None
        for choice in choices:
            encoded = choice.get("routed_experts")
            given = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
            single = len(choices) == 1
            prompt = len(given) if isinstance(given, list) else _number(usage.get("prompt_tokens")) if single else None
            array = None if encoded is None else _decoded(encoded, f"{what}: routed_experts")
            yield Request(array, prompt=prompt, skip=(cached or 0) if single else 0)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _decoded(encoded: Any, what: str) -> NDArray[Any]:
    """The array of a `.npy` file in base64, which must be as long as its header says."""
    if not isinstance(encoded, str):
        raise ProfileError(f"{what} is a {type(encoded).__name__}; a .npy file in base64 is expected.")
    try:
        data = base64.b64decode(encoded, validate=True)
        buffer = io.BytesIO(data)
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise ValueError("another version of the .npy format than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
        if dtype.kind not in "ui" or fortran:
            raise ValueError(f"an array of {dtype} that is no plain array of whole numbers")
        flat = np.frombuffer(data, dtype, offset=buffer.tell())
        return flat.reshape(tuple(int(n) for n in shape))  # refuses a shape that its bytes do not fill
    except (binascii.Error, ValueError, OverflowError, SyntaxError) as error:
        raise ProfileError(f"{what} is not a .npy file in base64 that is whole: {error}.") from error


def _of_load_stats(records: Iterator[Any], path: Path, name: str) -> Recording:
    """Loads of physical slots, mapped back to logical experts; each record is a stretch of time."""
    stretches, shape = Stretches(), None
    for number, record in enumerate(records):
        what = f"'{path}', record {number}"
        kind = record.get("record_type") if isinstance(record, Mapping) else None
        if not isinstance(record, Mapping) or kind is None:
            raise ProfileError(f"{what} has no record_type; give vLLM's load statistics as it wrote them.")
        if kind == LOAD_STATS:
            if not _is_whole(record.get("version"), 1):
                raise ProfileError(f"{what} is of version {record.get('version')!r}; version 1 is read.")
            load_LE = _logical_load(record, what)
            if shape is not None and load_LE.shape != shape:
                raise ProfileError(f"{what} has loads of shape {load_LE.shape}, earlier records {shape}.")
            shape = load_LE.shape
            stretches.add(load_LE)
        elif kind != LOAD_META:
            raise ProfileError(f"{what} is of type '{kind}'; {LOAD_STATS} is expected.")
    if shape is None:
        raise ProfileError(f"'{path}' has no {LOAD_STATS} records; let the server run with traffic, then copy the file again.")
    windows = stretches.array()
    return Recording(name=name, counts=np.asarray(windows.sum(0)), rows="moe", windows=windows)


def _logical_load(record: Mapping[str, Any], what: str) -> NDArray[np.int64]:
    load_LP = as_counts(record.get("expert_load", ()), f"{what}: expert_load", 2)
    map_LP = as_counts(record.get("p2l_map", ()), f"{what}: p2l_map", 2)
    return to_logical(load_LP, map_LP, what)
