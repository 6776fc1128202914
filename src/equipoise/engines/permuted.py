"""A plan as a permuted checkpoint: experts and router rows reordered so that an engine's own linear placement is the plan.

For engines without a way to load a map. Logical expert ids are only names: when the rows of the router, its selection bias and
the experts of a layer change places together, every token meets the same experts with the same weights, and the output is the
same up to the order of summation. Group-limited routing sees neighbours as groups, so groups stay together.
Files are rewritten one by one; no tensor is computed with, and no model is loaded.

Shapes: L MoE layers, E experts, P physical slots, R ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.engines.model_config import read_config
from equipoise.engines.permuted_order import find_order, keeps_groups, linear_slots, order_of
from equipoise.engines.placement import Written, physical_slots, transformer_layers
from equipoise.engines.safetensors_rewrite import Reorder, Tensor, rewrite, tensors_of
from equipoise.errors import CheckpointError, PlanError
from equipoise.planning.ranks import phase_load, rank_plan

Ints = NDArray[np.int64]
ORDER_FILE, PLAN_FILE = "equipoise.permuted.json", "permuted.plan.json"
INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"^(?P<block>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?)experts\.(?P<rest>.+)$")
ROUTER = {
    "gate.weight", "gate.bias", "gate.e_score_correction_bias", "gate.expert_bias", "gate.wg.weight",
    "router.weight", "router.bias", "router.e_score_correction_bias", "router.layer.weight", "router.gate.weight",
    "e_score_correction_bias", "expert_bias", "moe_statics.e_score_correction_bias",
}  # fmt: skip
"""Tensors beside a layer's experts that have a row, or an entry, per expert."""

SHARED = ("shared_expert.", "shared_experts.", "shared_expert_gate.", "shared_mlp.")
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}
NAMES_EXPERTS = re.compile(rb"experts\\*\.\d")


@dataclass(eq=False)
class Block:
    """The tensors of one layer's MoE block: name -> which they are."""

    experts: dict[str, str] = field(default_factory=dict)
    siblings: dict[str, str] = field(default_factory=dict)


def write_permuted(plan: Plan, out: Path, *, model: Path | str, profile: Path | str | None = None) -> Written:
    """Write a checkpoint whose linear placement is the plan, or comes as near to it as linear placement can.

    Args:
        plan: of one number of slots for all layers and one precision; its units are the ranks.
        out: a new or empty directory.
        model: the checkpoint's directory, with safetensors files.
        profile: the profile to balance on where no order of experts is exactly the plan: vLLM copies the first experts and no
            others, and groups of group-limited routing stay together.

    Raises:
        PlanError: no order of experts is the plan, and no profile was given; or the plan is of another model.
        CheckpointError: the checkpoint has no safetensors, or tensors of which it is not known what they mean.
    """
    source = Path(model)
    tensors = _tensors(source)
    config = read_config(source)
    if (config.num_experts, len(config.moe_layers)) != (plan.model.max_experts, len(plan.layers)):
        raise PlanError(
            f"the plan is for {len(plan.layers)} MoE layers of {plan.model.max_experts} experts, '{source}' has "
            f"{len(config.moe_layers)} of {config.num_experts}; give the plan's model."
        )
    layers, _ = transformer_layers(plan.model, "a permuted checkpoint", source)
    groups = max(plan.model.expert_groups, config.expert_groups)
    held, order_LE = permuted_plan(plan, None if profile is None else Profile.load_file(profile), groups)
    blocks = _blocks([name for shard in tensors.values() for name in shard], layers)
    _refuse_named_experts(source)
    shards = {path: _changes(shard, blocks, order_LE, config.num_experts) for path, shard in tensors.items()}
    record = {
        "ranks": plan.units,
        "slots": held.layers[0].num_slots,
        "experts_at_place": dict(zip(map(str, layers), order_LE, strict=True)),
    }
    text = json.dumps(record, default=lambda order: order.tolist()) + "\n"
    files = _write(source, Path(out), shards, {ORDER_FILE: text, PLAN_FILE: held.to_json()})
    return Written(files, _flags(held, plan, Path(out)))


def permuted_plan(plan: Plan, profile: Profile | None, groups: int = 1) -> tuple[Plan, list[Ints]]:
    """The plan that a permuted checkpoint can hold, and the order of each layer's experts.

    Args:
        plan: the wanted plan.
        profile: loads to balance on where no order of experts is exactly the plan.
        groups: of group-limited routing; 1 = none.

    Returns:
        The wanted plan itself, or the nearest found; L arrays [E], the original expert at each place.

    Raises:
        PlanError: an order would have to be searched for, and there is no profile; or more copies than experts are asked for.
    """
    engine = "a permuted checkpoint"
    physical_LP, experts = physical_slots(plan, engine), plan.model.max_experts
    slots = len(physical_LP[0])
    exact = [order_of(p, experts, groups) for p in physical_LP]
    orders = [order for order in exact if order is not None]
    if len(orders) == len(exact):
        return plan, orders
    if slots > 2 * experts:
        raise PlanError(f"{engine} has at most one copy of each expert, {2 * experts} slots; the plan has {slots}.")
    if profile is None:
        why = (
            "splits the router's expert groups"
            if slots == experts
            else "copies others than the first experts, or not onto the last slots"
        )
        raise PlanError(
            f"no order of experts is exactly this plan: it {why}. Give --profile with the plan's profile "
            "to get the nearest order that there is, or plan without copies."
        )
    plan.check_profile(profile)
    load_SLE = phase_load(profile).astype(np.float64)
    orders = [find_order(load_SLE[:, layer], slots, plan.units, groups) for layer in range(len(physical_LP))]
    assert all(keeps_groups(order, groups) for order in orders), "an order must keep the groups"
    held = rank_plan(
        profile,
        [linear_slots(order, slots) for order in orders],
        ranks=plan.units,
        nodes=plan.nodes,
        method="permuted",
        options={"wanted": plan.method, "groups": groups},
        note=f"the nearest plan that linear placement holds; wanted was one of method '{plan.method}'.",
    )
    return held, orders


def _tensors(source: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each safetensors file, checked against the index where there is one."""
    if (source / ORDER_FILE).exists():
        raise CheckpointError(f"'{source}' is a permuted checkpoint itself; give the original one.")
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if not files:
        raise CheckpointError(f"'{source}' has no .safetensors files; give the directory of a checkpoint that has.")
    tensors = {path: tensors_of(path) for path in files}
    names = [name for shard in tensors.values() for name in shard]
    twice = len(names) - len(set(names))
    if twice:
        raise CheckpointError(f"'{source}' has {twice} tensors in several files; keep one form of the checkpoint.")
    if (source / INDEX).exists():
        listed = _index(source).get("weight_map")
        if not isinstance(listed, Mapping) or set(listed) != set(names):
            raise CheckpointError(f"'{source}' is not whole: its index lists other tensors than its files hold; copy it again.")
    return tensors


def _blocks(names: Sequence[str], layers: Sequence[int]) -> list[Block]:
    """The MoE block of each of the given transformer layers, in their order."""
    families: dict[str, dict[int, Block]] = defaultdict(lambda: defaultdict(Block))
    starts: dict[str, tuple[str, int]] = {}
    for name in names:
        if match := EXPERT.match(name):
            start, layer = match["block"], int(match["layer"])
            family = start.replace(f"layers.{layer}.", "layers.*.", 1)
            families[family][layer].experts[name] = match["rest"]
            starts[start] = family, layer
    fitting = [family for family, found in families.items() if set(layers) <= set(found)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"experts of layers {layers[0]} to {layers[-1]} are found under {len(fitting)} names, one is expected "
            f"({', '.join(families) or 'none'}); this family of models cannot be permuted."
        )
    for name in names:
        for start, (family, layer) in starts.items():
            if family == fitting[0] and name.startswith(start) and name not in families[family][layer].experts:
                families[family][layer].siblings[name] = name.removeprefix(start)
    return [families[fitting[0]][layer] for layer in layers]


def _changes(
    shard: Mapping[str, Tensor], blocks: Sequence[Block], order_LE: Sequence[Ints], experts: int
) -> tuple[dict[str, str], dict[str, Reorder]]:
    """New names and new orders of the tensors of one file."""
    names: dict[str, str] = {}
    reorders: dict[str, Reorder] = {}
    for block, order in zip(blocks, order_LE, strict=True):
        place = np.argsort(order)
        for name, rest in block.experts.items():
            if name not in shard:
                continue
            number, _, end = rest.partition(".")
            if number.isdecimal():
                if int(number) >= experts:
                    raise CheckpointError(
                        f"tensor '{name}' is of expert {number}, the model has {experts}; it is no plain checkpoint."
                    )
                names[name] = f"{name.removesuffix(rest)}{place[int(number)]}.{end}"
            else:
                reorders[name] = Reorder(_axis(name, shard[name], experts), order)
        for name, rest in block.siblings.items():
            if name in shard and not rest.startswith(SHARED):
                if rest not in ROUTER:
                    raise CheckpointError(
                        f"tensor '{name}' lies beside experts, and it is not known whether it has rows for them; "
                        "this family of models cannot be permuted."
                    )
                reorders[name] = Reorder(_axis(name, shard[name], experts), order)
    return names, reorders


def _axis(name: str, tensor: Tensor, experts: int) -> int:
    """The axis of a tensor along which its experts lie: the first, or the second of [1, E]."""
    shape = tensor.shape
    axis = 1 if len(shape) == 2 and shape[0] == 1 and experts > 1 else 0
    if len(shape) <= axis or shape[axis] != experts:
        raise CheckpointError(f"tensor '{name}' has shape {list(shape)}, of which no axis is that of {experts} experts.")
    return axis


def _refuse_named_experts(source: Path) -> None:
    """Configurations that name single experts, such as a list of layers left unquantized, would have to be renamed as well."""
    for path in source.glob("*.json"):
        if (
            path.name != INDEX
            and path.stat().st_size < 1 << 24
            and "token" not in path.name
            and NAMES_EXPERTS.search(path.read_bytes())
        ):
            raise CheckpointError(f"'{path}' names single experts by their numbers, which would change; this is not supported.")


def _write(
    source: Path, out: Path, shards: Mapping[Path, tuple[dict[str, str], dict[str, Reorder]]], more: Mapping[str, str]
) -> tuple[Path, ...]:
    """All files in a hidden directory beside the destination, which is renamed when it is whole."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"'{out}' is not empty; choose a new directory.")
    out = Path(os.path.abspath(out))
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        for path, (names, reorders) in shards.items():
            rewrite(path, temporary / path.name, names, reorders)
        if (source / INDEX).exists():
            index, names = _index(source), {old: new for part, _ in shards.values() for old, new in part.items()}
            index["weight_map"] = {names.get(name, name): file for name, file in index["weight_map"].items()}
            (temporary / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in source.iterdir():
            if path.is_file() and path not in shards and path.name != INDEX and path.suffix not in OTHER_WEIGHTS:
                shutil.copyfile(path, temporary / path.name)
        for name, text in more.items():
            (temporary / name).write_text(text, encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes private directories
        temporary.replace(out)
    except OSError as error:
        raise CheckpointError(f"cannot write '{out}': {error.strerror or error}. Choose a place with enough room.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted(out.iterdir()))


def _index(source: Path) -> dict[str, Any]:
    try:
        content = json.loads((source / INDEX).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read '{source / INDEX}': {error}.") from error
    return content if isinstance(content, dict) else {}


def _flags(held: Plan, wanted: Plan, out: Path) -> str:
    redundant = held.layers[0].num_slots - held.model.max_experts
    lines = [f"# vLLM, any release with expert parallelism, on {held.units} expert-parallel ranks:"]
    serve = f"vllm serve {out} --data-parallel-size {held.units} --enable-expert-parallel"
    if redundant:
        eplb = {"num_redundant_experts": redundant, "step_interval": 1_000_000_000, "window_size": 1}
        serve += f" --enable-eplb --eplb-config '{json.dumps(eplb)}'"
    lines.append(serve)
    if held is not wanted and held.predicted and wanted.predicted:
        lines.append(
            f"# Predicted max/mean rank load on the profile: {held.predicted.lis:.3f}; the plan that was wanted: "
            f"{wanted.predicted.lis:.3f}, which linear placement cannot hold."
        )
    lines.append("# Expert ids of this checkpoint are places; equipoise.permuted.json tells the original expert at each.")
    return "\n".join(lines)
