"""Log-probabilities of completions without all the logits: the code behind reference scores and
policy gradients.

    log pi(y|x) = sum_t log softmax(W h_t)[y_t]        over the completion's tokens, its end token included

A plain forward makes logits of shape (B, T, V): with a vocabulary of 128k they, not the model, fill
the memory. Here the backbone runs once, and only the hidden states that predict completion tokens
are kept. The head and its softmax (`qrpo.training.head`) run on them in chunks, and again in the
backward pass, so at most one chunk of logits exists.

Rows are padded on the right, and no attention mask is given: attention is causal, so no position
that counts sees the padding, and attention kernels take their fast path. The reference and the
policy are scored by these same functions, so before the first step their log ratio is zero up to
rounding.

Shared prompts: a row can hold a prompt once and several of its completions.

    row        prompt | completion 1 | completion 2 | ...
    positions  0..p-1 | p, p+1, ...  | p, p+1, ...  | ...
    attention  causal, to the prompt and to a token's own completion

Log-probabilities and gradients are those of separate rows up to rounding, and K - 1 of K forwards
of the prompt are saved. The model must follow such a mask and such positions (`can_share`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qrpo.errors import DataError
from qrpo.training.batches import length_sorted_batches, shared_batches, worth_sharing
from qrpo.training.head import token_logprobs

__all__ = [
    "can_share",
    "completion_logprobs",
    "completion_token_logprobs",
    "inside_forward",
    "score_logprobs",
    "score_token_logprobs",
]

TokenIds = Sequence[int] | npt.NDArray[Any]

# Logits of one chunk, all tokens and the whole vocabulary: 16 MiB in float32 on a CPU, 256 MiB
# elsewhere.
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
    """Log-probabilities (B,) of B completions given their prompts: the sums of
    `completion_token_logprobs`."""
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
    """Log-probabilities (T,) of each token of B completions given their prompts, in float32
    (float64 for a float64 model).

    `model` is a causal language model of transformers, on any device; the result carries gradients
    in grad mode. At most `chunk_elements` logits exist at a time; the default suits the device.
    With `share_prompts`, neighbouring completions whose prompts are the same object share its
    forward; the model must be one that `can_share`. Raises DataError for an empty prompt: nothing
    predicts the first token.
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
    if device.type == "cuda":  # cuDNN's attention builds a plan for each new shape: half of a step's time
        torch.backends.cuda.enable_cudnn_sdp(False)
    rows = _rows_of(prompt_token_ids, share_prompts)
    width = max(prompt_lengths[row[0]] + sum(completion_lengths[i] for i in row) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    # A token's position in its own conversation, and the number of its completion: 0 for the
    # prompt, -1 for padding.
    positions_BT, segments_BT = torch.zeros_like(tokens_BT), torch.full_like(tokens_BT, -1)
    predicting = []  # flat positions whose hidden state predicts a completion token
    for number, row in enumerate(rows):
        p = end = prompt_lengths[row[0]]
        tokens_BT[number, :p] = _tensor(prompt_token_ids[row[0]])
        positions_BT[number, :p], segments_BT[number, :p] = torch.arange(p), 0
        for segment, i in enumerate(row, start=1):
            start, end = end, end + completion_lengths[i]
            if start < end:
                tokens_BT[number, start:end] = _tensor(completion_token_ids[i])
                positions_BT[number, start:end] = torch.arange(p, p + end - start)
                segments_BT[number, start:end] = segment
                # The prompt's last token predicts each completion's first.
                predicting += [
                    number * width + p - 1,
                    *range(number * width + start, number * width + end - 1),
                ]
    predicting_M = torch.tensor(predicting, dtype=torch.long, device=device)
    targets_M = torch.cat([_tensor(ids) for ids in completion_token_ids]).to(device)

    causal_lm = _unwrapped(model)
    layout = {}
    if len(rows) < len(prompt_lengths):
        segments_BT = segments_BT.to(device)
        visible_BTT = (segments_BT[:, None, :] == segments_BT[:, :, None]) | (segments_BT[:, None, :] == 0)
        layout = {"attention_mask": visible_BTT.tril()[:, None], "position_ids": positions_BT.to(device)}
    # The last token predicts nothing, but removing it would save less than the special case costs.
    hidden_BTD = causal_lm.base_model(
        input_ids=tokens_BT.to(device), use_cache=False, **layout
    ).last_hidden_state
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, predicting_M)
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    scores: tuple[torch.Tensor, ...] = token_logprobs(causal_lm, hidden_MD, targets_M, chunk_elements).split(
        completion_lengths
    )
    return scores


def can_share(model: Any) -> bool:
    """Whether this causal language model computes the same log-probabilities with and without
    shared prompts. Never on CUDA, where the mask costs more than sharing saves.

    It needs torch's `scaled_dot_product_attention` in every layer, without a sliding window. A
    comparison on a few tokens decides.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        next(model.parameters()).device.type == "cuda"
        or config._attn_implementation != "sdpa"
        or kinds != {"full_attention"}
        or getattr(config, "sliding_window", None)
    ):
        return False
    ids = [token % config.vocab_size for token in (11, 7, 5, 13, 3, 17, 2, 19)]
    prompt, completions = ids[:5], [ids[5:], ids[4:7], ids[2:6]]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            separate, shared = (
                completion_logprobs(model, [prompt] * 3, completions, share_prompts=share)
                for share in (False, True)
            )
    except (TypeError, ValueError, RuntimeError):  # a model without positions, or with another kind of mask
        return False
    finally:
        model.train(training)
    rounding = 0.05 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool(torch.allclose(separate, shared, rtol=rounding, atol=rounding))


def score_logprobs(
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    *,
    dtype: torch.dtype | None = None,
    share_prompts: bool = False,
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield, for each row in order, the log-probabilities (K,) of its K completions, without
    gradients.

    A row has `prompt_token_ids` and `completion_token_ids`, a list of K token lists. `token_budget`
    bounds the tokens of a forward pass, padding included; it changes results by rounding only. Rows
    are read in windows, so any number of them streams through. `dtype` bfloat16 computes as
    mixed-precision training does. With `share_prompts`, a row's completions share its prompt's
    forward if that saves enough.
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
    """As `score_logprobs`, with the log-probabilities (T,) of every token of each of the row's K
    completions."""
    return _score(completion_token_logprobs, model, rows, token_budget, dtype, share_prompts)


def _score(
    compute: Callable[..., Iterable[torch.Tensor]],
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    dtype: torch.dtype | None,
    share_prompts: bool,
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """What `compute` returns for each completion of each row."""
    for window in _windows(rows, WINDOW_BATCHES * token_budget):
        prompts = [row["prompt_token_ids"] for row in window for _ in row["completion_token_ids"]]
        completions = [completion for row in window for completion in row["completion_token_ids"]]
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        share = share_prompts and worth_sharing(prompts, completions)
        batches = (
            shared_batches(prompts, completions, token_budget)
            if share
            else length_sorted_batches(lengths, token_budget)
        )
        scores: dict[int, npt.NDArray[np.float32]] = {}
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), _autocast(model, dtype):
                for batch in batches:
                    found = compute(
                        model,
                        [prompts[i] for i in batch],
                        [completions[i] for i in batch],
                        share_prompts=share,
                    )
                    scores.update(zip(batch, (score.float().cpu().numpy() for score in found), strict=True))
        finally:
            model.train(was_training)
        index = iter(range(len(lengths)))
        yield from [[scores[next(index)] for _ in row["completion_token_ids"]] for row in window]


def _windows(rows: Iterable[Mapping[str, Any]], tokens: int) -> Iterator[list[Mapping[str, Any]]]:
    """Consecutive rows with about `tokens` tokens together."""
    window: list[Mapping[str, Any]] = []
    seen = 0
    for row in rows:
        window.append(row)
        seen += sum(len(row["prompt_token_ids"]) + len(ids) for ids in row["completion_token_ids"])
        if seen >= tokens:
            yield window
            window, seen = [], 0
    if window:
        yield window


def inside_forward(
    model: torch.nn.Module, inner: torch.nn.Module, compute: Callable[..., torch.Tensor], *arguments: Any
) -> torch.Tensor:
    """Call `compute` inside the forward of `model`, so that DDP, which wraps `inner`, and FSDP,
    which hooks into it, work."""

    def forward(*forwarded: Any) -> torch.Tensor:
        restore()
        return compute(*forwarded)

    def restore() -> None:
        if original is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = original

    original = inner.__dict__.get("forward")
    inner.forward = forward
    try:
        result: torch.Tensor = model(*arguments)
    finally:
        restore()
    return result


def _autocast(model: torch.nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision as the trainer uses it: float32 weights, matrix products in `dtype`; nothing
    for float32."""
    if dtype in (None, torch.float32, torch.float64):
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(next(model.parameters()).device.type, dtype=dtype)
    return context


def _rows_of(prompts: Sequence[TokenIds], share: bool) -> list[list[int]]:
    """Indices of the completions in each row."""
    rows: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if share and i and prompt is prompts[i - 1]:
            rows[-1].append(i)
        else:
            rows.append([i])
    return rows


def _tensor(ids: TokenIds) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids, dtype=np.int64))


def _unwrapped(model: torch.nn.Module) -> Any:
    """The causal language model inside a PEFT model, else the model itself. LoRA's layers are
    inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
