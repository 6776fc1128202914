"""A model and its tokenizer from a local directory or a hub name, with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.auto_factory import _get_model_class

from equipoise.errors import ModelError
from equipoise.models.architectures import learn

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    memory: int | None = None,
    device_map: str | None = None,
    experts_parallel: bool = False,
) -> Any:
    """Load a causal or encoder-decoder language model in evaluation mode.

    Code that comes with a checkpoint is never run.

    Args:
        name: a local directory, or a hub name.
        dtype: "auto" (as stored), "fp32", "bf16" or "fp16".
        device: where the model goes, as torch names it.
        memory: bytes that weights may take. A model whose files are larger, and any from a hub, is streamed: of its
            transformer layers, only the one that is used is held (`models.streamed`), and read anew whenever it is run. All
            models are loaded whole when None.
        device_map: how accelerate spreads the model over devices, and beyond them over main memory and disk: "auto",
            "balanced", "sequential", ...; it takes the place of `device`.
        experts_parallel: this is one of several processes that torchrun has started, and each holds an equal part of every
            layer's experts, and of whatever else transformers can divide; all have to call the model together.

    Raises:
        ModelError: unknown dtype, device or device map, no such model, an unreadable or incomplete checkpoint, or one that
            transformers cannot divide.
    """
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}.")
    ways = {"memory": memory is not None, "device_map": device_map is not None, "experts_parallel": experts_parallel}
    if sum(ways.values()) > 1:
        given = " and ".join(way for way, asked in ways.items() if asked)
        raise ModelError(f"{given} are two ways to hold a large model; give one of them.")
    target = _device(device)
    _check_directory(name)
    config = load_config(name)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"dtype": DTYPES[dtype], "trust_remote_code": False}
    with _explained(name):
        if memory is not None and _weights_bytes(name) > memory:
            model, report = _open_streamed(loader, config, name, target, options)
        elif device_map is not None or experts_parallel:
            where = {"distributed_config": _experts_parallel()} if experts_parallel else {"device_map": device_map}
            model, report = loader.from_pretrained(name, output_loading_info=True, **options, **where)
            if "disk" in getattr(model, "hf_device_map", {}).values():
                raise ModelError(
                    f"the devices and main memory together do not hold '{name}': a part of it would stay on disk. Give "
                    "--memory GB instead, which reads one layer after the other."
                )
        else:
            model, report = loader.from_pretrained(name, output_loading_info=True, **options)
            model = model.to(target)
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills them with random numbers and only warns; a measurement of those would be worthless.
        raise ModelError(
            f"'{name}' lacks {len(missing)} of the model's weights, such as '{missing[0]}'; copy the checkpoint again."
        )
    return model.eval()


def load_config(name: str) -> Any:
    """A model's configuration; architectures of our own are made known to transformers first.

    Raises:
        ModelError: it cannot be read.
    """
    with _explained(name):
        learn(str(PreTrainedConfig.get_config_dict(name)[0].get("model_type")))
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: a local directory, or a hub name.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    _check_directory(name)
    if Path(name).is_dir() and not any(path for pattern in TOKENIZER_FILES for path in Path(name).glob(pattern)):
        raise ModelError(
            f"directory '{name}' holds no tokenizer; copy the model's there (tokenizer.json, tokenizer_config.json)."
        )
    with _explained(name, "a tokenizer of "):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _weights_bytes(name: str) -> float:
    """Bytes of a directory's weights; those of a hub are not known before they are here."""
    path = Path(name)
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else float("inf")


def _open_streamed(loader: Any, config: Any, name: str, device: torch.device, options: dict[str, Any]) -> tuple[Any, Any]:
    """What `loader.from_pretrained` loads, streamed."""
    from equipoise.models.streamed import open_streamed

    kind = _get_model_class(config, loader._model_mapping)
    if kind.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    if device.type != "cpu":
        options = options | {"device_map": {"": str(device)}}
    return open_streamed(kind, name, config=config, **options)


def _check_directory(name: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1 or path.exists()
    if not looks_local:
        return
    if not path.exists():
        raise ModelError(f"there is no directory '{name}'; give a model's directory, or a hub name such as 'owner/model'.")
    if not path.is_dir():
        raise ModelError(f"'{name}' is a file; give the directory that holds the model's config.json and weights.")
    if not (path / "config.json").is_file():
        raise ModelError(f"directory '{name}' has no config.json, so it holds no transformers model.")


def _experts_parallel() -> Any:
    """The expert parallelism of transformers over all processes."""
    from transformers.distributed import DistributedConfig

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        raise ModelError("one process alone has nobody to share experts with; start it with `torchrun --nproc-per-node N`.")
    return DistributedConfig(tp_size=size, ep_size=size)


def _device(name: str) -> torch.device:
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes, each with a device of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' cannot be used here ({str(error).splitlines()[0]}); 'cpu' always can.") from error
    return device


@contextlib.contextmanager
def _explained(name: str, what: str = "") -> Iterator[None]:
    """What transformers raises while it reads a checkpoint, as one line that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        if Path(name).is_dir():
            where = " The checkpoint is not whole; copy it again." if isinstance(error, FileNotFoundError) else ""
        else:
            where = (
                f" There is no directory '{name}' here either; give a model's directory, or the name of a model on a hub "
                "within reach."
            )
        raise ModelError(f"cannot load {what}'{name}': {reason}.{where}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise ModelError(
            f"cannot load {what}'{name}': a weights file is damaged ({error}); copy the checkpoint again."
        ) from error
