"""EPLB of a real vLLM on two CPU ranks over gloo: answer.json [ROUNDS]; the environment names plan or policy.

vLLM's own configuration refuses EPLB off GPUs, so `enable_eplb` is set after it was made. All else is vLLM's code:
`EplbState` looks up the policy, adds up the load of both ranks, asks for a placement, moves the weights between the
processes and commits the maps. Two calls to a GPU are answered here: events that time the rearrangement, and the stream
that is waited for before a send.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

EXPERTS, REDUNDANT, LAYERS, RANKS, WIDTH = 6, 2, 2, 2, 3


class Nothing:
    """A GPU's event or stream where there is no GPU."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def weight(layer: int, expert: int) -> float:
    """What the weights of an expert are filled with, so that it is known again after it has moved."""
    return 100.0 * layer + expert


class Model:
    """What vLLM asks of a MoE model: sizes and the weights of this rank's experts."""

    def __init__(self, rank: int, initial: list[int]) -> None:
        import torch

        self.num_moe_layers, self.num_expert_groups = LAYERS, 1
        self.num_logical_experts = self.num_routed_experts = EXPERTS
        self.num_redundant_experts, self.num_physical_experts = REDUNDANT, len(initial)
        self.num_local_physical_experts = here = len(initial) // RANKS
        self.moe_layers: list[Any] = []
        mine = initial[rank * here : (rank + 1) * here]
        self.expert_weights = [[torch.tensor([[weight(layer, e)] * WIDTH for e in mine])] for layer in range(LAYERS)]

    def set_eplb_state(self, *_: Any) -> None: ...


class ModelConfig:
    """The name of the model."""

    model = "tiny"

    def compute_hash(self) -> str:
        return "tiny"


def rank_main(rank: int, port: int, rounds: int, queue: Any) -> None:
    import torch

    torch.Event = Nothing  # type: ignore[misc, assignment]
    torch.accelerator.current_stream = lambda *_, **__: Nothing()  # type: ignore[assignment]
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = VllmConfig()
    parallel = config.parallel_config
    parallel.tensor_parallel_size = parallel.world_size = RANKS
    parallel.enable_expert_parallel = parallel.enable_eplb = True
    eplb = parallel.eplb_config
    eplb.num_redundant_experts, eplb.use_async, eplb.communicator = REDUNDANT, False, "torch_gloo"
    eplb.window_size, eplb.step_interval = 2, 4
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(RANKS, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        parallel_state.initialize_model_parallel(RANKS, backend="gloo")
        model = Model(rank, list(EplbState.build_initial_global_physical_to_logical_map(EXPERTS, REDUNDANT)))
        state = EplbState(parallel, torch.device("cpu"))
        state.add_model(model, ModelConfig())
        state.step(is_profile=True)
        held = state.model_states["tiny"]
        found = {"policy": state.policy.__qualname__, "maps": [], "weights": [], "counts": []}
        generator = torch.Generator().manual_seed(rank)  # every rank sees other tokens
        for _ in range(rounds):
            load = torch.randint(0, 1000, (LAYERS, EXPERTS), generator=generator) ** 2
            held.expert_load_pass.copy_(torch.gather(load, 1, held.physical_to_logical_map).int())
            state.step()
            found["maps"].append(held.physical_to_logical_map.tolist())
            found["weights"].append([w[0][:, 0].tolist() for w in model.expert_weights])
            found["counts"].append(held.logical_replica_count.tolist())
        queue.put((rank, found))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def main() -> None:
    import torch.multiprocessing as processes
    from vllm.utils.network_utils import get_open_port

    answer, *rounds = sys.argv[1:]
    context = processes.get_context("spawn")
    queue = context.SimpleQueue()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    processes.spawn(rank_main, (get_open_port(), int(rounds[0]) if rounds else 1, queue), RANKS)
    found = dict(queue.get() for _ in range(RANKS))
    with open(answer, "w", encoding="utf-8") as file:
        json.dump({"ranks": [found[rank] for rank in range(RANKS)]}, file)


if __name__ == "__main__":
    main()
