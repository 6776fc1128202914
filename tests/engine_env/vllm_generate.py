"""Generate with a real vLLM on CPU: answer.json MODEL ROUTED.npz [PLAN].

With PLAN the environment of the engine and its worker names it, that of this process does not: vLLM refuses EPLB on
CPU, and the plug-in refuses to start without EPLB, so the configuration is made before.
"""

from __future__ import annotations

import json
import os
import sys

PROMPTS = [list(range(3, 20)), list(range(50, 75)), [7, 7, 7, 400, 30, 12]]


def main() -> None:
    answer, model, routed, *plan = sys.argv[1:]
    from vllm import EngineArgs, LLMEngine, SamplingParams

    from equipoise.engines.vllm import save_outputs

    config = EngineArgs(
        model=model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4,
        enable_return_routed_experts=True, load_format="safetensors", seed=0, enable_prefix_caching=True,
        worker_extension_cls="probe.Probe",
    ).create_engine_config()  # fmt: skip
    if plan:
        os.environ["EQUIPOISE_PLAN"] = plan[0]
    engine = LLMEngine.from_vllm_config(config)
    sampling = SamplingParams(max_tokens=12, temperature=0, detokenize=False, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    outputs = [finished[key] for key in sorted(finished)]
    save_outputs(outputs, routed)
    workers = engine.collective_rpc("policy_in_place")
    responses = [response(output) for output in outputs]
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(
            {
                "sequences": [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs],
                "prompts": [len(output.prompt_token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
                "shapes": [list(output.outputs[0].routed_experts.shape) for output in outputs],
                "responses": responses,
                "workers": workers,
                "pid": os.getpid(),
            },
            file,
        )


def response(output) -> dict:
    """The OpenAI-style response of an output, by vLLM's own classes and encoder."""
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
    from vllm.entrypoints.serve.engine.protocol import UsageInfo
    from vllm.utils.serial_utils import numpy2base64

    choice = output.outputs[0]
    prompt, answer = len(output.prompt_token_ids), len(choice.token_ids)
    made = CompletionResponse(
        model="tiny",
        choices=[CompletionResponseChoice(index=0, text="", routed_experts=numpy2base64(choice.routed_experts))],
        usage=UsageInfo(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer),
    )
    return json.loads(made.model_dump_json())


if __name__ == "__main__":
    main()
