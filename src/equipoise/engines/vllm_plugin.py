"""Equipoise inside vLLM: an entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes.

`EQUIPOISE_PLAN=FILE.plan.json` makes vLLM's expert-parallel load balancer (EPLB) use that plan from its first step on;
`EQUIPOISE_POLICY=robust` makes it plan online by that method. Without either nothing is changed or even looked at.

vLLM has no way to register a policy, so ours takes the place of its only one, "default"; vLLM's own checks stay in force. What
is replaced is looked at first: another vLLM than the tested ones, or another interface, is an error.

vLLM logs and goes on when a plug-in cannot be imported, which would be all but silent. So nothing is imported at the head of
this file that may be missing; all else is imported in `register`, whose errors end vLLM with their message.

Shapes: L MoE layers, E logical experts, P physical slots, R ranks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.artifacts import Plan

PLAN, POLICY, UNTESTED = "EQUIPOISE_PLAN", "EQUIPOISE_POLICY", "EQUIPOISE_UNTESTED_VLLM"
TESTED = ("0.32.",)
"""Releases of vLLM that the engine tests run with."""

RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
REBALANCE = ["weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices"]
ADD_MODEL = ["self", "model", "model_config", "model_name"]
logger = logging.getLogger("vllm.equipoise")  # a child of vLLM's logger, so that it is seen in vLLM's log


def register() -> None:
    """Put the plan or policy that the environment names in place of vLLM's own; vLLM calls this in every process.

    Raises:
        EquipoiseError: both are named, the plan or policy cannot be used, or this vLLM is not known to work with it.
    """
    plan_file, policy = os.environ.get(PLAN), os.environ.get(POLICY)
    if not plan_file and not policy:
        return
    from equipoise.engines.vllm_policy import online_policy, static_policy
    from equipoise.errors import EquipoiseError

    if plan_file and policy:
        raise EquipoiseError(f"{PLAN} and {POLICY} are both set; unset {POLICY} for a fixed plan, or {PLAN} to plan online.")
    policies, state, arguments = _interface()
    current = policies.EPLB_POLICIES["default"]
    if getattr(current, "equipoise", None) is not None:
        return  # the parent process, of which this is a fork, has done it
    if current is not policies.DefaultEplbPolicy:
        raise EquipoiseError(
            f"vLLM's balancing policy was replaced by {current.__module__}.{current.__qualname__} before; "
            "load one such plug-in only (VLLM_PLUGINS names those to load)."
        )
    plan = None
    if plan_file:
        from equipoise.artifacts import Plan

        plan = Plan.load_file(Path(plan_file))
        chosen = static_policy(plan, current)
    else:
        chosen = online_policy(str(policy), current)
    chosen.equipoise = plan_file or policy
    _carry_to_ray()
    policies.EPLB_POLICIES["default"] = chosen
    _watch_models(state.EplbState, plan)
    _watch_configuration(arguments.EngineArgs, plan)
    logger.info("Equipoise: vLLM's expert load balancer uses %s.", f"plan '{plan_file}'" if plan else f"policy '{policy}'")


def _carry_to_ray() -> None:
    """Let vLLM hand our variables on to workers that Ray starts, which inherit none; the plan's path as a whole one."""
    if PLAN in os.environ:
        os.environ[PLAN] = os.path.abspath(os.environ[PLAN])
    prefixes = [p for p in os.environ.get(RAY_PREFIXES, "").split(",") if p]
    if "EQUIPOISE_" not in prefixes:
        os.environ[RAY_PREFIXES] = ",".join([*prefixes, "EQUIPOISE_"])


def _interface() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules of vLLM that are worked on, after a look at everything that is taken for granted."""
    import vllm

    from equipoise.errors import EquipoiseError

    version = str(vllm.__version__)
    if not version.startswith(TESTED) and not os.environ.get(UNTESTED):
        raise EquipoiseError(
            f"the Equipoise plug-in is tested with vLLM {', '.join(v + 'x' for v in TESTED)}, this is {version}; "
            f"use that one, unset {PLAN} and {POLICY}, or set {UNTESTED}=1 to try it if its interface fits."
        )

    def fits(condition: bool, what: str) -> None:
        if not condition:
            raise EquipoiseError(
                f"vLLM {version} is not built as the Equipoise plug-in needs it: {what}; use vLLM {TESTED[-1]}x, "
                f"or unset {PLAN} and {POLICY}."
            )

    try:
        from vllm.distributed.eplb import eplb_state as state
        from vllm.distributed.eplb import policy as policies
        from vllm.engine import arg_utils as arguments

        rebalance = inspect.signature(policies.AbstractEplbPolicy.rebalance_experts)
        add_model = inspect.signature(state.EplbState.add_model)
        step = inspect.getsource(state.EplbState.step)
        fits(list(policies.EPLB_POLICIES) == ["default"], "its policies are not one named 'default'")
        fits(state.EPLB_POLICIES is policies.EPLB_POLICIES, "it looks up policies elsewhere")
        fits(list(rebalance.parameters) == REBALANCE, f"rebalance_experts takes {list(rebalance.parameters)}")
        fits(
            "Tensor" in str(rebalance.return_annotation) and "tuple" not in str(rebalance.return_annotation),
            "a policy returns several maps",
        )
        fits(list(add_model.parameters) == ADD_MODEL, f"EplbState.add_model takes {list(add_model.parameters)}")
        fits(
            "self.expert_rearrangement_step >= self.expert_rearrangement_step_interval" in step,
            "EplbState counts steps otherwise",
        )
        fits(callable(state.get_ep_group) and callable(arguments.EngineArgs.create_engine_config), "names are missing")
    except (ImportError, AttributeError, TypeError, OSError) as error:
        fits(False, str(error))
    return policies, state, arguments


def _watch_models(state_class: Any, plan: Plan | None) -> None:
    """Check every model that vLLM balances against the plan, and let the plan take effect at the first step.

    vLLM would wait for a quarter of `step_interval` before it asks the policy. Weights are moved by vLLM itself, as in any
    rearrangement, so until the step after the last layer has moved it serves from its own placement, with the same output.
    """
    from equipoise.engines.vllm_policy import check_placement

    original = state_class.add_model

    @functools.wraps(original)
    def add_model(self: Any, model: Any, model_config: Any, model_name: str | None = None) -> None:
        if plan is not None:
            from vllm.distributed.eplb.eplb_state import get_ep_group

            check_placement(
                plan,
                layers=model.num_moe_layers,
                experts=model.num_logical_experts,
                slots=model.num_physical_experts,
                ranks=get_ep_group().world_size,
                model=model_name or str(getattr(model_config, "model", "the model")),
            )
        original(self, model, model_config, model_name)
        if plan is not None:
            self.expert_rearrangement_step = self.expert_rearrangement_step_interval - 1

    state_class.add_model = add_model


def _watch_configuration(arguments_class: Any, plan: Plan | None) -> None:
    """Refuse to start with a configuration under which vLLM would never ask our policy, or could not follow it."""
    original = arguments_class.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        check_configuration(config, plan)
        return config

    arguments_class.create_engine_config = create_engine_config


def check_configuration(config: Any, plan: Plan | None) -> None:
    """Compare vLLM's configuration with what the plan, or planning online, needs.

    Args:
        config: vLLM's `VllmConfig`.
        plan: the fixed plan; None when planning online.

    Raises:
        EquipoiseError: load balancing is off, or ranks or redundant experts are not the plan's; the message has the options.
    """
    from equipoise.errors import EquipoiseError

    parallel = config.parallel_config
    name = PLAN if plan is not None else POLICY
    redundant = None if plan is None else plan.layers[0].num_slots - plan.model.max_experts
    if not parallel.enable_eplb:
        example = "" if redundant is None else f" --eplb-config '{{\"num_redundant_experts\": {redundant}}}'"
        raise EquipoiseError(
            f"{name} is set, but vLLM's expert load balancing is off, so it would have no effect; "
            f"add --enable-expert-parallel --enable-eplb{example}, or unset {name}."
        )
    if parallel.enable_elastic_ep:
        raise EquipoiseError(f"{name} is set, but elastic expert parallelism changes the ranks; unset one of the two.")
    if plan is None:
        return
    if parallel.pipeline_parallel_size > 1:
        raise EquipoiseError(
            f"{PLAN}: pipeline parallelism splits the plan's layers among stages; use 1 stage, or unset {PLAN}."
        )
    ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size * parallel.data_parallel_size
    if ranks != plan.units:
        raise EquipoiseError(
            f"{PLAN} is for {plan.units} ranks, vLLM has {ranks} (tensor x context x data parallel size); "
            f"plan again with --ranks {ranks}, or give vLLM {plan.units} ranks."
        )
    given = parallel.eplb_config.num_redundant_experts
    if given != redundant:
        raise EquipoiseError(
            f"{PLAN} has {redundant} redundant experts, vLLM is given {given}; "
            f"give --eplb-config '{{\"num_redundant_experts\": {redundant}}}', "
            f"or plan with --slots {plan.model.max_experts + given}."
        )
