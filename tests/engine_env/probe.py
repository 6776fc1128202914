"""What a vLLM worker says of itself: an extension of its class, called through vLLM's own `collective_rpc`."""

from __future__ import annotations

import os
from typing import Any


class Probe:
    """Methods that vLLM adds to its worker class."""

    def policy_in_place(self) -> dict[str, Any]:
        """The policy that EPLB would use in this process, and what it answers through vLLM's interface."""
        import torch
        from vllm.distributed.eplb.eplb_state import EPLB_POLICIES, EplbState
        from vllm.distributed.eplb.policy import AbstractEplbPolicy

        policy = EPLB_POLICIES["default"]
        load = torch.arange(24, dtype=torch.int32).reshape(3, 8)
        old = torch.tensor(EplbState.build_initial_global_physical_to_logical_map(8, 2)).expand(3, -1).contiguous()
        answer = policy.rebalance_experts(load, 10, 1, 1, 2, old)
        return {
            "policy": policy.__qualname__,
            "abstract": issubclass(policy, AbstractEplbPolicy),
            "answer": answer.tolist(),
            "device": str(answer.device),
            "dtype": str(answer.dtype),
            "pid": os.getpid(),
        }
