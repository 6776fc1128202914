"""Balanced models on disk: saved whole or not at all, loaded completely or refused."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from equipoise.artifacts.plan import PLAN_FILE
from equipoise.errors import CheckpointError
from equipoise.execution.balanced_config import METHOD, WEIGHTS, WEIGHTS_INDEX, plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STOCK_INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model*.safetensors.index.json", "*.gguf")
# What transformers' save_pretrained takes and this one can honour; a hub upload would send names not yet changed.
OPTIONS = {"max_shard_size", "is_main_process", "save_original_format", "safe_serialization"}


def save_balanced(model: PreTrainedModel, tokenizer: Any | None, directory: str | Path, **options: Any) -> None:
    """Save a balanced model, whole or not at all.

    Everything is written to a hidden directory beside the destination, which is then renamed. Files of an earlier
    save that are not replaced (a tokenizer) are kept.

    Args:
        model: a balanced model.
        tokenizer: saved beside it, if given; any processor with `save_pretrained` will do.
        directory: where to; new, empty, or holding no weights but those of an earlier save of a balanced model.
        options: `max_shard_size` and others of transformers' `save_pretrained`.

    Raises:
        CheckpointError: the model is not balanced, the destination holds another model, or it cannot be written.
    """
    plan = plan_of(model)
    if plan is None:
        raise CheckpointError("the model carries no plan; apply one first, or save it with its own save_pretrained.")
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise CheckpointError(f"saving a balanced model does not take '{unknown[0]}'; it takes {', '.join(sorted(OPTIONS))}.")
    directory = Path(os.path.abspath(directory))
    temporary: Path | None = None
    try:
        refuse_other_model(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        _write(model, tokenizer, temporary, options)
        plan.save(temporary / PLAN_FILE)
        keep_others(directory, temporary)
        put_in_place(temporary, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write '{directory}': {reason}. Choose a writable place with enough room.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def save_pretrained(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """`save_pretrained` of a balanced model: the same call as any model's, written by `save_balanced`."""
    save_balanced(model, None, save_directory, **options)


def load(directory: str | Path, **options: Any) -> PreTrainedModel:
    """Load a balanced model and make sure that all of it was there.

    Args:
        directory: what `save_balanced` wrote.
        options: as for `from_pretrained` (dtype, device_map, ...).

    Raises:
        CheckpointError: not a balanced model, or tensors are missing, unexpected or of another shape.
    """
    import transformers

    path = Path(directory)
    config = _read_json(path / "config.json")
    if config.get("quantization_config", {}).get("quant_method") != METHOD:
        raise CheckpointError(f"'{directory}' holds no balanced model (config.json names no {METHOD} quantization).")
    name = next(iter(config.get("architectures") or ()), None)
    kind = getattr(transformers, str(name), None)
    if kind is None:
        raise CheckpointError(f"'{directory}' is a {name}, which this transformers ({transformers.__version__}) does not have.")
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"cannot load '{directory}': {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            first = sorted(str(key) for key in info[problem])[0]
            raise CheckpointError(
                f"'{directory}' is not whole: {len(info[problem])} {problem.replace('_', ' ')} (first: {first}); save it again."
            )
    return model  # type: ignore[no-any-return]


def _write(model: Any, tokenizer: Any | None, directory: Path, options: dict[str, Any]) -> None:
    """All files of a balanced model, under the names that only our quantizer looks for."""
    type(model).save_pretrained(model, directory, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    index = directory / STOCK_INDEX
    sharded = index.exists()
    for shard in directory.glob("model*.safetensors"):
        shard.rename(directory / shard.name.replace("model", "equipoise", 1))
    if sharded:
        content = _read_json(index)
        content["weight_map"] = {k: v.replace("model", "equipoise", 1) for k, v in content["weight_map"].items()}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        index.unlink()
    config_file = directory / "config.json"
    config = _read_json(config_file)
    config["quantization_config"]["weights"] = WEIGHTS_INDEX if sharded else WEIGHTS
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_other_model(directory: Path) -> None:
    """Raise `CheckpointError` when a directory holds weights that are not of a balanced model.

    Weights under stock names would be loaded by tools that do not know the plan: they are never left beside ours.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"cannot write '{directory}': it is a file. Choose a directory.")
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)) if directory.exists() else []
    if others:
        raise CheckpointError(f"'{directory}' holds another model's weights ({others[0]}); choose a directory of its own.")


def work_directory(directory: Path) -> Path:
    """Where a run that takes long prepares a directory: a hidden neighbour that the same run finds again."""
    return directory.with_name(f".{directory.name}.part")


def keep_others(old: Path, new: Path) -> None:
    """Bring along what an earlier save left and this one does not replace, its weights excepted."""
    if not old.exists():
        return
    for path in old.iterdir():
        if (new / path.name).exists() or path.name.startswith("equipoise"):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def put_in_place(new: Path, directory: Path) -> None:
    """Rename a finished directory to its place; an old one is moved aside first and removed last."""
    umask = os.umask(0)
    os.umask(umask)
    new.chmod(0o777 & ~umask)  # mkdtemp makes private directories
    for path in new.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not directory.exists():
        new.rename(directory)
        return
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.old."))
    directory.rename(aside / "old")
    try:
        new.rename(directory)
    except OSError:
        (aside / "old").rename(directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no '{path}'; give the directory of a model that `equipoise apply` or `equipoise balance` wrote."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' is not a configuration.")
    return content
