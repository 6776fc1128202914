"""What recording costs: a model's forward pass with the recorder off and on, side by side.

    python benchmarks/recorder_overhead.py [MODEL_DIRECTORY] [--tokens 512] [--new-tokens 0] [--rounds 15] [--json]

Without a directory, a random Qwen2-MoE with the shape of the reference model is built: 134M weights, 30 MoE layers of
16 experts, top-4, width 576. Rounds alternate off and on (which of the two goes first alternates as well), so that a
drift of the machine's speed meets both; the ratio is taken within a round. On a busy machine read the processor's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from equipoise.models.recorder import record


def random_model() -> PreTrainedModel:
    """A model of the reference model's shape; what the recorder costs does not depend on the weights."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=768,
        tie_word_embeddings=True,
    )
    return Qwen2MoeForCausalLM(config).eval()


Times = dict[str, list[tuple[float, float]]]


@torch.no_grad()
def measure(model: PreTrainedModel, ids: torch.Tensor, rounds: int, new_tokens: int) -> Times:
    """Wall-clock and processor seconds of each round, off and on; without the opening and closing of the recorder."""
    mask = torch.ones_like(ids)

    def run() -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        if new_tokens:
            model.generate(ids, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
        else:
            model(ids, attention_mask=mask)
        return time.perf_counter() - wall, time.process_time() - processor

    times: Times = {"off": [], "on": []}
    for round_ in range(rounds + 1):
        for state in ("off", "on") if round_ % 2 else ("on", "off"):
            with record(model) if state == "on" else nullcontext():
                times[state].append(run())
    return {state: values[1:] for state, values in times.items()}  # the first round warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory of a model; a random one of the reference's shape without it")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--new-tokens", type=int, default=0, help="generate so many tokens after them (decode phase)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of forward passes")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval() if options.model else random_model()
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (options.batch, options.tokens))
    times = measure(model, ids, options.rounds, options.new_tokens)
    result: dict[str, object] = {
        "model": options.model or "random, shape of the reference model",
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": options.batch,
        "tokens": options.tokens,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "rounds": options.rounds,
    }
    for clock, name in enumerate(("wall", "processor")):
        off, on = ([pair[clock] for pair in times[state]] for state in ("off", "on"))
        low, middle, high = statistics.quantiles([b / a - 1 for a, b in zip(off, on, strict=True)], n=4)
        result[name] = {
            "off_ms": 1000 * statistics.median(off),
            "on_ms": 1000 * statistics.median(on),
            "overhead": middle,
            "overhead_quartiles": [low, high],
        }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in result.items() if not isinstance(value, dict)))
    print(f"{'clock':10}{'off, ms':>10}{'on, ms':>10}{'overhead':>10}   middle half of the rounds")
    for name in ("wall", "processor"):
        row: dict = result[name]  # type: ignore[assignment]
        low, high = row["overhead_quartiles"]
        print(f"{name:10}{row['off_ms']:10.1f}{row['on_ms']:10.1f}{row['overhead']:10.2%}   {low:.2%} to {high:.2%}")


if __name__ == "__main__":
    main()
