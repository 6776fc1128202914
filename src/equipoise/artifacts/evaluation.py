"""Evaluation: what was proved about a balanced model beside its base, measured in one run."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from equipoise.artifacts.json_file import JsonFile

SCHEMA = "equipoise.evaluation/1"


class Interval(BaseModel):
    """An estimate with its two-sided 95 % confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


class TextResult(BaseModel):
    """One text: perplexity of both models, distance of their predictions, and balance. All measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    tokens: int
    perplexity_base: float
    perplexity: float
    perplexity_change: Interval = Field(description="relative change, paired over documents; 0.01 = one per cent worse")
    kl: Interval = Field(description="mean KL(base || balanced) per predicted token, nats")
    top1_agreement: Interval = Field(description="share of predicted tokens on which both models' first choice agrees")
    lis_base: float = Field(description="mean over layers of LIS over units, the model as it was")
    lis: float = Field(description="mean over layers of LIS over units, measured from the slots that served the tokens")
    lis_paper: float = Field(description="mean over layers of m * max slot load / total load")


class TaskResult(BaseModel):
    """One task: the paper's Table 2 row with a paired interval. All measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    metric: str
    items: int
    score_base: float
    score: float
    difference: Interval = Field(description="score - score_base, paired over items")
    lis_base: float
    lis: float
    lis_paper: float


class Contender(BaseModel):
    """A balanced model's results against the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    plan_method: str
    exactness: str
    promise_kept: bool | None = Field(
        default=None, description="whether an `exact` plan left the predictions as they were; null for other classes"
    )
    expert_bytes: int = Field(description="bytes of all expert tensors, measured from the tensors")
    texts: tuple[TextResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    batch_order_kl: float | None = Field(
        default=None,
        description="class `routing` alone: mean KL in nats between predictions for the same rows in two orders within their "
        "batches; what is beyond rounding is the policy's doing",
    )
    seconds: float = Field(default=0.0, description="wall-clock of this model's evaluation")


class Evaluation(JsonFile):
    """Results of one run over one base model and any number of balanced ones."""

    kind: ClassVar[str] = "evaluation"

    schema_version: str = Field(default=SCHEMA, alias="schema")
    base: str
    base_fingerprint: str
    base_expert_bytes: int
    base_seconds: float = Field(default=0.0, description="wall-clock of the base model's evaluation")
    units: int
    options: dict[str, Any] = Field(default_factory=dict)
    equipoise_version: str = ""
    contenders: tuple[Contender, ...]
