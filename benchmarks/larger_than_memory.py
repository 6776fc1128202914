"""A model four times an enforced memory limit is profiled, planned for, quantized, balanced and saved under that limit.

Run from the repository root:
    python benchmarks/larger_than_memory.py                    # 200 MB over what the interpreter and its libraries take

The model is made in code: random weights of a Mixtral of `--times` times the limit, single experts as such checkpoints have
them, several files; in fp32, since torch's bf16 products keep code for every number of rows that they have met (150 MB in this
run), which has nothing to do with the model. Every step runs in a process of its own whose private memory is limited by the
kernel (RLIMIT_DATA: what it has after importing everything, plus the limit); that loading the model whole fails there is shown
first. The quantization is then repeated and killed (SIGKILL) at three random moments, and what it ends with is compared byte by
byte. The limit has to hold one layer and what the rounding of some experts takes, so it cannot be much smaller.

Measured: seconds, and the largest private memory (RssAnon) beyond that after importing, polled every 10 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MB = 1 << 20
WORDS = ("the", "tree", "runs", "over", "blue", "water", "birds", "sing", "in", "old", "houses", "while", "code", "returns")
TOKENIZER = Path(__file__).parents[1] / "shelf" / "tokenizer"
TOKENS, SEQ_LEN = 2048, 256


def documents(count: int = 64, words: int = 200) -> list[str]:
    """Random words."""
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(count)]


def make_model(directory: Path, size: int, layers: int) -> int:
    """Write a random Mixtral of about `size` bytes, file by file; the bytes of its weights."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from equipoise.models.tensor_files import write_tensors

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    experts, hidden = 16, 256
    inner = max(32, size // layers // (experts * 3 * hidden * 4) // 32 * 32)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=inner, num_local_experts=experts,
        num_experts_per_tok=2, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
        dtype="float32", architectures=["MixtralForCausalLM"], pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    directory.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MixtralForCausalLM(config).state_dict().items()}
    rest = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    wanted = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): shape for name, shape in rest.items()}
    for layer in range(layers):
        for expert in range(experts):
            for part, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                wanted[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in wanted.items():
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        shards.setdefault(file, {})[name] = shape
    total = 0
    for file, names in shards.items():
        tensors = {}
        for name, shape in names.items():
            scale = 1.0 if name.endswith("gate.weight") or "embed" in name else 1.5 / shape[-1] ** 0.5
            drawn = torch.randn(shape, generator=generator) * scale
            tensors[name] = torch.ones(shape) if "norm" in name else drawn
        write_tensors(directory / file, tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return total


def private(pid: int | str = "self", field: str = "RssAnon") -> int:
    """Bytes of a process's private memory (RssAnon), or of another field of its status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def child(step: str, work: Path, limit: int) -> None:
    """One step, under the limit."""
    import torch
    import transformers  # noqa: F401
    from transformers import MixtralForCausalLM  # noqa: F401

    from equipoise.artifacts import Plan, Profile
    from equipoise.cli import main as command
    from equipoise.execution.layerwise import Calibration
    from equipoise.execution.streamed import apply_streamed
    from equipoise.planning.methods import make_plan
    from equipoise.profiling.calibrate import profile
    from equipoise.profiling.loading import load_model, load_tokenizer
    from equipoise.profiling.sequences import Framing, build_rows, make_batches

    model = str(work / "model")
    ceiling = private(field="VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))
    print(json.dumps({"before": private()}), flush=True)
    if step == "whole":
        loaded = load_model(model)
        print(sum(float(p.sum()) for p in loaded.parameters()))
    elif step == "profile":
        texts = {"text": documents()}
        found = profile(
            load_model(model, memory=limit), load_tokenizer(model), texts, tokens=TOKENS, seq_len=SEQ_LEN, batch_size=4,
            precisions=("int8", "int4"), name=model, progress=False,
        )  # fmt: skip
        found.save(work / "x.profile.safetensors")
    elif step == "plan":
        make_plan(Profile.load_file(work / "x.profile.safetensors"), "rq").save(work / "x.plan.json")
    elif step == "balance":
        tokenizer, streamed = load_tokenizer(model), load_model(model, memory=limit)
        rows = build_rows(documents(), tokenizer, Framing.of(tokenizer, streamed.config), tokens=TOKENS, seq_len=SEQ_LEN)
        calibration = Calibration(make_batches(rows, 4), "agq", spill=work / "spill")
        plan = Plan.load_file(work / "x.plan.json")
        apply_streamed(streamed, tokenizer, plan, work / "balanced", calibration=calibration)
    else:
        (work / "text.txt").write_text("\n\n".join(documents()))
        sys.argv = [
            "equipoise", "quantize", model, "--out", str(work / step), "--precision", "int4-g32", "--method", "gptq",
            "--text", str(work / "text.txt"), "--tokens", str(TOKENS), "--seq-len", str(SEQ_LEN),
            "--workers", "1", "--spill", str(work / "spill"), "--json",
        ]  # fmt: skip
        command()
    del torch


def run(step: str, work: Path, limit: int, kill_after: float | None = None) -> dict[str, Any]:
    """A step in its own process: how it ended, its seconds, and its largest private memory beyond that after importing."""
    # The kernel counts what the allocator has set aside for further threads, so it has one arena.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    arguments = [sys.executable, __file__, "--child", step, "--work", str(work), "--bytes", str(limit)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, env=environment)
        largest, began, read = 0, None, None
        while process.poll() is None:
            try:
                largest = max(largest, private(process.pid))
            except (FileNotFoundError, ProcessLookupError):
                break
            if began is None:
                said.seek(0)
                lines = [line for line in said.read().splitlines() if line.startswith('{"before"')]
                if lines:
                    began, read, largest = time.monotonic(), json.loads(lines[0])["before"], 0
            if kill_after is not None and began is not None and time.monotonic() - began > kill_after:
                process.kill()
            time.sleep(0.01)
        process.wait()
        said.seek(0)
        output = said.read()
    seconds = time.monotonic() - began if began else 0.0
    return {
        "step": step,
        "exit": process.returncode,
        "seconds": round(seconds, 1),
        "peak_mb": round((largest - read) / MB, 1) if read else None,
        "output": output,
    }


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def needed(result: dict[str, Any]) -> dict[str, Any]:
    """A step's result; ends everything when the step has failed."""
    if result["exit"] != 0:
        sys.exit(f"{result['step']} failed under the limit:\n{result['output'][-3000:]}")
    return result


def main() -> None:
    """Print a row for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="MB of private memory beyond the interpreter's and libraries'")
    parser.add_argument("--times", type=float, default=4.0, help="bytes of the weights, as a multiple of the limit")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--work", type=Path, help="directory for the models; a temporary one by default")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.work, given.bytes)
        return
    work = given.work or Path(tempfile.mkdtemp(prefix="larger-than-memory."))
    limit = given.limit * MB
    weights = make_model(work / "model", int(given.times * limit), given.layers)
    print(f"weights {weights / MB:.0f} MB, limit {given.limit} MB ({weights / limit:.2f} times), {given.layers} layers\n")
    print(f"{'step':28} {'exit':>5} {'seconds':>8} {'peak MB':>8}")
    results = []

    def step(name: str, must: bool = True, **options: Any) -> dict[str, Any]:
        result = run("killed" if name.startswith("the same") else name, work, limit, **options)
        print(f"{name:28} {result['exit']:5} {result['seconds']:8} {result['peak_mb']!s:>8}", flush=True)
        results.append({key: value for key, value in result.items() if key != "output"})
        return needed(result) if must else result

    whole = step("whole", must=False)
    if whole["exit"] == 0 or "memory" not in whole["output"]:
        sys.exit(f"the whole model did not fail under the limit for want of memory:\n{whole['output'][-1000:]}")
    for name in ("profile", "plan", "balance"):
        step(name)
    straight = step("quantized")
    draw = random.Random(given.seed)
    kills, done = 0, False
    while not done:
        # A run that goes on is quicker than one from the start, so that later moments could come too late.
        moment = draw.uniform(0.05, 0.25) * straight["seconds"] if kills < given.kills else None
        result = step("killed" if moment else "the same to its end", must=False, kill_after=moment)
        done = result["exit"] != -9
        kills += not done
    needed(result)
    same = content(work / "killed") == content(work / "quantized")
    files, outcome = len(content(work / "quantized")), "byte-identical" if same else "DIFFERENT"
    print(f"\nkilled {kills} times and resumed: {outcome} ({files} files)")
    if given.json:
        report = {"weights_mb": weights / MB, "limit_mb": given.limit, "kills": kills, "identical": same, "steps": results}
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    if given.work is None:
        shutil.rmtree(work)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
