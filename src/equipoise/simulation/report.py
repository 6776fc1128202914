"""What a simulation found, as one value that is saved as JSON."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from equipoise.artifacts.json_file import JsonFile

SCHEMA = "equipoise.simulation/1"
Origin = Literal["replayed", "estimated"]
Sample = Literal["in", "out"]


class Spread(BaseModel):
    """Mean and 95th percentile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    p95: float


class RankFigures(BaseModel):
    """What each rank does in one step, mean over batches; sums over layers. One entry per rank."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[float, ...] = Field(description="token-expert pairs")
    activated: tuple[float, ...] = Field(description="replicas that at least one token was sent to")
    bytes: tuple[float, ...] | None = Field(description="bytes of the weights of those; null when sizes are unknown")


class PlanResult(BaseModel):
    """One plan on one traffic. Spreads are over layers and batches, those of `step` over batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str
    sample: Sample = Field(description="in: the plan was made from this traffic; out: from other traffic, or from none")
    slots: float = Field(description="physical slots of a layer, mean over layers")
    imbalance: Spread = Field(description="largest over mean rank load in token-expert pairs; 1 is balance")
    balancedness: float = Field(description="mean over layers and batches of mean over largest rank load")
    max_tokens: Spread = Field(description="token-expert pairs of the fullest rank of a layer")
    max_activated: Spread = Field(description="activated replicas of the rank that has most, of a layer")
    max_bytes: Spread | None = Field(description="bytes of weights that the rank which reads most must read, of a layer")
    step: Spread = Field(description="sum over layers of the slowest rank's time, in the cost model's unit")
    waiting: float = Field(description="share of the step in which the mean rank waits for the slowest")
    uncovered: float = Field(
        description="share of the rank times for which the cost model was continued beyond what was measured"
    )
    rank_sends: float = Field(description="other ranks that a token is sent to, per layer")
    node_sends: float = Field(description="other nodes that a token is sent to, per layer")
    rank_hops: float | None = Field(
        description="share of a token's pairs (expert, expert of the next layer) on different ranks; null if drawn"
    )
    node_hops: float | None = Field(description="the same, on different nodes")
    weights_moved: float = Field(description="experts whose weights the dispatcher sends for a step, all layers")
    bytes_moved: float | None = Field(description="bytes between ranks for a step: hidden states there and back, and weights")
    ranks: RankFigures
    rank_profile: tuple[float, ...] = Field(
        description="load of the ranks over their mean, fullest first; mean over layers, batches"
    )
    step_times: tuple[float, ...] = Field(description="of every batch")


class Part(BaseModel):
    """One traffic, and what the plans make of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    origin: Origin = Field(description="replayed: real per-token records; estimated: batches drawn from counts")
    sample: Sample
    batches: int
    tokens: int = Field(description="of all batches")
    results: tuple[PlanResult, ...]
    findings: tuple[str, ...] = Field(description="what a plan improves and what it worsens, against the reference")


class SimulationReport(JsonFile):
    """Plans side by side on the same batches."""

    kind: ClassVar[str] = "simulation"

    schema_version: str = Field(default=SCHEMA, alias="schema")
    model: str
    ranks: int
    nodes: int
    batch: int
    phase: str
    rule: str
    rule_options: dict[str, Any] = Field(default_factory=dict)
    cost: str
    unit: str
    reference: str = Field(description="the plan that findings compare with")
    seed: int
    equipoise_version: str = ""
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
