"""Log-probabilities of completions without all the logits: the code behind reference scores and
policy gradients.

    log pi(y|x) = sum_t log softmax(W h_t)[y_t]    over the completion's tokens, with its end token

A plain forward makes logits of shape (B, T, V): with a vocabulary of 128k they, not the model, fill
the memory. Here the backbone runs once, and only the hidden states that predict completion tokens
are kept. The head and its softmax (`qrpo.training.head`) run on them in chunks, and again in the
backward pass, so at most one chunk of logits exists.

Three layouts of the rows of a forward pass:

- `padded`: one conversation a row, padded on the right. No attention mask is given: attention is
  causal, so no position that counts sees the padding, and attention kernels take their fast path.
- `packed`: one row of all conversations, without padding (`qrpo.training.packing`).
- `shared`: as `packed`, and a prompt is computed once for several of its completions.

Log-probabilities and gradients are the same up to rounding. The model must follow positions and a
document's bounds for all but `padded` (`best_layout`). The reference and the policy are scored by
these same functions, so before the first step their log ratio is zero up to rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qrpo.errors import DataError
from qrpo.training.batches import Layout, cut_batches
from qrpo.training.head import probe_tokens, token_logprobs
from qrpo.training.packing import ATTENTION, attention_window, pack

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
    layout: Layout = "padded",
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Log-probabilities (B,) of B completions given their prompts: the sums of
    `completion_token_logprobs`."""
    options: Any = {"layout": layout, "chunk_elements": chunk_elements}
    rows = completion_token_logprobs(model, prompt_token_ids, completion_token_ids, **options)
    return torch.stack([row_T.sum() for row_T in rows])


def completion_token_logprobs(
    model: torch.nn.Module,
    prompt_token_ids: Sequence[TokenIds],
    completion_token_ids: Sequence[TokenIds],
    *,
    layout: Layout = "padded",
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Log-probabilities (T,) of each token of B completions given their prompts, in float32
    (float64 for a float64 model).

    `model` is a causal language model of transformers, on any device; the result carries gradients
    in grad mode. At most `chunk_elements` logits exist at a time; the default suits the device.
    In the layout `shared`, neighbouring completions whose prompts are the same object share its
    forward. The model must allow the layout (`best_layout`). Raises DataError for an empty prompt:
    nothing predicts the first token.
    """
    prompt_lengths, completion_lengths = (
        list(map(len, prompt_token_ids)),
        list(map(len, completion_token_ids)),
    )
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
    rows = _rows_of(prompt_token_ids, layout == "shared")
    lengths = [p + c for p, c in zip(prompt_lengths, completion_lengths, strict=True)]
    tokens, predicting, start = [], [], 0  # `predicting`: flat positions whose hidden state predicts a token
    for number, row in enumerate(rows):
        p = prompt_lengths[row[0]]
        tokens.append(_tensor(prompt_token_ids[row[0]]))
        if layout == "padded":
            start = number * max(lengths)
        end = start + p
        for i in row:
            tokens.append(_tensor(completion_token_ids[i]))
            if length := completion_lengths[i]:
                # The prompt's last token predicts each completion's first.
                predicting += [start + p - 1, *range(end, end + length - 1)]
            end += length
        start = end
    predicting_M = torch.tensor(predicting, dtype=torch.long, device=device)
    targets_M = torch.cat([_tensor(ids) for ids in completion_token_ids]).to(device)

    causal_lm = unwrapped(model)
    # The last token predicts nothing, but removing it would save less than the special case costs.
    if layout == "padded":
        conversations = list(torch.cat(tokens).split(lengths))
        tokens_BT = torch.nn.utils.rnn.pad_sequence(conversations, batch_first=True)
        arguments: dict[str, Any] = {}
    else:
        tokens_BT = torch.cat(tokens)[None]
        arguments = pack(rows, prompt_lengths, completion_lengths).arguments(device, causal_lm.config)
    hidden_BTD = causal_lm.base_model(
        input_ids=tokens_BT.to(device), use_cache=False, **arguments
    ).last_hidden_state
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, predicting_M)
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    scores: tuple[torch.Tensor, ...] = token_logprobs(causal_lm, hidden_MD, targets_M, chunk_elements).split(
        completion_lengths
    )
    return scores


def best_layout(model: Any, share_prompts: bool = True) -> Layout:
    """The layout that computes least and gives this causal language model's log-probabilities.

    A model with torch's `scaled_dot_product_attention` is switched to the attention function for
    packed rows, which is the same function for all other rows. A comparison on a few tokens decides
    whether the model follows it: `padded` for state-space layers, positions that are not given, and
    the like. With FlashAttention the model's own packed rows are used.
    """
    causal_lm = unwrapped(model)
    config, attention = causal_lm.config.get_text_config(), causal_lm.config._attn_implementation
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    flash = attention.startswith("flash_attention")
    if not kinds <= {"full_attention", "sliding_attention"} or not (
        flash or attention in ("sdpa", ATTENTION)
    ):
        return "padded"
    training = model.training
    ids = probe_tokens(causal_lm)
    prompts, completions = [ids[:5]] * 3, [ids[5:], ids[4:7], ids[2:6]]
    weight = next(model.parameters())
    half = weight.is_cuda or weight.dtype in (torch.bfloat16, torch.float16)
    rounding = {"rtol": 0.02, "atol": 0.1} if half else {"rtol": 1e-6, "atol": 1e-4}
    found: Layout = "padded"
    with torch.random.fork_rng(), torch.no_grad(), _autocast_as_trained(model):
        try:
            model.eval()
            expected = completion_logprobs(model, prompts, completions)
            set_layout(causal_lm, "packed")
            # On CUDA a prompt's keys would be copied for each completion: not measured to pay.
            for layout in ("packed", "shared") if share_prompts and not weight.is_cuda else ("packed",):
                if training:  # dropout may be impossible
                    model.train()
                    completion_logprobs(model, prompts, completions, layout=layout)
                    model.eval()
                logprobs = completion_logprobs(model, prompts, completions, layout=layout)
                if not torch.allclose(logprobs, expected, **rounding):
                    break
                found = layout
        except (TypeError, ValueError, RuntimeError):  # no such arguments, or no such case of the kernel
            pass
        finally:
            model.train(training)
    set_layout(causal_lm, found)
    return found


def set_layout(causal_lm: Any, layout: Layout) -> None:
    """Let a model with torch's attention use the attention function that the layout needs."""
    if causal_lm.config._attn_implementation in ("sdpa", ATTENTION):
        causal_lm.set_attn_implementation("sdpa" if layout == "padded" else ATTENTION)


def score_logprobs(
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout = "padded",
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield, for each row in order, the log-probabilities (K,) of its K completions, without
    gradients.

    A row has `prompt_token_ids` and `completion_token_ids`, a list of K token lists. `token_budget`
    bounds the tokens of a forward pass, padding included; it changes results by rounding only. Rows
    are read in windows, so any number of them streams through. `dtype` bfloat16 computes as
    mixed-precision training does. `layout` is the model's `best_layout`; a simpler one is used
    where it does not pay.
    """
    for scores in _score(completion_logprobs, model, rows, token_budget, dtype, layout):
        yield np.array(scores, dtype=np.float32)


def score_token_logprobs(
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout = "padded",
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """As `score_logprobs`, with the log-probabilities (T,) of every token of each of the row's K
    completions."""
    return _score(completion_token_logprobs, model, rows, token_budget, dtype, layout)


def _score(
    compute: Callable[..., Iterable[torch.Tensor]],
    model: torch.nn.Module,
    rows: Iterable[Mapping[str, Any]],
    token_budget: int,
    dtype: torch.dtype | None,
    layout: Layout,
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """What `compute` returns for each completion of each row."""
    for window in _windows(rows, WINDOW_BATCHES * token_budget):
        prompts = [row["prompt_token_ids"] for row in window for _ in row["completion_token_ids"]]
        completions = [completion for row in window for completion in row["completion_token_ids"]]
        widest = attention_window(model)
        batches, used = cut_batches(prompts, completions, token_budget, layout, window=widest)
        scores: dict[int, npt.NDArray[np.float32]] = {}
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), _autocast(model, dtype):
                for batch in batches:
                    pairs = [prompts[i] for i in batch], [completions[i] for i in batch]
                    found = compute(model, *pairs, layout=used)
                    scores.update(zip(batch, (score.float().cpu().numpy() for score in found), strict=True))
        finally:
            model.train(was_training)
        index = iter(range(len(prompts)))
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


def _autocast(model: torch.nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision as the trainer uses it: float32 weights, matrix products in `dtype`; nothing
    for float32."""
    if dtype in (None, torch.float32, torch.float64):
        return nullcontext()
    context: AbstractContextManager[Any] = torch.autocast(next(model.parameters()).device.type, dtype=dtype)
    return context


def _autocast_as_trained(model: Any) -> AbstractContextManager[Any]:
    """bfloat16 on CUDA for float32 weights, as mixed-precision training computes."""
    weight = next(model.parameters())
    return _autocast(model, torch.bfloat16 if weight.is_cuda and weight.dtype == torch.float32 else None)


def _rows_of(prompts: Sequence[TokenIds], share: bool) -> list[list[int]]:
    """Indices of the completions in each row."""
    rows: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        if not (share and i and prompt is prompts[i - 1]):
            rows.append([])
        rows[-1].append(i)
    return rows


def _tensor(ids: TokenIds) -> torch.Tensor:
    return torch.as_tensor(np.asarray(ids, dtype=np.int64))


def unwrapped(model: torch.nn.Module) -> Any:
    """The causal language model inside a PEFT model, else the model itself. LoRA's layers are
    inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
