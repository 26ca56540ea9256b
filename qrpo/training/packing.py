"""Rows without padding: many conversations end to end in one row, each attending to itself alone.

    tokens      prompt 1 | completion 1 | prompt 2 | completion 2 | ...
    positions   0, 1, ...               | 0, 1, ...
    attention   causal within a document

A document is what one call of an attention kernel sees: some queries and the keys that they attend
to. Its last query sees all of its keys, the query before it one key less, and so on. With shared
prompts a prompt is a document, and each of its completions is another one, whose keys are the
prompt's and its own. So a prompt needs one forward for all its completions:

    tokens      prompt | completion 1 | completion 2 | ...
    positions   0..p-1 | p, p+1, ...  | p, p+1, ...  | ...

`packed_attention` is registered with transformers under the name `ATTENTION`. The layout passes
through the model's forward as keyword arguments, under the names that transformers uses for packed
rows. Without them the function is torch's `scaled_dot_product_attention`, as before. On CUDA it
runs `torch.nn.attention.varlen.varlen_attn`, elsewhere one call for all documents of equal size.
"""

import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "qrpo_packed"


@dataclass(frozen=True)
class PackedRow:
    """Conversations in one row of T tokens.

    `lengths` (2, N): the number of queries and of keys of each document. Queries follow each other
    in the row, and keys in `key_index`, or in the row if that is None.
    """

    positions_T: torch.Tensor
    lengths_2N: torch.Tensor
    key_index: torch.Tensor | None
    """(S,) the token of each key; None where each document's keys are its queries' tokens."""

    def arguments(self, device: torch.device, config: Any) -> dict[str, Any]:
        """Keyword arguments of the forward of a model with this configuration."""
        ends_2N = torch.nn.functional.pad(self.lengths_2N.cumsum(dim=1), (1, 0)).to(device, torch.int32)
        most_queries, most_keys = self.lengths_2N.amax(dim=1).tolist()
        further = {}
        if config._attn_implementation == ATTENTION:
            # A mask with four dimensions reaches the attention function unchanged. It is not used
            # there.
            further["attention_mask"] = torch.zeros((1, 1, 1, 1), device=device)
        if self.key_index is not None:
            further["key_index"] = self.key_index.to(device)
        return further | {
            "position_ids": self.positions_T[None].to(device),
            "cu_seq_lens_q": ends_2N[0],
            "cu_seq_lens_k": ends_2N[1],
            "max_length_q": most_queries,
            "max_length_k": most_keys,
        }


def attention_window(model: Any) -> int | None:
    """Longest conversation in tokens that a packed row can hold, since packed attention has no
    sliding window; None without a limit."""
    window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
    return window


def pack(
    rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
) -> PackedRow:
    """The layout of conversations: a row is one prompt and its completions, indices into
    `completion_lengths`; a prompt of one completion is one document with it."""
    positions: list[torch.Tensor] = []
    lengths: list[tuple[int, int]] = []
    keys: list[torch.Tensor] = []
    start = 0
    for row in rows:
        p, shared = prompt_lengths[row[0]], len(row) > 1
        first = torch.arange(
            p if shared else p + completion_lengths[row[0]]
        )  # the prompt, or the conversation
        positions.append(first)
        lengths.append((len(first), len(first)))
        prompt = start + first
        keys.append(prompt)
        start += len(first)
        for length in (completion_lengths[i] for i in row if shared and completion_lengths[i]):
            own = torch.arange(length)
            positions.append(p + own)
            lengths.append((length, p + length))
            keys += [prompt, start + own]
            start += length
    is_shared = any(len(row) > 1 for row in rows)
    return PackedRow(torch.cat(positions), torch.tensor(lengths).T, torch.cat(keys) if is_shared else None)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    key_index: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: query (1, H, T, D), key and value (1, G, T, D) to
    (1, T, H, D).

    Raises NotImplementedError for what the packed kernels cannot do, so that `best_layout` finds it
    out: scores that are capped or biased, learned sinks, and on CUDA dropout and float32.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}")
    query_THD, key_SGD, value_SGD = (states[0].transpose(0, 1) for states in (query, key, value))
    if key_index is not None:
        key_SGD, value_SGD = key_SGD.index_select(0, key_index), value_SGD.index_select(0, key_index)
    if query.is_cuda:
        if dropout:
            raise NotImplementedError("packed attention on CUDA has no dropout")
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        output = _on_cuda(query_THD, key_SGD, value_SGD, lengths, scaling)
    else:
        output = _by_documents(
            query_THD, key_SGD, value_SGD, cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist(), dropout, scaling
        )
    return output[None], None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_documents(
    query_THD: torch.Tensor,
    key_SGD: torch.Tensor,
    value_SGD: torch.Tensor,
    query_ends: list[int],
    key_ends: list[int],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of documents, those of equal size in one call."""
    same_size = defaultdict(list)
    spans = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:], strict=True)
    for start, end, key_start, key_end in spans:
        same_size[end - start, key_end - key_start].append((start, key_start))
    pieces, order = [], []
    for (queries, keys), starts in same_size.items():
        begins_N2 = torch.tensor(starts)
        query_index = (begins_N2[:, :1] + torch.arange(queries)).flatten()
        key_index = (begins_N2[:, 1:] + torch.arange(keys)).flatten()
        query_NHQD = query_THD[query_index].unflatten(0, (len(starts), queries)).transpose(1, 2)
        key_NGKD, value_NGKD = (
            states[key_index].unflatten(0, (len(starts), keys)).transpose(1, 2)
            for states in (key_SGD, value_SGD)
        )
        visible_QK = None
        if queries != keys:
            visible_QK = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        output_NHQD = scaled_dot_product_attention(
            query_NHQD,
            key_NGKD,
            value_NGKD,
            attn_mask=visible_QK,
            dropout_p=dropout,
            is_causal=visible_QK is None,
            scale=scaling,
            enable_gqa=query_NHQD.shape[1] != key_NGKD.shape[1],
        )
        pieces.append(output_NHQD.transpose(1, 2).flatten(0, 1))
        order.append(query_index)
    return torch.cat(pieces)[torch.cat(order).argsort()]


def _on_cuda(
    query_THD: torch.Tensor,
    key_SGD: torch.Tensor,
    value_SGD: torch.Tensor,
    lengths: tuple[Any, ...],
    scaling: float | None,
) -> torch.Tensor:
    """The kernel for packed rows, in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query_THD.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise NotImplementedError(f"packed attention on CUDA needs bfloat16 or float16, not {dtype}")
    options: dict[str, Any] = {"scale": scaling}
    if _WINDOWS:  # torch 2.12 and newer
        options |= {"window_size": (-1, 0), "enable_gqa": query_THD.shape[1] != key_SGD.shape[1]}
    else:
        options["is_causal"] = True
        groups = query_THD.shape[1] // key_SGD.shape[1]
        key_SGD, value_SGD = (states.repeat_interleave(groups, dim=1) for states in (key_SGD, value_SGD))
    states = (query_THD.to(dtype), key_SGD.to(dtype), value_SGD.to(dtype))
    output: torch.Tensor = varlen_attn(*states, *lengths, **options)
    return output.to(query_THD.dtype)


def _takes_windows() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


_WINDOWS = _takes_windows()
AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
