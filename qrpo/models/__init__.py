"""Models: configuration, identity and loading; `qrpo.models.limits` has the rows that they take.

A model is a folder or a Hugging Face hub id. Its identity is part of fingerprints: the digest of a
folder's files, or the name and revision of a hub id, which needs no download. A model is loaded in
the precision of its weights, and only if every weight comes from its files and every weight of the
files is used.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qrpo.config import Section, outside_input
from qrpo.errors import ModelError

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
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which some libraries would load and others not: merge it "
            "with `merge_and_unload()` and save the model, or remove the adapter's files"
        )


# Files of a model's folder that no stage reads: descriptions, logs, and what training leaves to
# resume from.
_UNREAD = re.compile(
    r"(readme|license|notice|model_card)(\.\w+)?|.*\.(md|png|jpe?g|gif|svg|pdf|log)|training_args\.bin|trainer_state\.json"
    r"|(optimizer|scheduler|scaler|rng_state\w*)\.(pt|pth|bin|safetensors)|events\.out\.tfevents.*|metrics\.parquet"
    r"|(checkpoint-\d+|checkpoints|global_step\d+|runs|logs)/.*",
    re.IGNORECASE,
)


def model_identity(model: ModelConfig, *, every_file: bool = False) -> dict[str, Any]:
    """The model's identity for fingerprints: `{"digest": sha256 of its files}`, or `{"hub":
    "id@revision"}`.

    The files of a folder count by relative name and content, except hidden ones and those that no
    stage reads. Of `generation_config.json` only the end tokens count. With `every_file` it is the
    digest of earlier versions, for which only hidden files did not count. A process reads a file
    again only if its size or times change.
    """
    require_model(model)
    if not is_local(model):
        return {"hub": f"{model.path}@{model.revision or 'main'}"}
    folder = Path(model.path).expanduser()
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not every_file:
        files = {name: path for name, path in files.items() if not _UNREAD.fullmatch(name)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the GIL
        digests = dict(zip(files, threads.map(_digest, files.values()), strict=True))
    if not every_file and "generation_config.json" in files:
        digests["generation_config.json"] = _end_tokens(files["generation_config.json"])
    whole = hashlib.sha256()
    for name in sorted(files, key=lambda name: files[name]):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return {"digest": whole.hexdigest()}


def _end_tokens(path: Path) -> str:
    """The end tokens of a generation config as JSON, or the file's digest if it is no JSON
    object."""
    try:
        return json.dumps(json.loads(path.read_bytes()).get("eos_token_id"))
    except (ValueError, AttributeError):
        return _digest(path)


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


def saved_dtype(model: ModelConfig) -> Literal["float32", "bfloat16", "float16"]:
    """The precision to load in: `model.dtype`, or for `auto` that of most weights in the files.

    Without safetensors files it is what the configuration states, else float32.
    """
    if model.dtype != "auto":
        return model.dtype
    sizes = _weight_sizes(model)
    if floats := [name for name in _FLOATS if sizes[name]]:
        return _FLOATS[max(floats, key=lambda name: sizes[name])]
    stated = str(load_model_config(model).dtype).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float16") else "float32"  # type: ignore[return-value]


_FLOATS: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "F64": "float32",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


def has_float32_files(model: ModelConfig) -> bool:
    """Whether the model is a folder of float32 weights; asks no hub."""
    return is_local(model) and saved_dtype(model.model_copy(update={"dtype": "auto"})) == "float32"


def config_json(model: ModelConfig) -> dict[str, Any]:
    """`config.json` of a folder."""
    require_model(model)
    try:
        return dict(json.loads((Path(location(model)) / "config.json").read_bytes()))
    except ValueError as error:
        raise ModelError(_unloadable(model, "its configuration", error)) from error


def dtype_setting(model: ModelConfig, *, unstated_is_saved: bool) -> str:
    """`model.dtype` for fingerprints.

    `auto` stands for what `config.json` states, as earlier versions loaded it (and, with
    `unstated_is_saved`, for the saved precision where it states none). Else it is the precision of
    the folder's weights.
    """
    if model.dtype != "auto" or not is_local(model):
        return model.dtype
    config, saved = config_json(model), saved_dtype(model)
    stated = (
        config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    )
    return "auto" if stated == saved or (stated is None and unstated_is_saved) else saved


def weight_count(model: ModelConfig) -> int:
    """Number of weights in the model's safetensors files."""
    return _weight_sizes(model).total()


def _weight_sizes(model: ModelConfig) -> Counter[str]:
    """Number of weights in safetensors files by precision, from the files' headers."""

    def find(name: str) -> str | None:
        if is_local(model):
            path = Path(location(model), name)
            return str(path) if path.is_file() else None
        from transformers.utils.hub import cached_file

        arguments = {"revision": model.revision or "main", "_raise_exceptions_for_missing_entries": False}
        return cached_file(model.path, name, **arguments)  # type: ignore[no-any-return]

    try:
        index = find("model.safetensors.index.json")
        names = {"model.safetensors"}
        if index is not None:
            names = set(json.loads(Path(index).read_bytes())["weight_map"].values())
        sizes: Counter[str] = Counter()
        for path in filter(None, map(find, sorted(names))):
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name in header.keys() - {"__metadata__"}:
                sizes[header[name]["dtype"]] += math.prod(header[name]["shape"])
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(_unloadable(model, "its weights", error)) from error
    return sizes


def generation_config(model: ModelConfig) -> Any:
    """The model's `transformers.GenerationConfig`, by default what its configuration says."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(location(model), **_arguments(model))
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(model))


def load_causal_lm(model: ModelConfig, device: str | None = None, *, empty: bool = False) -> Any:
    """The language model in evaluation mode on `device` (the first GPU if there is one, else the
    CPU); if `empty`, with weights that are not set: on `meta`, or on the CPU, where they take no
    memory until then."""
    from transformers import AutoModelForCausalLM

    if empty:
        import torch
        from transformers.initialization import no_init_weights

        config, arguments = load_model_config(model), _arguments(model)
        dtype = getattr(torch, saved_dtype(model))
        with no_init_weights(), torch.device(device or "cpu"), _readable_errors(model, "its code"):
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

    require_reward_model(model)
    if getattr(load_model_config(model), "auto_map", None):
        from transformers.models.llama import modeling_llama

        # ArmoRM's code imports this text for a docstring; transformers 5 no longer has it.
        modeling_llama.LLAMA_INPUTS_DOCSTRING = getattr(modeling_llama, "LLAMA_INPUTS_DOCSTRING", "")
    return _load(model, AutoModelForSequenceClassification, device)


def require_reward_model(model: ModelConfig) -> None:
    """Raise ModelError for a model of another kind, whose score would be that of a random head."""
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


def check_weights(model: ModelConfig, *, reward: bool = False) -> None:
    """Raise ModelError as loading the model would, without reading its weights; for libraries that
    load it themselves.

    Quantized models and those that transformers does not know are left to that library.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    config = load_model_config(model)
    known = type(config) in kind._model_mapping or kind.__name__ in (getattr(config, "auto_map", None) or {})
    if known and not getattr(config, "quantization_config", None):
        _load(model, kind, "meta")


# Weights of the files that a model may leave unused: buffers that are computed, written by earlier
# versions of transformers, and the language model's head in a reward model's files.
_UNUSED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|lm_head\.weight)$")


def _load(model: ModelConfig, kind: Any, device: str | None) -> Any:
    require_model(model)
    import torch
    from safetensors import SafetensorError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"device_map": "meta"} if device == "meta" else {}
    with _readable_errors(model, "its weights", KeyError, RuntimeError, SafetensorError):
        loaded, found = kind.from_pretrained(
            location(model),
            dtype=getattr(torch, saved_dtype(model)),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **_arguments(model),
        )
    causal = kind.__name__ == "AutoModelForCausalLM"
    unused = {
        name
        for name in found["unexpected_keys"]
        if not _UNUSED.search(name) or (causal and name == "lm_head.weight")
    }
    shapes = {
        f"{name} {tuple(ours)}, expected {tuple(theirs)}" for name, ours, theirs in found["mismatched_keys"]
    }
    missing = found["missing_keys"] - {name for name, *_ in found["mismatched_keys"]}
    problems = (
        ("missing in the files, so it would be random", missing),
        ("of another shape", shapes),
        ("unused", unused),
    )
    if texts := [f"{what}: {_some(names)}" for what, names in problems if names]:
        raise ModelError(
            f"the weights of {model.path} are not those of a {type(loaded).__name__}: {'; '.join(texts)}. Rename or remove "
            "them in the files, or fix `architectures` in config.json, so that all are used"
        )
    return loaded.to(device).eval()


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


@contextmanager
def _readable_errors(model: ModelConfig, what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise ModelError for errors of files, for those of these kinds, and for any of the model's
    own Python code."""
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
