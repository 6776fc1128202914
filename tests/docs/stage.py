"""What the commands of the documentation find in the directory in which they are run: files under the names that pages use.

All are small and made in code: a random model of 2 layers and 8 experts, text of 22 words, recorded loads of drawn routing.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np

from support import corpus

LAYERS, EXPERTS, TOP_K = 2, 64, 4
"""Of the recorded traffic that plans of ranks are made from."""


TEXTS = (".jsonl", ".jsonl.gz", ".txt")
"""Endings of files that are text wherever nothing else is said of them."""


@dataclass
class Stage:
    """A directory in which a page's commands run, and what is put there when a command first names it.

    Attributes:
        place: the directory.
        model: the tiny model, as a user would have it.
        tiny: a profile of that model.
        page: the page whose commands run here, for names that mean different things on different pages.
    """

    place: Path
    model: Path
    tiny: Path
    page: str
    made: list[str] = field(default_factory=list)

    def provide(self, words: tuple[str, ...]) -> None:
        """Make the files that a command reads and that are not there yet; never what it writes."""
        outputs = {words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--out", "--plot", "--spill")}
        for word in words[1:]:
            for part in word.split("=")[-1].split(","):
                maker = GIVEN.get((self.page, part)) or GIVEN.get(part) or (text if part.endswith(TEXTS) else None)
                path = self.place / part
                if maker and part not in outputs and not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    maker(self, path)
                    self.made.append(part)


def model_directory(stage: Stage, path: Path) -> None:
    """The tiny model under a page's own name."""
    shutil.copytree(stage.model, path)


def text(stage: Stage, path: Path) -> None:
    """Documents that differ with the file's name, plain or gzipped, one JSON object a line or one a paragraph."""
    documents = corpus(crc32(path.name.encode()) % 1000, documents=12)
    if path.suffix == ".txt":
        path.write_text("\n\n".join(documents))
        return
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def prompts(stage: Stage, path: Path) -> None:
    """Prompts of a domain."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in corpus(9, documents=24, words=12)))


def tiny_profile(stage: Stage, path: Path) -> None:
    """A profile of the tiny model."""
    shutil.copy(stage.tiny, path)


def days_profile(stage: Stage, path: Path) -> None:
    """A profile of the tiny model on text of its own, without errors of formats."""
    import equipoise
    from equipoise.profiling.loading import load_model, load_tokenizer

    texts = {"chat": corpus(crc32(path.name.encode()) % 1000, 8)}
    equipoise.profile(load_model(str(stage.model)), load_tokenizer(str(stage.model)), texts, tokens=200).save(path)


def tiny_plan(stage: Stage, path: Path, method: str = "rq") -> None:
    """A plan for the tiny model."""
    from equipoise.artifacts import Profile
    from equipoise.planning.methods import make_plan

    make_plan(Profile.load_file(stage.tiny), method).save(path)


def ids(name: str, tokens: int = 400) -> np.ndarray:
    """[tokens, LAYERS, TOP_K] experts of drawn tokens, uneven, of another kind for each name."""
    rng = np.random.default_rng(crc32(name.encode()))
    chance = rng.gamma(0.6, 1.0, (LAYERS, EXPERTS)) + 0.02
    keys = np.log(chance) + rng.gumbel(size=(tokens, LAYERS, EXPERTS))
    return np.argsort(-keys, axis=-1)[..., :TOP_K].astype(np.int32)


def routing(stage: Stage, path: Path) -> None:
    """Per-token routing of one kind of traffic, as scripts save it."""
    lengths = np.full(20, 20)
    np.savez_compressed(path, routed_experts=ids(path.name), tokens=lengths, prompt_tokens=lengths // 2)


def config(stage: Stage, path: Path) -> None:
    """The config.json of the model that the drawn traffic is of."""
    facts = {
        "model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K,
        "hidden_size": 8, "moe_intermediate_size": 4,
    }  # fmt: skip
    path.write_text(json.dumps(facts))


def checkpoint(stage: Stage, path: Path) -> None:
    """A random model of the shape that the drawn traffic is of."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    facts = {
        "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "hidden_size": 8,
        "moe_intermediate_size": 4, "vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**facts)).save_pretrained(path)


def config_directory(stage: Stage, path: Path) -> None:
    """A model's directory, of which only the configuration is looked at."""
    path.mkdir()
    config(stage, path / "config.json")


def responses(stage: Stage, path: Path) -> None:
    """Responses of a vLLM server that returns the experts of every token."""
    import base64
    import io

    lines = []
    for request in range(4):
        buffer = io.BytesIO()
        np.save(buffer, ids(f"{path.name}{request}", 50), allow_pickle=False)
        routed = base64.b64encode(buffer.getvalue()).decode()
        lines.append(json.dumps({"choices": [{"routed_experts": routed}], "usage": {"prompt_tokens": 30}}))
    path.write_text("\n".join(lines))


def sglang_dump(stage: Stage, path: Path) -> None:
    """A dump of SGLang's recorder in mode `stat`: one buffer of counts by step, layer and expert."""
    import torch

    rng = np.random.default_rng(crc32(path.name.encode()))
    counts = rng.poisson(rng.gamma(0.7, 60.0, (1, 256)), (4, 1, 256)) + 1
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts.astype(np.int32))}, path)


def routed_dump(stage: Stage, path: Path) -> None:
    """The same for the model of the drawn traffic."""
    import torch

    counts = np.random.default_rng(7).poisson(20.0, (20, LAYERS, EXPERTS)) + 1
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts.astype(np.int32))}, path)


def traffic(stage: Stage, path: Path) -> None:
    """A profile of recorded routing, three kinds of traffic, with the pairs of experts that tokens chose."""
    from equipoise.engines import read_records

    files = []
    for kind in ("chat", "code", "math"):
        file = path.with_name(f"{path.name}.{kind}.npy")
        np.save(file, ids(kind))
        files.append(file)
    config(stage, path.with_name(f"{path.name}.config.json"))
    read_records("vllm", files, config=path.with_name(f"{path.name}.config.json")).save(path)


def rank_plan(stage: Stage, path: Path, method: str = "robust", ranks: int = 8, slots: int | None = None) -> None:
    """A placement of that traffic on ranks."""
    from equipoise.artifacts import Profile
    from equipoise.planning.methods import make_plan

    if not (profile := path.with_name("given.profile.safetensors")).exists():
        traffic(stage, profile)
    options = {} if slots is None else {"slots": slots}
    make_plan(Profile.load_file(profile), method, units=ranks, **options).save(path)


def uniform_plan(stage: Stage, path: Path) -> None:
    """A plan of one precision, which other tools can hold."""
    tiny_plan(stage, path, method="uniform")


def balanced_model(stage: Stage, path: Path) -> None:
    """The tiny model with that plan carried out."""
    import equipoise
    from equipoise.artifacts import Plan
    from equipoise.profiling.loading import load_model, load_tokenizer

    if not (plan := path.with_name("PLAN")).exists():
        uniform_plan(stage, plan)
    model = equipoise.apply(load_model(str(stage.model)), Plan.load_file(plan))
    equipoise.save(model, load_tokenizer(str(stage.model)), path)


def task_directory(stage: Stage, path: Path) -> None:
    """A few rows of a task, as local files hold them."""
    path.mkdir()
    rows = [{"context": "the old stone", "choices": ["houses sing", "water runs"], "label": i % 2} for i in range(8)]
    (path / "piqa_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(stage: Stage, path: Path) -> None:
    """An evaluation of the tiny model against itself."""
    import equipoise
    from equipoise.profiling.loading import load_model, load_tokenizer

    base = load_model(str(stage.model))
    tokenizer = load_tokenizer(str(stage.model))
    equipoise.evaluate(base, {"same": base}, tokenizer, texts={"text": corpus(1)}, tokens=200, seq_len=64).save(path)


def given_names(stage: Stage, wanted: frozenset[str]) -> dict[str, object]:
    """Values for those names that a page's Python takes as given; loaded only where one is wanted.

    Args:
        stage: where the page's commands run.
        wanted: names that a block reads.
    """
    import equipoise
    from equipoise.artifacts import Profile
    from equipoise.profiling.loading import load_model, load_tokenizer

    def recorded() -> Profile:
        if not (path := stage.place / "given.profile.safetensors").exists():
            traffic(stage, path)
        return Profile.load_file(path)

    makers: dict[str, Callable[[], object]] = {
        "equipoise": lambda: equipoise,
        "model": lambda: load_model(str(stage.model)),
        "tokenizer": lambda: load_tokenizer(str(stage.model)),
        "documents": lambda: corpus(5, 24),
        "texts": lambda: {"math": corpus(6, 24)},
        "Profile": lambda: Profile,
        "paths": lambda: sorted(stage.place.glob("*day.profile.safetensors")),
        "profile": recorded,
        "plan": lambda: equipoise.plan(Profile.load_file(stage.tiny), "rq"),
    }
    if stage.page == "docs/pruning.md":
        makers["texts"] = lambda: corpus(6, 24)
    if stage.page == "docs/engines.md":
        makers["plan"] = lambda: equipoise.plan(recorded(), "robust", units=32, slots=96)
    if stage.page in ("docs/large-models.md", "docs/self-sampled.md"):
        makers |= {"profile": lambda: equipoise.profile, "load": lambda: equipoise.load, "batches": lambda: batches(stage)}
    return {name: makers[name]() for name in sorted(wanted & makers.keys())}


def batches(stage: Stage) -> list[object]:
    """Batches of text of the tiny model, as rounding takes them."""
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.sequences import Framing, text_batches

    model, tokenizer = load_model(str(stage.model)), load_tokenizer(str(stage.model))
    return list(text_batches({"chat": corpus(5, 8)}, tokenizer, Framing.of(tokenizer, model.config), tokens=200, seq_len=64))


Maker = Callable[[Stage, Path], None]
GIVEN: dict[str | tuple[str, str], Maker] = {
    "MODEL": model_directory,
    "allenai/OLMoE-1B-7B-0924": model_directory,
    "shelf/qwen3-32": model_directory,
    "my-model": model_directory,
    **dict.fromkeys(("x.profile.safetensors", "run.profile.safetensors"), tiny_profile),
    **dict.fromkeys(("x.plan.json", "rq.plan.json"), tiny_plan),
    **dict.fromkeys(("monday.profile.safetensors", "tuesday.profile.safetensors"), days_profile),
    "rq-paper.plan.json": partial(tiny_plan, method="rq-paper"),
    **dict.fromkeys(("serve.profile.safetensors", "traffic.profile.safetensors", "model.profile.safetensors"), traffic),
    "run.eval.json": evaluation,
    "math_prompts.jsonl": prompts,
    "dump_1k1k.pt": sglang_dump,
    "dump_1k8k.pt": sglang_dump,
    "mmlu.npz": routing,
    "others.npz": routing,
    "eplb.plan.json": partial(rank_plan, method="eplb"),
    "robust.plan.json": rank_plan,
    "eplb40.plan.json": partial(rank_plan, method="eplb", slots=80),
    "model.plan.json": rank_plan,
    ("docs/vllm.md", "chat.jsonl"): responses,
    ("docs/vllm.md", "code.jsonl"): responses,
    "MODEL_DIRECTORY": config_directory,
    ("docs/vllm.md", "MODEL_DIRECTORY"): checkpoint,
    **dict.fromkeys(("chat.npz", "code.npz"), routing),
    "dump.pt": routed_dump,
    "model/config.json": config,
    ("docs/quantization-formats.md", "DIR"): balanced_model,
    ("docs/quantization-formats.md", "PLAN"): uniform_plan,
    "tasks": task_directory,
}
"""File or directory, by the name that a page gives it (or page and name) -> how it is made."""
