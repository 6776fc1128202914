"""Make vLLM's configuration and nothing more: answer.json MODEL JSON-ARGUMENTS."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    answer, model, arguments = sys.argv[1:]
    from vllm import EngineArgs

    made = EngineArgs(model=model, skip_tokenizer_init=True, dtype="float32", max_model_len=128, **json.loads(arguments))
    config = made.create_engine_config()
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"eplb": config.parallel_config.enable_eplb}, file)
