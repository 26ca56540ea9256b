"""Models: configuration, identity and loading.

A model is a folder or a Hugging Face hub id. Its identity is part of fingerprints: the digest of a folder's files, or the
name and revision of a hub id, which needs no download.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qrpo.config import Section, outside_input
from qrpo.errors import ModelError

__all__ = [
    "Dtype",
    "ModelConfig",
    "context_length",
    "has_float32_files",
    "is_local",
    "load_causal_lm",
    "load_model_config",
    "load_reward_model",
    "location",
    "model_identity",
    "require_model",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """A Hugging Face model: a folder, or a hub id with a revision."""

    path: str = outside_input(..., min_length=1)
    """A folder, or a hub id such as `org/name`. Not in fingerprints by itself: see
    `model_identity`."""
    revision: str | None = outside_input(None)
    """Branch, tag or commit of a hub id. Prefer a commit: a branch can move without changing any
    fingerprint."""
    dtype: Dtype = "auto"
    """Precision to load in; `auto` is the saved precision."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models that you trust like a program."""


def is_local(model: ModelConfig) -> bool:
    """Whether the path is a folder, or starts like a path and so cannot be a hub id."""
    return Path(model.path).expanduser().is_dir() or model.path.startswith(("/", "./", "../", "~"))


def location(model: ModelConfig) -> str:
    """The argument of `from_pretrained`: the folder with `~` expanded, or the hub id."""
    return str(Path(model.path).expanduser()) if is_local(model) else model.path


def require_model(model: ModelConfig) -> None:
    """Raise ModelError if a model's folder is missing or has no `config.json`; asks no hub."""
    if not is_local(model):
        if model.path.count("/") > 1:
            raise ModelError(
                f"no model folder {model.path!r} (from {Path.cwd()}): fix the path; a hub id is org/name"
            )
        return
    folder = Path(model.path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}: fix the path")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json: expected a Hugging Face model folder (config.json, *.safetensors, "
            "tokenizer.json), as `save_pretrained` writes it"
        )


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """The model's identity for fingerprints: `{"digest": sha256 of its files}`, or `{"hub":
    "id@revision"}`.

    Every file of a folder except hidden ones counts, by relative name and content. A process reads
    a file again only if its size or times change.
    """
    require_model(model)
    if not is_local(model):
        return {"hub": f"{model.path}@{model.revision or 'main'}"}
    folder = Path(model.path).expanduser()
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the GIL
        digests = threads.map(_digest, files)
        whole = hashlib.sha256()
        for path, digest in zip(files, digests, strict=True):
            whole.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return {"digest": whole.hexdigest()}


def _digest(path: Path) -> str:
    stat = path.stat()
    return _digest_unchanged(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _digest_unchanged(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model_config(model: ModelConfig) -> Any:
    """The model's `transformers` configuration; ModelError if there is none."""
    require_model(model)
    from transformers import AutoConfig

    with _readable_errors(model, "its configuration"):
        return AutoConfig.from_pretrained(location(model), **_arguments(model))


def context_length(model: ModelConfig) -> int:
    """Maximum number of tokens, prompt and completion together.

    A folder's `config.json` is read directly if it has the number, without importing transformers.
    """
    if is_local(model):
        config = _read_config(model)
        for section in (config, config.get("text_config") or {}):
            if isinstance(length := section.get("max_position_embeddings"), int):
                return length
    text = load_model_config(model).get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int):
            return length
    raise ModelError(f"the configuration of {model.path} states no context length: set max_model_len")


def has_float32_files(model: ModelConfig) -> bool:
    """Whether the model is a folder of float32 weights; asks no hub."""
    if not is_local(model):
        return False
    config = _read_config(model)
    return "float32" in (config.get("dtype"), config.get("torch_dtype"))


def _read_config(model: ModelConfig) -> dict[str, Any]:
    require_model(model)
    try:
        config: dict[str, Any] = json.loads((Path(location(model)) / "config.json").read_bytes())
    except ValueError as error:
        raise ModelError(_unloadable(model, "its configuration", error)) from error
    return config


def load_causal_lm(model: ModelConfig, device: str | None = None, *, empty: bool = False) -> Any:
    """The language model in evaluation mode on `device` (the first GPU if there is one, else the
    CPU); if `empty`, on the CPU with weights that take no memory until they are set."""
    from transformers import AutoModelForCausalLM

    if empty:
        from transformers.initialization import no_init_weights

        config, arguments = load_model_config(model), _arguments(model)
        dtype = config.dtype if model.dtype == "auto" else model.dtype
        with no_init_weights(), _readable_errors(model, "its code"):
            loaded = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=arguments["trust_remote_code"]
            )
        loaded.tie_weights()
        return loaded.eval()
    return _load(model, AutoModelForCausalLM, device)


def load_reward_model(model: ModelConfig, device: str | None = None) -> Any:
    """The sequence-classification model in evaluation mode on `device`; ModelError unless it has a
    single score."""
    from transformers import AutoModelForSequenceClassification

    config = load_model_config(model)
    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModelForSequenceClassification" in own_code and not model.trust_remote_code:
        # transformers would use its own class of that name, with a new random head
        raise ModelError(
            f"{model.path} comes with Python code: read it, and set trust_remote_code to true if you trust it"
        )
    architectures = config.architectures or []
    if architectures and not any(
        "SequenceClassification" in name or "Reward" in name for name in architectures
    ):
        raise ModelError(
            f"{model.path} is a {', '.join(architectures)}, expected a sequence-classification (reward) model: "
            "its head would be random"
        )
    if own_code:
        from transformers.models.llama import modeling_llama

        # ArmoRM's code imports this text for a docstring; transformers 5 no longer has it.
        modeling_llama.LLAMA_INPUTS_DOCSTRING = getattr(modeling_llama, "LLAMA_INPUTS_DOCSTRING", "")
    return _load(model, AutoModelForSequenceClassification, device)


def _load(model: ModelConfig, kind: Any, device: str | None) -> Any:
    require_model(model)
    import torch
    from safetensors import SafetensorError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    with _readable_errors(model, "its weights", KeyError, RuntimeError, SafetensorError):
        loaded = kind.from_pretrained(location(model), dtype=dtype, **_arguments(model))
    return loaded.to(device).eval()


@contextmanager
def _readable_errors(model: ModelConfig, what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise ModelError for errors of files, for those of these kinds, and for any of the model's own Python code."""
    known: tuple[type[Exception], ...] = (OSError, ValueError, *kinds)
    try:
        yield
    except known as error:
        raise ModelError(_unloadable(model, what, error)) from error
    except Exception as error:
        if not model.trust_remote_code:
            raise
        raise ModelError(
            f"the Python code of {model.path} does not run with transformers {version('transformers')} "
            f"({type(error).__name__}: {error}). Remedy: use a model that transformers supports without own code"
        ) from error


def _arguments(model: ModelConfig) -> dict[str, Any]:
    return {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}


def _unloadable(model: ModelConfig, what: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    remedy = (
        "fix the folder" if is_local(model) else "check the id and revision, the network, and `hf auth login`"
    )
    return f"cannot load {what} from {model.path}: {first}. Remedy: {remedy}"
