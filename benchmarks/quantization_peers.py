"""Equipoise beside llm-compressor, GPTQModel, torchao and HQQ: quality, bytes, time and memory of quantized experts.

    python benchmarks/quantization_peers.py --data DIRECTORY --write docs/results.md

Every tool runs in a process of its own, in its own environment, on one thread, one after the other: the same checkpoint in
bf16, the same rows of calibration tokens, the same bits and groups, experts alone (attention, routers, embeddings and head
stay as they are), symmetric but for HQQ and our "-asym", which have zero points. A second, fresh process loads what was saved,
as the tool's users would, and tells its logits on a probe. All weights are then judged by one evaluator: dequantized from the
saved file by the tool's own code and put into the stock model, which is compared with the original in fp32 on held-out text. A
checkpoint counts as reloaded when the fresh process predicts what the stock model with those weights predicts. Where a tool
cannot quantize a stock model's experts, its driver has it round them matrix by matrix: there is then no checkpoint, and the
page says so. Finished jobs are kept in `--out`.

Environments, once (where one is missing, its tool is left out and the page says so), for each NAME.txt in `benchmarks/peers`:

    python -m venv .venv-peers/NAME && .venv-peers/NAME/bin/pip install -r benchmarks/peers/NAME.txt
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers_page
import torch
from quantization_page import Pooled, by_document, write_between
from safetensors.torch import load_file
from shelf import texts

from equipoise.artifacts.files import write_atomic
from equipoise.evaluation import language
from equipoise.lab import shelf
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Framing, build_rows
from quantization import rounding_code

DRIVERS = Path(__file__).parent / "peers"
WIDTHS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4-g32": (4, 32), "int3-g32": (3, 32)}
CONTENDERS = (
    ("equipoise", "rtn"),
    ("equipoise", "rtn-clip"),
    ("equipoise", "rtn-clip-asym"),
    ("equipoise", "gptq"),
    ("equipoise", "agq"),
    ("llmcompressor", "rtn"),
    ("llmcompressor", "gptq"),
    ("gptqmodel", "gptq"),
    ("torchao", "rtn"),
    ("torchao", "hqq"),
    ("hqq", "hqq"),
)
CALIBRATED = {"gptq", "agq"}
"""Methods that read text; the others make the same of every seed."""
LARGE = "large"
"""A random model, for time and memory alone, at one width and seed: its weights mean nothing, nor would its quality."""
LARGE_WIDTH = "int4-g32"
SEQ_LEN, JUDGED_LEN, PROBE = 512, 256, 64
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """One tool and method on one model."""

    model: str
    width: str
    tool: str
    method: str
    seed: int

    def place(self, told: argparse.Namespace) -> Path:
        """Directory of everything that the job makes; our own under the hash of the code that rounds."""
        code = f"-{rounding_code()}" if self.tool == "equipoise" else ""
        return model_place(self.model, told) / self.width / f"{self.tool}-{self.method}-{self.seed}{code}"


def interpreter(tool: str, environments: Path) -> Path | None:
    """The interpreter of a tool's environment; None when it was not made."""
    if tool == "equipoise":
        return Path(sys.executable)
    python = environments / tool / "bin" / "python"
    return python.absolute() if python.is_file() else None


def model_directory(name: str, out: Path) -> Path:
    """The checkpoint that all tools start from."""
    if name != LARGE:
        return shelf.path(name)
    directory = out / "large-model"
    if not (directory / "config.json").is_file():
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=8192,
            hidden_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=512,
            tie_word_embeddings=True,
        )
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@functools.cache
def checkpoint_hash(directory: Path) -> str:
    """Of the weights that all tools start from."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()[:12]


def model_place(model: str, told: argparse.Namespace) -> Path:
    """Directory of all that was made of one checkpoint with one number of calibration tokens."""
    return told.out / f"{model}-{checkpoint_hash(model_directory(model, told.out))}-{told.tokens}"


def save_rows(file: Path, rows: Sequence[Sequence[int]]) -> None:
    """Write token rows as the drivers read them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, ids=np.concatenate([np.asarray(row) for row in rows]), lengths=[len(row) for row in rows])


def calibration(tokenizer: Any, planned: Mapping[str, Sequence[str]], tokens: int, seed: int) -> list[list[int]]:
    """Full rows of `SEQ_LEN` tokens, in equal parts of all domains, so that no tool has padding to deal with."""
    framing = Framing.of(tokenizer)
    rows = []
    for domain, documents in planned.items():
        cut = build_rows(
            documents,
            tokenizer,
            framing,
            scenario=domain,
            tokens=max(tokens // len(planned), SEQ_LEN),
            seq_len=SEQ_LEN,
            seed=seed,
            layout="packed",
        )
        rows += [[*framing.prefix, *ids.tolist(), *framing.suffix] for ids in cut.content]
    return [row for row in rows if len(row) == SEQ_LEN]


def work(job: Job, told: argparse.Namespace) -> dict[str, Any]:
    """Quantize and read back, each in a fresh process, or what an earlier run kept of it."""
    place = job.place(told)
    python = interpreter(job.tool, told.environments)
    if python is None:
        return {"quantize": {"error": "no environment"}}
    bits, group = WIDTHS[job.width]
    inputs = model_place(job.model, told) / "inputs"
    description = {
        "model": str(model_directory(job.model, told.out).absolute()),
        "method": job.method,
        "bits": bits,
        "group": group,
        "threads": 1,
        "calibration": str((inputs / f"calibration-{job.seed}.npz").absolute()),
        "probe": str((inputs / "probe.npz").absolute()),
        **{name: str((place / name).absolute()) for name in ("out", "floats", "logits")},
    }
    results: dict[str, Any] = {}
    for action in ("quantize", "read"):
        kept = place / f"{action}.json"
        if not kept.is_file():
            place.mkdir(parents=True, exist_ok=True)
            write_atomic(place / "job.json", json.dumps({**description, "action": action}))
            with (place / f"{action}.log").open("w") as log:
                code = subprocess.run(
                    [python, DRIVERS / f"{job.tool}_driver.py", place / "job.json", kept],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                ).returncode
            if not kept.is_file():
                write_atomic(kept, json.dumps({"error": f"the process ended with status {code}"}))
        results[action] = json.loads(kept.read_text())
        print(f"{place.relative_to(told.out)} {action}: {results[action].get('error', 'done')}", flush=True)
        if "error" in results[action] and action == "quantize":
            break
    return results


def put(model: Any, floats: Weights) -> Any:
    """A copy of the stock model that computes with these experts."""
    changed = copy.deepcopy(model)
    expected = {
        f"{layer}.{expert}.{part}"
        for layer, block in enumerate(changed.model.layers)
        for expert in range(len(block.mlp.experts.down_proj))
        for part in ("gate", "up", "down")
    }
    assert set(floats) == expected, f"{len(floats)} matrices were read of {len(expected)}"
    with torch.no_grad():
        for name, matrix in floats.items():
            layer, expert, part = name.split(".")
            experts = changed.model.layers[int(layer)].mlp.experts
            if part == "down":
                experts.down_proj[int(expert)] = matrix
            else:
                rows = slice(0, len(matrix)) if part == "gate" else slice(len(matrix), None)
                experts.gate_up_proj[int(expert), rows] = matrix
    return changed


def distance(model: Any, floats: Weights, place: Path, probe: Sequence[Sequence[int]]) -> float:
    """How far a fresh process's logits are from those of the stock model with the same weights, relative root-mean-square.

    Rounding to bf16 is all that may differ, so it is under 0.05; weights that were not loaded give 1 and more.
    """
    stock = put(model.to(torch.bfloat16), floats)
    with torch.no_grad():
        expected = torch.stack([stock(torch.tensor([ids])).logits[0].float() for ids in probe])
    found = load_file(place / "logits")["logits"]
    spread = expected - expected.mean(-1, keepdim=True)
    return float(((found - expected).square().mean() / spread.square().mean()).sqrt())


def judge(jobs: Sequence[Job], told: argparse.Namespace, judged: Mapping[str, Sequence[str]]) -> dict[Job, dict[str, Any]]:
    """What the stock model predicts with each job's weights, beside the original; all of one model and width together."""
    directory = str(model_directory(jobs[0].model, told.out))
    weights = {job: load_file(job.place(told) / "floats") for job in jobs}
    with np.load(model_place(jobs[0].model, told) / "inputs" / "probe.npz") as kept:
        probe = [ids.tolist() for ids in np.split(kept["ids"], np.cumsum(kept["lengths"])[:-1])]
    distances = {}
    for job, floats in weights.items():
        if (job.place(told) / "logits").is_file():
            distances[job] = distance(load_model(directory), floats, job.place(told), probe)
    model, tokenizer = load_model(directory, dtype="fp32"), load_tokenizer(directory)
    contenders = {str(number): put(model, weights[job]) for number, job in enumerate(jobs)}
    parts: dict[str, list[Any]] = {name: [] for name in contenders}
    for domain, documents in judged.items():
        rows = language.cut(
            tokenizer, model.config, documents, name=domain, seq_len=JUDGED_LEN, tokens=told.heldout_tokens, seed=0
        )
        for name, sums in language.compare(model, contenders, rows, batch_size=4).items():
            columns = {key: getattr(sums, key).tolist() for key in ("tokens", "nll_base", "nll", "kl")}
            parts[name].append(by_document(columns, rows.documents))
    return {
        job: {"sums": np.concatenate(parts[str(number)], axis=1).tolist(), "distance": distances.get(job)}
        for number, job in enumerate(jobs)
    }


def judgements(jobs: Sequence[Job], told: argparse.Namespace, judged: Mapping[str, Sequence[str]]) -> dict[Job, dict[str, Any]]:
    """`judge`, or what an earlier run kept of it."""
    kept = {job: job.place(told) / f"judged-{told.heldout_tokens}-{JUDGED_LEN}.json" for job in jobs}
    missing = [job for job in jobs if not kept[job].is_file()]
    if missing:
        for job, found in judge(missing, told, judged).items():
            write_atomic(kept[job], json.dumps(found))
    return {job: json.loads(file.read_text()) for job, file in kept.items()}


def pooled(found: Sequence[Mapping[str, Any]]) -> Pooled:
    """One contender's seeds together."""
    sums = [np.asarray(one["sums"]) for one in found]
    return Pooled(sums[0][0], sums[0][1], np.stack([one[2] for one in sums]), np.stack([one[3] for one in sums]))


def entries(model: str, told: argparse.Namespace, planned: Any, judged: Any) -> list[peers_page.Entry]:
    """All contenders on one model."""
    directory = str(model_directory(model, told.out))
    tokenizer = load_tokenizer(str(shelf.path(shelf.names()[0])) if model == LARGE else directory)
    inputs = model_place(model, told) / "inputs"
    seeds = range(1 if model == LARGE else told.seeds)
    for seed in seeds:
        rows = calibration(tokenizer, planned, told.tokens, seed)
        save_rows(inputs / f"calibration-{seed}.npz", rows)
        if seed == 0:
            save_rows(inputs / "probe.npz", [rows[0][:PROBE], rows[-1][:PROBE]])
    made = []
    for width in [LARGE_WIDTH] if model == LARGE else told.widths:
        # Seeds outermost: what is compared in time runs close together.
        jobs = [
            Job(model, width, tool, method, seed)
            for seed in seeds
            for tool, method in CONTENDERS
            if seed == 0 or method in CALIBRATED
        ]
        results = {job: work(job, told) for job in jobs}
        readable = [job for job in jobs if (job.place(told) / "floats").is_file()]
        if model == LARGE:
            for job in readable:
                (job.place(told) / "floats").unlink()  # gigabytes, and no quality to judge
        verdicts = judgements(readable, told, judged) if readable and model != LARGE else {}
        for tool, method in CONTENDERS:
            mine = [job for job in jobs if (job.tool, job.method) == (tool, method)]
            seen = [verdicts[job] for job in mine if job in verdicts]
            made.append(
                peers_page.Entry(
                    model, width, tool, method, [results[job] for job in mine],
                    pooled(seen) if len(seen) == len(mine) else None, [one["distance"] for one in seen],
                )
            )  # fmt: skip
    return made


def main() -> None:
    """Run what is missing, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/quantization-peers"))
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--models", nargs="*", default=["mixtral-8", "qwen3-32", LARGE])
    parser.add_argument("--widths", nargs="*", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--heldout-tokens", type=int, default=1536, help="of each domain that is judged")
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked part is replaced")
    told = parser.parse_args()
    torch.set_num_threads(1)
    planned, judged = texts(told.data)
    found = [entry for model in told.models for entry in entries(model, told, planned, judged)]
    page = peers_page.page(found, told.tokens, told.seeds)
    print(page)
    write_atomic(told.out / "peers.md", page + "\n")
    write_atomic(told.out / "peers.json", json.dumps({"page": page}) + "\n")
    if told.write:
        write_between(told.write, "quantization-peers", page)


if __name__ == "__main__":
    main()
