from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import WORDS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: a second thread costs more than it brings


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real text and traces for development; tests that need it are skipped on a machine without it."""
    path = Path(os.environ.get("EQUIPOISE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set EQUIPOISE_SHARED_DATA to run this")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; returns exit status, standard output and standard error."""
    from equipoise import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-MoE of 2 layers, 8 experts, top-2, with a word tokenizer, saved as a user would have it."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "model"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", "<pad>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=8,
        shared_expert_intermediate_size=32, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=1, pad_token_id=2, bos_token_id=1,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(8.0)  # routing as uneven as that of a trained model
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
