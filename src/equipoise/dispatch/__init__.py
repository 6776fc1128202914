"""Which copy of an expert serves which token of a batch: the engines' rules and published dispatchers, as pure functions."""

from equipoise.dispatch.choice import RULES, Choice, check_rule, choose
from equipoise.dispatch.placement import LayerMap, layer_maps

__all__ = ["RULES", "Choice", "LayerMap", "check_rule", "choose", "layer_maps"]
