"""Tiny random models of every MoE architecture in the installed transformers; other rooms' tests import `tiny` from here.

An architecture is a folder of `transformers.models` that holds an experts class; `discover` finds them in the source, so
that a new transformers release shows up as an architecture that is not in the matrix. Sizes come from one table (`SIZES`),
applied to every field that a configuration has; `ARCHITECTURES` holds only what an architecture needs beyond it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
PAD = 0

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 1024,
    "max_seq_len": 128,
    "sliding_window": 64,
    # width and depth
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_layers", "num_decoder_layers", "depth"), 2),
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_head_dim"), 8),
    "qk_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), 16),
    "shared_experts_intermediate_size": 16,
    "router_hidden_size": 16,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("hidden_size_per_layer_input",), 0),
    "vocab_size_per_layer_input": VOCABULARY,
}

SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of one architecture, and what of the matrix cannot hold for it.

    Attributes:
        cls: class name, when the first of CausalLM, ConditionalGeneration and TextModel is not the one.
        fields: configuration fields beyond `SIZES`.
        unsized: names of `SIZES` that must keep the configuration's default.
        padding: why counts under padding may differ from those of each sequence alone; empty when they may not.
        skip: why no tiny model can be built, or why the architecture cannot be read.
    """

    cls: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    unsized: tuple[str, ...] = ()
    padding: str = ""
    skip: str = ""


TOP2 = {"num_experts_per_tok": 2, "n_routed_experts": 6}

ARCHITECTURES: dict[str, Architecture] = {
    "afmoe": Architecture(),
    "aria": Architecture(),
    "axk1": Architecture(fields=SPARSE),
    "axk2": Architecture(fields=SPARSE),
    "bailing_hybrid": Architecture(fields=SPARSE | HYBRID | {"num_mtp_layers": 0}),
    "beam": Architecture(fields=SPARSE),
    "cohere2_moe": Architecture(),
    "dbrx": Architecture(
        fields={
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 6, "moe_top_k": 2},
        }
    ),
    "deepseek_ocr2": Architecture(cls="DeepseekOcr2TextModel", fields=SPARSE | TOP2),
    "deepseek_v2": Architecture(fields=TOP2),
    "deepseek_v3": Architecture(fields={"n_group": 2, "topk_group": 1}),
    "deepseek_v32": Architecture(),
    "deepseek_v4": Architecture(fields={"mlp_layer_types": ["hash_moe", "moe"]}),
    "diffusion_gemma": Architecture(
        cls="DiffusionGemmaEncoderTextModel",
        fields={"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16, "global_head_dim": 8},
    ),
    "dots1": Architecture(fields=TOP2 | {"n_shared_experts": 1}),
    "dots3_note": Architecture(cls="Dots3NoteTextModel", fields=SPARSE),
    "ernie4_5_moe": Architecture(),
    "ernie4_5_vl_moe": Architecture(cls="Ernie4_5_VLMoeTextModel", fields=SPARSE | {"moe_intermediate_size": [16, 8]} | MROPE),
    "exaone_moe": Architecture(fields=SPARSE),
    "flex_olmo": Architecture(),
    "flint": Architecture(fields={"mlp_only_layers": []}),
    "gemma4": Architecture(
        fields={
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
            "global_head_dim": 8,
        }
    ),
    "glm4_moe": Architecture(),
    "glm4_moe_lite": Architecture(fields=SPARSE),
    "glm4v_moe": Architecture(cls="Glm4vMoeTextModel", fields=MROPE),
    "glm5_next": Architecture(
        cls="Glm5NextTextModel",
        fields=SPARSE | {"layer_types": ["linear_attention", "indexed_attention"], "index_kpool": 4, "qk_rope_head_dim": 0},
        unsized=("head_dim",),
    ),
    "glm_moe_dsa": Architecture(fields=SPARSE),
    "gpt_oss": Architecture(),
    "granitemoe": Architecture(),
    "granitemoe_swa": Architecture(),
    "granitemoehybrid": Architecture(fields=HYBRID),
    "granitemoeshared": Architecture(),
    "hunyuan_v1_moe": Architecture(fields={"head_dim": 8}),
    "hy_v3": Architecture(fields=SPARSE),
    "hy_v4": Architecture(fields=SPARSE),
    "inkling": Architecture(),
    "inkling2": Architecture(),
    "jamba": Architecture(
        fields={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
    ),
    "jetmoe": Architecture(),
    "kimi_linear": Architecture(fields=SPARSE | HYBRID),
    "kolibri1": Architecture(),
    "laguna": Architecture(fields=SPARSE),
    "lfm2_moe": Architecture(fields={"layer_types": ["conv", "full_attention"]}),
    "llama4": Architecture(fields={"num_experts_per_tok": 2}),
    "longcat_flash": Architecture(fields={"zero_expert_num": 3, "num_layers": 2}, unsized=("num_hidden_layers",)),
    "mellum": Architecture(),
    "mimo_v2_flash": Architecture(fields=SPARSE | {"num_key_value_heads": 2}),
    "minimax": Architecture(),
    "minimax_m2": Architecture(),
    "minimax_m3_vl": Architecture(),
    "mistral4": Architecture(),
    "mistral_large4": Architecture(cls="MistralLarge4TextModel", fields=SPARSE),
    "mixtral": Architecture(),
    "muse_spark": Architecture(cls="MuseSparkTextModel"),
    "nemotron_h": Architecture(fields={"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}),
    "nllb_moe": Architecture(fields={"encoder_sparse_step": 1, "decoder_sparse_step": 1}),
    "olmoe": Architecture(),
    "openai_privacy_filter": Architecture(),
    "phimoe": Architecture(),
    "qwen2_moe": Architecture(),
    "qwen3_5_moe": Architecture(fields=HYBRID),
    "qwen3_moe": Architecture(),
    "qwen3_next": Architecture(fields=HYBRID),
    "qwen3_omni_moe": Architecture(cls="Qwen3OmniMoeThinkerTextModel"),
    "qwen3_vl_moe": Architecture(),
    "qwen4_exp": Architecture(
        fields=HYBRID
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    ),
    "solar_open": Architecture(),
    "step3p7": Architecture(cls="Step3p7TextModel", fields=SPARSE | {"sliding_window": 64}),
    "switch_transformers": Architecture(
        fields={"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "decoder_start_token_id": 0}
    ),
    "unlimited_ocr": Architecture(cls="UnlimitedOcrTextModel", fields=SPARSE),
    "zaya": Architecture(fields={"num_experts_per_tok": 1}),
    "doge": Architecture(skip="experts are rows of an embedding retrieved by product keys: no weight matrices to copy"),
    "vitpose_backbone": Architecture(skip="a vision backbone whose experts are chosen by the data set, not by a router"),
}

_MODELS = Path(transformers.__file__).parent / "models"
_EXPERTS = re.compile(r"@use_experts_implementation|^class \w*(?:Experts|MoE|Moe|MoeMLP)\(", re.M)


@lru_cache(maxsize=1)
def discover() -> tuple[str, ...]:
    """Folders of transformers.models whose modeling file holds experts."""
    files = sorted(_MODELS.glob("*/modeling_*.py"))
    return tuple(sorted({file.parent.name for file in files if _EXPERTS.search(file.read_text(encoding="utf-8"))}))


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A random model of a few thousand weights, in evaluation mode; the same for the same seed.

    Args:
        name: a key of `ARCHITECTURES`.
        seed: of its weights.
        dtype: of its weights.
        fields: of its configuration, beyond those of the table.
    """
    model_class, spec = _model_class(name), ARCHITECTURES[name]
    torch.manual_seed(seed)
    spec = replace(spec, fields={**spec.fields, **fields})
    model = model_class(_config(model_class.config_class, spec)).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("expert" in key or "router" in key):
                parameter.normal_(std=0.3)  # the usual 0.02 would make experts nearly linear and routing nearly constant
        for key, buffer in model.named_buffers():
            if key.endswith("tid2eid"):  # DeepSeek-V4's table of experts by token, which only a checkpoint fills
                rows = [torch.randperm(model.config.n_routed_experts)[: buffer.shape[1]] for _ in range(len(buffer))]
                buffer.copy_(torch.stack(rows))
    return model


def _model_class(name: str) -> type[PreTrainedModel]:
    file = next((_MODELS / name).glob("modeling_*.py"))
    module = importlib.import_module(f"transformers.models.{name}.{file.stem}")
    wanted = ARCHITECTURES[name].cls
    names = re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.M)
    endings = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")
    found = wanted or next(n for ending in endings for n in names if n.endswith(ending))
    return getattr(module, found)


def _config(config_class: type[PreTrainedConfig], spec: Architecture) -> PreTrainedConfig:
    default = config_class()
    given = {key: value for key, value in _sized(default).items() if key not in spec.unsized}
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(getattr(default, name, None), PreTrainedConfig):
            given[name] = _sized(getattr(default, name))
    return config_class(**{**given, **spec.fields})


def _sized(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes of the table for the fields that a configuration has and that are not None by default."""
    known = set(type(config).__dataclass_fields__) | set(type(config).attribute_map)
    values = config.to_dict()
    return {key: value for key, value in SIZES.items() if key in known and values.get(key, 0) is not None}
