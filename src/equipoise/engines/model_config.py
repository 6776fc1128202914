"""What a Hugging Face `config.json` says of a model's experts, read without torch or transformers.

Shapes: D model width, F expert width, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.engines.untrusted import read_json
from equipoise.errors import ProfileError

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
FIRST_MOE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
MAX_LAYERS, MAX_EXPERTS = 1 << 10, 1 << 13


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's experts as its configuration describes them.

    Attributes:
        name: of the model, for people.
        model_type: family name of transformers.
        dtype: storage format of the unquantized weights: fp32, fp16 or bf16.
        hidden_layers: transformer layers, dense ones counted.
        moe_layers: indices of those with routed experts.
        num_experts: routed experts E of each.
        top_k: experts that a token is sent to.
        num_shared: shared experts.
        matrices: [rows, columns] of one expert's weights; empty when the configuration does not tell.
        expert_groups: groups of group-limited routing; 1 = none.
    """

    name: str
    model_type: str
    dtype: str
    hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    num_shared: int
    matrices: tuple[tuple[int, int], ...]
    expert_groups: int


def read_config(path: Path) -> ModelConfig:
    """Read a `config.json`, or the one in a model's directory.

    Raises:
        ProfileError: missing, not JSON, or without routed experts.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    data = read_json(path)
    if not isinstance(data, Mapping):
        raise ProfileError(f"'{path}' is not a model's config.json: it holds a {type(data).__name__}, not an object.")
    outer, data = data, _text_part(data)

    def number(names: tuple[str, ...], what: str, most: int, default: int | None = None) -> int:
        for name in names:
            value = data.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ProfileError(f"'{path}': {name} is {value!r}; allowed is a whole number from 0 to {most}.")
            return value
        if default is None:
            raise ProfileError(
                f"'{path}' has no {what} ({', '.join(names)}); give the config.json of a model with routed experts."
            )
        return default

    hidden = number(("num_hidden_layers", "n_layer", "num_layers"), "number of layers", MAX_LAYERS)
    experts = number(EXPERTS, "number of routed experts", MAX_EXPERTS)
    top_k = number(TOP_K, "top-k", MAX_EXPERTS)
    if not (hidden and experts and 1 <= top_k <= experts):
        raise ProfileError(f"'{path}' describes {hidden} layers, {experts} experts and top-{top_k}; this is no MoE model.")
    groups = number(("n_group", "num_expert_group"), "groups", MAX_EXPERTS, default=1) or 1
    width, expert_width = number(("hidden_size",), "", 1 << 24, default=0), number(EXPERT_WIDTH, "", 1 << 24, default=0)
    layers = _moe_layers(data, hidden, number(FIRST_MOE, "", MAX_LAYERS, default=0))
    if not layers:
        raise ProfileError(f"'{path}' describes no layer with routed experts; give the config.json of a MoE model.")
    dtype = str(data.get("torch_dtype") or data.get("dtype") or outer.get("torch_dtype") or "bfloat16")
    return ModelConfig(
        name=str(outer.get("_name_or_path") or path.parent.resolve().name),
        model_type=str(data.get("model_type") or outer.get("model_type") or "unknown"),
        dtype=DTYPES.get(dtype.removeprefix("torch."), "bf16"),
        hidden_layers=hidden,
        moe_layers=layers,
        num_experts=experts,
        top_k=top_k,
        num_shared=number(SHARED, "", MAX_EXPERTS, default=0),
        matrices=((2 * expert_width, width), (width, expert_width)) if width and expert_width else (),
        expert_groups=groups if experts % groups == 0 else 1,
    )


def _text_part(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's own configuration inside that of a multimodal model."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        part = data.get(key)
        if isinstance(part, Mapping) and not any(name in data for name in EXPERTS):
            return _text_part(part)
    return data


def _moe_layers(data: Mapping[str, Any], hidden: int, first: int) -> tuple[int, ...]:
    """Which layers have routed experts, by the few ways in which model families say it."""
    listed = data.get("moe_layers")
    if isinstance(listed, list):
        return tuple(sorted({int(i) for i in listed if isinstance(i, int) and 0 <= i < hidden}))
    frequency = data.get("moe_layer_freq", data.get("interleave_moe_layer_step", data.get("moe_layer_interval", 1)))
    if isinstance(frequency, list):  # one flag per layer
        return tuple(i for i, flag in enumerate(frequency[:hidden]) if flag)
    step = frequency if isinstance(frequency, int) and frequency > 0 else 1
    layers = [i for i in range(first, hidden) if i % step == 0]
    if isinstance(data.get("interleave_moe_layer_step"), int):
        layers = list(range(step - 1, hidden, step))
    sparse = data.get("decoder_sparse_step")
    if isinstance(sparse, int) and sparse > 0:
        dense = data.get("mlp_only_layers")
        skip = set(dense) if isinstance(dense, list) and all(isinstance(i, int) for i in dense) else set()
        layers = [i for i in range(hidden) if (i + 1) % sparse == 0 and i not in skip]
    period, offset = data.get("expert_layer_period"), data.get("expert_layer_offset")
    if isinstance(period, int) and isinstance(offset, int) and period > 0:
        layers = [i for i in range(hidden) if i % period == offset]
    last = data.get("moe_layer_end_index")
    if isinstance(last, int) and last >= 0:
        layers = [i for i in layers if i <= last]
    return tuple(layers)
