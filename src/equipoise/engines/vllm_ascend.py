"""vllm-ascend: the expert map file of its static placement (`expert_map_path`).

Shapes: L MoE layers, P physical slots, R ranks ("devices").
"""

from __future__ import annotations

import json
from pathlib import Path

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.engines.placement import Written, checked_slots, physical_slots, whole_numbers
from equipoise.engines.records import Ints
from equipoise.engines.untrusted import read_json
from equipoise.errors import PlanError


def write(plan: Plan, out: Path) -> Written:
    """Write the expert map: for each MoE layer, from 0, the experts of each device.

    Args:
        plan: a plan with equally many slots everywhere and no expert twice on a device.
        out: the file; its name must end in .json.

    Raises:
        PlanError: vllm-ascend cannot hold the plan, or the ending is another.
    """
    if out.suffix != ".json":
        raise PlanError(f"'{out}': vllm-ascend takes an expert map whose name ends in .json.")
    ranks = plan.units
    layers = [
        {
            "layer_id": index,
            "device_count": ranks,
            "device_list": [
                {"device_id": rank, "device_expert": part} for rank, part in enumerate(slots.reshape(ranks, -1).tolist())
            ],
        }
        for index, slots in enumerate(physical_slots(plan, "vllm-ascend", duplicates=False))
    ]
    lines = ",\n".join(json.dumps(layer) for layer in layers)
    write_atomic(out, f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n{lines}\n]}}\n')
    redundant = plan.layers[0].num_slots - plan.model.max_experts
    settings = json.dumps({"eplb_config": {"expert_map_path": str(out)}})
    return Written(
        (out,),
        f"--enable-expert-parallel --additional-config '{settings}'\n# {redundant} redundant experts, taken from the map",
    )


def read_plan(path: Path, model: ModelFacts, ranks: int) -> list[Ints]:
    """The physical slots of each MoE layer from an expert map.

    Args:
        path: the file.
        model: facts of the model that it is for.
        ranks: R.

    Raises:
        PlanError: what vllm-ascend would refuse: layers or devices missing or out of order, devices with different numbers of
            experts, an expert without a device or twice on one.
    """
    data, what = read_json(path), f"'{path}'"
    layers = data.get("layer_list") if isinstance(data, dict) else None
    if not isinstance(layers, list) or not isinstance(data, dict) or data.get("moe_layer_count") != len(layers):
        raise PlanError(f"{what} has no layer_list of moe_layer_count layers; it is not an expert map of vllm-ascend.")
    rows = []
    for index, layer in enumerate(layers):
        devices = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(devices, list) or layer.get("layer_id") != index or layer.get("device_count") != len(devices):
            raise PlanError(f"{what}: layer {index} is missing or does not have the devices that it counts.")
        if len(devices) != ranks:
            raise PlanError(f"{what}: layer {index} has {len(devices)} devices, {ranks} ranks are expected.")
        parts = []
        for rank, device in enumerate(devices):
            if not isinstance(device, dict) or device.get("device_id") != rank:
                raise PlanError(f"{what}: layer {index} has no device {rank} in its place.")
            parts.append(whole_numbers(device.get("device_expert"), f"{what}, layer {index}, device {rank}").tolist())
            if len(set(parts[-1])) != len(parts[-1]):
                raise PlanError(f"{what}: layer {index}, device {rank} has an expert twice.")
        rows.append(parts)
    if len({len(part) for parts in rows for part in parts}) > 1:
        raise PlanError(f"{what}: devices have different numbers of experts.")
    return checked_slots([[expert for part in parts for expert in part] for parts in rows], model, ranks, what)
