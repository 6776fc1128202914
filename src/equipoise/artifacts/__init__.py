"""The three values that travel: Profile (measured), Plan (decided), Evaluation (proved)."""

from equipoise.artifacts.evaluation import Evaluation
from equipoise.artifacts.model_facts import LayerFacts, ModelFacts
from equipoise.artifacts.plan import LayerForecast, LayerPlan, Plan, Predicted
from equipoise.artifacts.profile import Profile, Source

__all__ = ["Evaluation", "LayerFacts", "LayerForecast", "LayerPlan", "ModelFacts", "Plan", "Predicted", "Profile", "Source"]
