"""Equipoise keeps the load of sparse Mixture-of-Experts models in balance at inference.

The public names are imported when they are first used, so that `import equipoise` needs neither torch nor transformers:

    profile(model, tokenizer, {"code": documents}) -> Profile      what was measured
    plan(profile, method="rq") -> Plan                             what was decided
    apply(model, plan) -> the model, balanced in place
    save(model, tokenizer, directory); load(directory)             also: transformers' own from_pretrained
    evaluate(base, {"rq": model}, tokenizer, texts=...) -> Evaluation   what was proved
    balance("model", {"code": documents}, "out")                   all of it
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from equipoise.execution.registration import register_on_import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from equipoise.artifacts import Evaluation, Plan, Profile
    from equipoise.errors import EquipoiseError
    from equipoise.evaluation.evaluate import evaluate
    from equipoise.execution.apply import apply_plan as apply
    from equipoise.execution.checkpoint import load
    from equipoise.execution.checkpoint import save_balanced as save
    from equipoise.pipeline import balance
    from equipoise.planning.methods import make_plan as plan
    from equipoise.profiling.calibrate import profile

_PUBLIC = {
    "EquipoiseError": "errors:EquipoiseError",
    "Evaluation": "artifacts:Evaluation",
    "Plan": "artifacts:Plan",
    "Profile": "artifacts:Profile",
    "apply": "execution.apply:apply_plan",
    "balance": "pipeline:balance",
    "evaluate": "evaluation.evaluate:evaluate",
    "load": "execution.checkpoint:load",
    "plan": "planning.methods:make_plan",
    "profile": "profiling.calibrate:profile",
    "save": "execution.checkpoint:save_balanced",
}

__all__ = [
    "EquipoiseError", "Evaluation", "Plan", "Profile", "__version__",
    "apply", "balance", "evaluate", "load", "plan", "profile", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'equipoise' has no attribute '{name}'")
    module, attribute = _PUBLIC[name].split(":")
    value = getattr(import_module(f"equipoise.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_import()  # from here on transformers loads balanced models, whichever of the two is imported first
