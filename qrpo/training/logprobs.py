"""Sequence log-probabilities without the logits: the one piece of code behind reference scores and policy gradients.

    log pi(y|x) = sum_t log softmax(W h_t)[y_t]        over the completion's tokens, its end token included

A plain forward makes logits of shape (B, T, V): at a vocabulary of 128k they, not the model, fill the memory. Here the
backbone runs once, only the hidden states that predict completion tokens are kept, and the head with its softmax
(`qrpo.training.head`) is applied to them in chunks, in float32, and again in the backward pass: never more than one chunk of logits exists.

Rows that share no prompt are padded on the right and no attention mask is given: attention is causal, so a padding token after the end can
not be seen by any position that counts, and attention kernels take their fast path. Rows of like length should
share a batch: `length_sorted_batches` cuts them so. The reference and the policy are scored by these same functions,
so that before the first step their log ratio is zero up to rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qrpo.errors import DataError
from qrpo.training.batches import length_sorted_batches
from qrpo.training.head import token_logprobs
from qrpo.training.sharing import shared_batches, worth_sharing

__all__ = [
    "completion_logprobs",
    "completion_token_logprobs",
    "inside_forward",
    "score_logprobs",
    "score_token_logprobs",
]

TokenIds = Sequence[int] | npt.NDArray[Any]

# Logits of one chunk, all tokens and the whole vocabulary: 16 MiB in float32 on a CPU, 256 MiB elsewhere.
CPU_CHUNK, GPU_CHUNK = 2**22, 2**26
# Rows are sorted by length within a window of this many micro-batches, so scoring streams.
WINDOW_BATCHES = 16


def completion_logprobs(
    model: torch.nn.Module,
    prompt_token_ids: Sequence[TokenIds],
    completion_token_ids: Sequence[TokenIds],
    *,
    share_prompts: bool = False,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Log-probabilities (B,) of B completions given their prompts: the sums of `completion_token_logprobs`."""
    rows = completion_token_logprobs(
        model,
        prompt_token_ids,
        completion_token_ids,
        share_prompts=share_prompts,
        chunk_elements=chunk_elements,
    )
    return torch.stack([row_T.sum() for row_T in rows])


def completion_token_logprobs(
    model: torch.nn.Module,
    prompt_token_ids: Sequence[TokenIds],
    completion_token_ids: Sequence[TokenIds],
    *,
    share_prompts: bool = False,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities (T,) of each token of B completions given their prompts, in float32 (float64 for a float64 model).

    `model` is a causal language model of transformers, on any device; the result carries gradients where grad mode is
    on. At most `chunk_elements` logits exist at a time, by default what suits the device. With `share_prompts`, completions
    that follow each other and whose prompts are one object share its forward: for models that `qrpo.training.sharing.can_share`.
    An empty prompt raises DataError, for nothing predicts the first token.
    """
    prompt_lengths = [len(ids) for ids in prompt_token_ids]
    completion_lengths = [len(ids) for ids in completion_token_ids]
    if not prompt_lengths or len(prompt_lengths) != len(completion_lengths):
        raise ValueError(
            f"expected as many prompts as completions, at least one; got {len(prompt_lengths)} and {len(completion_lengths)}"
        )
    if 0 in prompt_lengths:
        raise DataError(
            f"row {prompt_lengths.index(0)} has an empty prompt: at least one token must precede a completion"
        )

    device = next(model.parameters()).device
    rows = _rows_of(prompt_token_ids, share_prompts)
    width = max(prompt_lengths[row[0]] + sum(completion_lengths[place] for place in row) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    # Where a token stands in its own conversation, and in which completion: 0 for the prompt.
    places_BT, turns_BT = torch.zeros_like(tokens_BT), torch.full_like(tokens_BT, -1)
    positions, targets = [], []
    for number, row in enumerate(rows):
        p = end = prompt_lengths[row[0]]
        tokens_BT[number, :p] = _tensor(prompt_token_ids[row[0]])
        places_BT[number, :p], turns_BT[number, :p] = torch.arange(p), 0
        for turn, place in enumerate(row, start=1):
            start, end = end, end + completion_lengths[place]
            if start == end:
                continue
            targets.append(_tensor(completion_token_ids[place]))
            tokens_BT[number, start:end] = targets[-1]
            places_BT[number, start:end], turns_BT[number, start:end] = (
                torch.arange(p, p + end - start),
                turn,
            )
            # The prompt's last token predicts each completion's first.
            positions += [
                torch.tensor([number * width + p - 1]),
                number * width + torch.arange(start, end - 1),
            ]
    positions_M = (
        torch.cat(positions).to(device) if positions else torch.zeros(0, dtype=torch.long, device=device)
    )
    targets_M = torch.cat(targets).to(device) if targets else positions_M

    causal_lm = _unwrapped(model)
    layout = {}
    if len(rows) < len(prompt_lengths):
        turns_BT = turns_BT.to(device)
        seen_BTT = (turns_BT[:, None, :] == turns_BT[:, :, None]) | (turns_BT[:, None, :] == 0)
        layout = {"attention_mask": seen_BTT.tril()[:, None], "position_ids": places_BT.to(device)}
    # The last token predicts nothing, but cutting it would move no work worth the case distinction.
    hidden_BTD = causal_lm.base_model(
        input_ids=tokens_BT.to(device), use_cache=False, **layout
    ).last_hidden_state
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, positions_M)

    if chunk_elements is None:
        chunk_elements = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    logprob_M = token_logprobs(causal_lm, hidden_MD, targets_M, chunk_elements)
    scores: tuple[torch.Tensor, ...] = logprob_M.split(completion_lengths)
    return scores


def score_logprobs(
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    *,
    dtype: torch.dtype | None = None,
    share_prompts: bool = False,
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield, for each row in order, the log-probabilities (K,) of its K completions, without gradients.

    A row has `prompt_token_ids` and `completion_token_ids`, a list of K token lists. `token_budget` bounds the tokens
    of a forward pass, padding included; it changes results by rounding only. Rows are read a window at a time, so
    any number of them streams through. `dtype` bfloat16 computes as mixed-precision training does. With `share_prompts`, a
    row's completions share its prompt's forward where that saves enough (`qrpo.training.sharing`).
    """
    for scores in _score(completion_logprobs, model, rows, token_budget, dtype, share_prompts):
        yield np.array(scores, dtype=np.float32)


def score_token_logprobs(
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    *,
    dtype: torch.dtype | None = None,
    share_prompts: bool = False,
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """As `score_logprobs`, but the log-probabilities (T,) of every token of each of the row's K completions."""
    return _score(completion_token_logprobs, model, rows, token_budget, dtype, share_prompts)


def _score(
    compute: Callable[..., Iterable[torch.Tensor]],
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    dtype: torch.dtype | None,
    share_prompts: bool,
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """What `compute` says of each completion of each row, a window of rows at a time."""
    window: list[Mapping[str, Any]] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += sum(_lengths(row))
        if tokens >= WINDOW_BATCHES * token_budget:
            yield from _score_window(compute, model, window, token_budget, dtype, share_prompts)
            window, tokens = [], 0
    if window:
        yield from _score_window(compute, model, window, token_budget, dtype, share_prompts)


def inside_forward(
    model: torch.nn.Module, inner: torch.nn.Module, compute: Callable[..., torch.Tensor], *arguments: Any
) -> torch.Tensor:
    """Call `compute` inside the forward of `model`: DDP, which wraps `inner`, and FSDP, which hooks into it, work there."""

    def forward(*forwarded: Any) -> torch.Tensor:
        restore()
        return compute(*forwarded)

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    own = inner.__dict__.get("forward")
    inner.forward = forward
    try:
        result: torch.Tensor = model(*arguments)
    finally:
        restore()
    return result


def _score_window(
    compute: Callable[..., Iterable[torch.Tensor]],
    model: torch.nn.Module,
    rows: list[Mapping[str, Any]],
    token_budget: int,
    dtype: torch.dtype | None,
    share_prompts: bool,
) -> Iterator[list[npt.NDArray[np.float32]]]:
    prompts = [row["prompt_token_ids"] for row in rows for _ in row["completion_token_ids"]]
    completions = [completion for row in rows for completion in row["completion_token_ids"]]
    lengths = [length for row in rows for length in _lengths(row)]
    scores: dict[int, npt.NDArray[np.float32]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(model, dtype):
            shared = share_prompts and worth_sharing(prompts, completions)
            for batch in (
                shared_batches(prompts, completions, token_budget)
                if shared
                else length_sorted_batches(lengths, token_budget)
            ):
                found = compute(
                    model, [prompts[i] for i in batch], [completions[i] for i in batch], share_prompts=shared
                )
                scores.update(zip(batch, (score.float().cpu().numpy() for score in found), strict=True))
    finally:
        model.train(was_training)
    places = iter(range(len(lengths)))
    return iter([[scores[next(places)] for _ in row["completion_token_ids"]] for row in rows])


def autocast(model: torch.nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision as the trainer uses it: float32 weights, matrix products in `dtype`; nothing for float32."""
    if dtype in (None, torch.float32, torch.float64):
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(next(model.parameters()).device.type, dtype=dtype)
    return context


def _rows_of(prompts: Sequence[TokenIds], share: bool) -> list[list[int]]:
    """Places of the completions in each row."""
    rows: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        if share and place and prompt is prompts[place - 1]:
            rows[-1].append(place)
        else:
            rows.append([place])
    return rows


def _tensor(ids: TokenIds) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids, dtype=np.int64))


def _unwrapped(model: torch.nn.Module) -> Any:
    """The causal language model inside a PEFT model, else the model itself. LoRA's layers live inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _lengths(row: Mapping[str, Any]) -> list[int]:
    prompt = len(row["prompt_token_ids"])
    return [prompt + len(completion) for completion in row["completion_token_ids"]]
