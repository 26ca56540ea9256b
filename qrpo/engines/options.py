"""Further arguments for `vllm.LLM` from the configuration: their names and types are checked when
it is read, and none may overrule a setting or what results rely on."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

from pydantic import AfterValidator

# Names by what to do instead.
_REFUSED = {
    "set the model's `path`, `revision`, `dtype` and `trust_remote_code`": "model model_weights tokenizer revision dtype "
    "tokenizer_revision code_revision trust_remote_code hf_config_path config_format hf_token",
    "set it in the section itself": "max_model_len max_num_seqs max_num_batched_tokens gpu_memory_utilization "
    "kv_cache_memory_bytes tensor_parallel_size pipeline_parallel_size enforce_eager",
    "every sample has its own seed": "seed data_parallel_size data_parallel_rank data_parallel_size_local "
    "data_parallel_start_rank data_parallel_external_lb data_parallel_hybrid_lb",
    "set the end tokens in the model's files or `sampling.stop_token_ids`": "generation_config override_generation_config",
    "put it into the model's config.json, so that training reads it too": "hf_overrides disable_sliding_window "
    "model_class_overrides convert",
    "results rely on vLLM's value of it": "runner logprobs_mode max_logprobs skip_tokenizer_init tokenizer_mode "
    "enable_prefix_caching enable_chunked_prefill logits_processors load_format pooler_config enable_prompt_embeds "
    "watermark_config diffusion_config reasoning_parser reasoning_config scheduling_policy disable_log_stats",
}
_SIMPLE: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (NoneType,),
    "dict": (dict,),
    "list": (list,),
}


def _check(options: dict[str, Any]) -> dict[str, Any]:
    refused = {name: instead for instead, names in _REFUSED.items() for name in names.split()}
    known = _arguments() if options else {}
    for name, value in options.items():
        if name in refused:
            raise ValueError(f"{name} cannot be set here: {refused[name]}")
        if known and name not in known:
            raise ValueError(f"vLLM has no argument {name}: fix its name or remove it")
        kinds = known.get(name)
        if kinds and not (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    return options


VLLMOptions = Annotated[dict[str, Any], AfterValidator(_check)]
"""Arguments for `vllm.LLM` by name. They are checked where vLLM is installed."""


@cache
def _arguments() -> dict[str, tuple[type, ...]]:
    """The arguments of the installed vLLM with their types, read from its source: importing it
    takes 13 s. No types where they are not simple; empty where vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    source = Path(*(spec.submodule_search_locations or [""])[:1], "engine", "arg_utils.py") if spec else None
    if source is None or not source.is_file():
        return {}
    classes = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef))
    fields = next((node.body for node in classes if node.name == "EngineArgs"), [])
    return {
        field.target.id: _types(field.annotation)
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _types(annotation: ast.expr) -> tuple[type, ...]:
    kinds: list[type] = []
    for part in ast.unparse(annotation).split(" | "):
        if (name := part.partition("[")[0]) not in _SIMPLE:
            return ()
        kinds += _SIMPLE[name]
    return tuple(kinds)
