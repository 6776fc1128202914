"""Serving engines: read what they recorded into a Profile, write a Plan as the file that they load."""

from equipoise.engines.placement import Written
from equipoise.engines.records import Recording, to_profile
from equipoise.engines.registry import PLAN_READERS, READERS, WRITERS, read_plan, read_records, write_plan

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
