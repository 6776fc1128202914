"""Serving engines: read what they recorded into a Profile, write a Plan as the file that they load.

The names are imported when they are first used, so that an engine's plug-in loads no more than it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.engines.placement import Written
    from equipoise.engines.records import Recording, to_profile
    from equipoise.engines.registry import PLAN_READERS, READERS, WRITERS, read_plan, read_records, write_plan

_HOME = {
    "PLAN_READERS": "registry",
    "READERS": "registry",
    "WRITERS": "registry",
    "Recording": "records",
    "Written": "placement",
    "read_plan": "registry",
    "read_records": "registry",
    "to_profile": "records",
    "write_plan": "registry",
}

__all__ = [
    "PLAN_READERS",
    "READERS",
    "WRITERS",
    "Recording",
    "Written",
    "read_plan",
    "read_records",
    "to_profile",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise.engines' has no attribute '{name}'")
    return getattr(import_module(f"equipoise.engines.{_HOME[name]}"), name)
