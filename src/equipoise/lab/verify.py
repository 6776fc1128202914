"""Repeat the first steps of a run and compare their losses bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from equipoise.lab.recipe import Recipe, RecipeError
from equipoise.lab.shelf import shelf_directory
from equipoise.lab.training import LOSSES, train


class Repeated(BaseModel):
    """How a repeated run compares with the one that was kept.

    Attributes:
        name: of the recipe.
        steps: compared.
        first_difference: step (from 1) whose loss differs first; None when all are equal.
        largest_difference: of the losses, in nats.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    steps: int
    first_difference: int | None
    largest_difference: float

    @property
    def equal(self) -> bool:
        """Whether every loss is the same number, to the last bit."""
        return self.first_difference is None

    def sentence(self) -> str:
        """For people."""
        if self.equal:
            return f"{self.name}: the losses of {self.steps} steps are the same to the last bit"
        return (
            f"{self.name}: losses differ from step {self.first_difference} on, by at most {self.largest_difference:.3g} nats "
            f"in {self.steps} steps; other processors and other releases of torch round differently"
        )


def repeat(recipe: Recipe, data: Path, *, steps: int, against: Path | None = None, progress: bool = True) -> Repeated:
    """Train the first steps of a recipe in a temporary directory and compare.

    Args:
        recipe: to repeat.
        data: directory of the text.
        steps: how many.
        against: kept losses; those of the shelf's model of that name when omitted.
        progress: show a progress bar.

    Raises:
        RecipeError: there are no kept losses to compare with.
    """
    kept_file = against or shelf_directory() / recipe.name / LOSSES
    try:
        kept = [float(loss) for loss in json.loads(kept_file.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"cannot read the losses to compare with, '{kept_file}': {error}.") from error
    steps = min(steps, len(kept))
    with tempfile.TemporaryDirectory() as place:
        again = train(recipe, data, Path(place), until=steps, progress=progress)
    differs = [step for step, (one, other) in enumerate(zip(again, kept, strict=False), start=1) if one != other]
    largest = max(abs(one - other) for one, other in zip(again, kept, strict=False))
    return Repeated(name=recipe.name, steps=steps, first_difference=differs[0] if differs else None, largest_difference=largest)
