"""Profile: what was measured of a model on text.

Shapes: S scenarios, W windows, L MoE layers, E logical experts of the widest layer (narrower layers are padded with
zeros), 2 phases (prefill, decode).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as parse_tensors
from safetensors.numpy import save as serialize_tensors

from equipoise.artifacts.files import write_atomic
from equipoise.artifacts.json_file import first_problem
from equipoise.artifacts.model_facts import ModelFacts
from equipoise.errors import ProfileError

SCHEMA = "equipoise.profile/1"
PHASES = ("prefill", "decode")
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Source(BaseModel):
    """Where a profile's numbers come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: str = Field(default="text", description="text for a model run here, or the engine whose records were read")
    scenarios: tuple[str, ...] = Field(min_length=1, description="names of the traffics kept apart")
    texts: dict[str, list[str]] = Field(default_factory=dict, description="files of each scenario")
    text_sha256: str = Field(default="", description="hash of the token ids that were run")
    options: dict[str, Any] = Field(default_factory=dict, description="token budget, batch size, seed, ...")
    routing_policy: str = Field(default="native", description="native = the model's own router decides")
    equipoise_version: str = ""


@dataclass(frozen=True, eq=False)
class Profile:
    """Loads, gate mass, transitions and importance of every expert, by layer, scenario and window.

    Attributes:
        model: identity and layers of the model measured.
        source: text, scenarios, options and routing policy of the measurement.
        counts: [S, 2, L, E] selections by phase (prefill, decode) of real tokens.
        gate_mass: [S, L, E] sum of the gate weights of those selections.
        tokens: [S] real tokens that were run through the stack that has the MoE layers
            (encoder-decoder models: [S] tokens of the decoder; per-layer totals are in `counts`).
        windows: [W, L, E] selections in consecutive stretches of text, in order of time within a scenario.
        window_scenario: [W] index of the scenario of each window.
        transitions: [L-1, E, E] real tokens' pairs (expert in layer l, expert in layer l+1); empty when not recorded.
        coactivation: [L, E, E] real tokens that chose both experts; empty when not recorded.
        importance: name -> [L, E] scores ("gate_norm", "leave_one_out", ...), higher is more important; "wanda" holds the raw
            score, whose LARGEST value R&Q takes for less important.
        scenario_importance: name -> [S, L, E] the same of each scenario alone, for estimators that keep them apart ("easy_ep").
        output_error: precision name -> [L, E] sum over an expert's tokens of g^2 ||y_quantized - y||^2.
        output_energy: [L] sum over tokens of ||sum_e g_e y_e||^2, to which `output_error` is relative; a token counts for at
            most 100 of median energy, so that a few massive activations do not hide all others; empty when not measured.
        sensitivity: [L, E] KL divergence of the model's predictions, in nats per predicted token, for each unit of relative
            squared error that the expert causes in its layer's routed output; empty when not measured.
    """

    model: ModelFacts
    source: Source
    counts: Ints
    gate_mass: Floats
    tokens: Ints
    windows: Ints
    window_scenario: Ints
    transitions: Ints = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    coactivation: Ints = field(default_factory=lambda: np.zeros((0, 0, 0), np.int64))
    importance: Mapping[str, Floats] = field(default_factory=dict)
    scenario_importance: Mapping[str, Floats] = field(default_factory=dict)
    output_error: Mapping[str, Floats] = field(default_factory=dict)
    output_energy: Floats = field(default_factory=lambda: np.zeros(0, np.float64))
    sensitivity: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float64))

    def __post_init__(self) -> None:
        self._check()
        for array in [*self._arrays().values()]:
            array.setflags(write=False)

    @property
    def load(self) -> Ints:
        """[L, E] selections over all scenarios and phases."""
        return np.asarray(self.counts.sum((0, 1)))

    @property
    def scenario_load(self) -> Ints:
        """[S, L, E] selections of each scenario over both phases."""
        return np.asarray(self.counts.sum(1))

    @property
    def widths(self) -> Ints:
        """[L] number of routed experts of each layer."""
        return np.array([layer.num_experts for layer in self.model.layers], np.int64)

    def relative_error(self, precision: str) -> Floats:
        """[L, E] squared error of the layer's routed output over its energy, if that expert alone is stored so.

        Args:
            precision: a storage format that was measured.

        Raises:
            ProfileError: the error of this precision was not measured.
        """
        if precision not in self.output_error:
            have = ", ".join(self.output_error) or "none"
            raise ProfileError(
                f"this profile has no measured output error at '{precision}' (it has: {have}). "
                f"Profile again with --importance output_error --precisions {precision}."
            )
        return np.asarray(self.output_error[precision] / self.output_energy[:, None])

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "counts": self.counts,
            "gate_mass": self.gate_mass,
            "tokens": self.tokens,
            "windows": self.windows,
            "window_scenario": self.window_scenario,
            "transitions": self.transitions,
            "coactivation": self.coactivation,
            "output_energy": self.output_energy,
            "sensitivity": self.sensitivity,
        }
        arrays |= {f"importance/{name}": a for name, a in self.importance.items()}
        arrays |= {f"scenario_importance/{name}": a for name, a in self.scenario_importance.items()}
        arrays |= {f"output_error/{name}": a for name, a in self.output_error.items()}
        return arrays

    def _check(self) -> None:
        s, n_layers, e = len(self.source.scenarios), len(self.model.layers), self.model.max_experts
        w = self.windows.shape[0]
        wanted: dict[str, list[tuple[int, ...]]] = {
            "counts": [(s, 2, n_layers, e)],
            "gate_mass": [(s, n_layers, e)],
            "tokens": [(s,)],
            "windows": [(w, n_layers, e)],
            "window_scenario": [(w,)],
            "transitions": [(max(n_layers - 1, 0), e, e), (0, 0, 0)],
            "coactivation": [(n_layers, e, e), (0, 0, 0)],
            "output_energy": [(n_layers,), (0,)],
            "sensitivity": [(n_layers, e), (0, 0)],
        }
        for name, array in self._arrays().items():
            shapes = wanted.get(name, [(s, n_layers, e) if name.startswith("scenario_") else (n_layers, e)])
            if array.shape not in shapes:
                raise ProfileError(f"profile array '{name}' has shape {array.shape}, expected {shapes[0]}; record it again.")
        if self.counts.size and int(self.counts.min()) < 0:
            raise ProfileError("profile has negative counts; record it again.")
        padding = np.arange(e) >= np.array([layer.num_experts for layer in self.model.layers])[:, None]
        if bool((self.load * padding).any()):
            raise ProfileError("profile counts experts that their layer does not have; record it again.")

    def save(self, path: str | Path) -> None:
        """Write the profile to one safetensors file with a JSON header (no pickle); whole or not at all."""
        header = {"schema": SCHEMA, "model": self.model.model_dump(mode="json"), "source": self.source.model_dump(mode="json")}
        arrays = {k: np.ascontiguousarray(v) for k, v in self._arrays().items()}
        write_atomic(path, serialize_tensors(arrays, metadata={"equipoise": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load_file(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            ProfileError: missing, truncated, of another format, or inconsistent; the message names the field.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ProfileError(f"cannot read profile '{path}': {error.strerror or error}.") from error
        try:
            arrays = parse_tensors(data)
            header = json.loads(_metadata(data)["equipoise"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ProfileError(
                f"'{path}' is not a whole equipoise profile ({error}); give a file that `equipoise profile` wrote, or record "
                "it again."
            ) from error
        if header.get("schema") != SCHEMA:
            raise ProfileError(f"'{path}' has schema '{header.get('schema')}'; this version reads '{SCHEMA}'.")
        fields: dict[str, Any] = {"importance": {}, "scenario_importance": {}, "output_error": {}}
        for key, array in arrays.items():
            group, _, name = key.partition("/")
            if name:
                fields[group][name] = array
            else:
                fields[key] = array
        try:
            model = ModelFacts.model_validate(header["model"])
            source = Source.model_validate(header["source"])
            return cls(model=model, source=source, **fields)
        except (ValidationError, KeyError, TypeError) as error:
            raise ProfileError(f"'{path}' is not a valid profile: {first_problem(error)}") from error


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return dict(metadata)
