"""Greedy tokens of a real vLLM on CPU: answer.json MODEL PROMPTS.json NEW-TOKENS."""

from __future__ import annotations

import json
import sys


def main() -> None:
    answer, model, prompts, tokens = sys.argv[1:]
    from vllm import EngineArgs, LLMEngine, SamplingParams

    config = EngineArgs(
        model=model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, seed=0,
        load_format="safetensors",
    ).create_engine_config()  # fmt: skip
    engine = LLMEngine.from_vllm_config(config)
    sampling = SamplingParams(max_tokens=int(tokens), temperature=0, detokenize=False, ignore_eos=True)
    with open(prompts, encoding="utf-8") as file:
        for number, prompt in enumerate(json.load(file)):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: list(output.outputs[0].token_ids) for output in engine.step() if output.finished}
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"tokens": [finished[str(number)] for number in range(len(finished))]}, file)


if __name__ == "__main__":
    main()
