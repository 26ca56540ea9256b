"""Log-probabilities of target tokens from hidden states, computed with one chunk of logits at a
time.

    forward: only log p and logsumexp are kept
        log p[y] = z[y] - logsumexp(z),   z = W h + b
    backward: z is computed again, chunk by chunk
        d log p[y] / dz = onehot(y) - exp(z - logsumexp(z))

All chunks use the same block of memory, and the softmax and its gradient are computed in place. A
new block for each chunk costs a CPU as much time as the arithmetic, because the kernel zeroes its
pages, and fragments the heap.

Architectures scale, shift or cap their logits in many ways, under many names. So the formula is
used only for a model whose own logits it gives on a few tokens (`choose_head`). For any other model
the chunks are logits of the model's own forward, with `torch.utils.checkpoint`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qrpo.errors import ModelError


class _Formula(NamedTuple):
    """Logits of a linear head, scaled, then capped: cap * tanh(scale * (W h + b) / cap)."""

    scale: float
    cap: float | None


_choices: "WeakKeyDictionary[Any, _Formula | type]" = WeakKeyDictionary()


def token_logprobs(
    model: Any, hidden_MD: torch.Tensor, targets_M: torch.Tensor, chunk_elements: int
) -> torch.Tensor:
    """Log-probabilities (M,) of M target tokens by the head of a causal language model, in float32
    (float64 for float64).

    At most `chunk_elements` logits, and at least one position's, exist at a time.
    """
    head, choice = model.get_output_embeddings(), choose_head(model)
    chunk = max(1, chunk_elements // int(model.config.get_text_config().vocab_size))
    if isinstance(choice, _Formula) and type(head) is torch.nn.Linear and not choice.cap:
        logprob_M: torch.Tensor = _LinearHead.apply(
            hidden_MD, head.weight, head.bias, targets_M, choice.scale, chunk
        )
        return logprob_M

    def compute(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = _logits(model, choice, hidden_CD)
        return logits_CV.gather(1, targets_C[:, None]).squeeze(1) - logits_CV.logsumexp(dim=1)

    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return torch.cat(list(map(compute, hidden_MD.split(chunk), targets_M.split(chunk))))


def choose_head(model: Any, known: _Formula | type | None = None) -> _Formula | type:
    """How the logits of this causal language model follow from its hidden states: by the formula of
    its linear head, or, given the type of its backbone's output, by its own forward.

    Decided once a model, by a comparison with its own logits on a few tokens, or given as `known`.
    Raises ModelError if neither gives them.
    """
    if known is not None:
        _choices[model] = known
    if model not in _choices:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                _choices[model] = _compare_heads(model)
        finally:
            model.train(training)
    return _choices[model]


def probe_tokens(model: Any) -> list[int]:
    """Token ids to try a model on."""
    return [token % model.config.get_text_config().vocab_size for token in (11, 7, 5, 13, 3, 17, 2, 19)]


def _compare_heads(model: Any) -> _Formula | type:
    config = model.config.get_text_config()
    ids_1T = torch.tensor([probe_tokens(model)], device=next(model.parameters()).device)
    own_TV = model.forward(input_ids=ids_1T, use_cache=False).logits[0]
    output = model.base_model(input_ids=ids_1T, use_cache=False)
    # Cohere multiplies by its scale, Granite divides; Gemma caps.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    formula = _Formula(scale, getattr(config, "final_logit_softcapping", None))
    rounding = 1e-5 if own_TV.device.type == "cpu" else 2e-3  # a GPU may multiply in TF32
    rounding = 1e-2 if own_TV.dtype in (torch.bfloat16, torch.float16) else rounding
    differences = []
    for choice in (formula, type(output)):
        difference_TV = _logits(model, choice, output.last_hidden_state[0]) - own_TV
        differences.append(difference_TV.abs().max().item())
        if differences[-1] <= rounding * own_TV.abs().max().item():
            return choice
    raise ModelError(
        f"{type(model).__name__}: its logits do not follow from its backbone's last hidden states; by its linear head they "
        f"differ by up to {differences[0]:.3g}, by its own forward by {differences[1]:.3g}. Log-probabilities would be "
        "wrong: use another model"
    )


def _logits(model: Any, choice: _Formula | type, hidden_CD: torch.Tensor) -> torch.Tensor:
    """Logits (C, V), at least float32."""
    if isinstance(choice, _Formula):
        logits_CV = choice.scale * _wide(model.get_output_embeddings()(hidden_CD))
        return choice.cap * torch.tanh(logits_CV / choice.cap) if choice.cap else logits_CV

    def backbone(*_: Any, **__: Any) -> Any:
        return choice(last_hidden_state=hidden_CD[None])

    ids_1C = torch.zeros((1, len(hidden_CD)), dtype=torch.long, device=hidden_CD.device)
    return _wide(inside_forward(model.forward, model.base_model, backbone, ids_1C).logits[0])


def inside_forward(
    model: Callable[..., Any], inner: torch.nn.Module, compute: Callable[..., Any], *arguments: Any
) -> Any:
    """Call `compute` in place of the next forward of `inner`, inside a call of `model`, so that
    DDP, which wraps `inner`, and FSDP, which hooks into it, work."""

    def forward(*given: Any, **named: Any) -> Any:
        restore()
        return compute(*given, **named)

    def restore() -> None:
        if original is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = original

    original = inner.__dict__.get("forward")
    inner.forward = forward
    try:
        return model(*arguments)
    finally:
        restore()


class _LinearHead(torch.autograd.Function):  # type: ignore[misc]
    """The formulas above, for a linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_M: torch.Tensor,
        scale: float,
        chunk: int,
    ) -> torch.Tensor:
        device = hidden_MD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logprob_M, normaliser_M = hidden_MD.new_empty((2, len(hidden_MD)), dtype=wide).unbind()
        ctx.dtype, ctx.scale, ctx.chunk = dtype, scale, chunk
        with torch.autocast(device, enabled=False):
            for rows, logits_CV in _chunks_of_logits(ctx, hidden_MD, weight_VD, bias_V):
                target_C = logits_CV.gather(1, targets_M[rows, None]).squeeze(1)
                most_C = logits_CV.amax(dim=1)
                total_C = logits_CV.sub_(most_C[:, None]).exp_().sum(dim=1)
                normaliser_M[rows] = total_C.log_().add_(most_C)
                logprob_M[rows] = target_C - normaliser_M[rows]
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, targets_M, normaliser_M)
        return logprob_M

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, targets_M, normaliser_M = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        hidden_grad_MD = torch.empty_like(hidden_MD) if for_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD) if for_weight else None
        bias_grad_V = torch.zeros_like(bias_V) if for_bias else None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            narrow_VD = weight_VD.to(ctx.dtype)
            for rows, logits_CV in _chunks_of_logits(ctx, hidden_MD, weight_VD, bias_V):
                # The softmax less the one-hot target: minus the derivative. The incoming gradient
                # is a factor of each row.
                error_CV = logits_CV.sub_(normaliser_M[rows, None]).exp_()
                error_CV.scatter_add_(1, targets_M[rows, None], -torch.ones_like(normaliser_M[rows, None]))
                factor_C1 = -ctx.scale * grad_M[rows, None]
                narrow_CV = error_CV.to(ctx.dtype)
                if hidden_grad_MD is not None:
                    hidden_grad_MD[rows] = (narrow_CV @ narrow_VD) * factor_C1
                if weight_grad_VD is not None:
                    scaled_CD = (hidden_MD[rows] * factor_C1).to(ctx.dtype)
                    if ctx.dtype == weight_grad_VD.dtype:
                        weight_grad_VD.addmm_(narrow_CV.T, scaled_CD)
                    else:
                        weight_grad_VD += narrow_CV.T @ scaled_CD
                if bias_grad_V is not None:
                    bias_grad_V += factor_C1.squeeze(1) @ error_CV
        return hidden_grad_MD, weight_grad_VD, bias_grad_V, None, None, None


def _chunks_of_logits(
    ctx: Any, hidden_MD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Scaled logits (C, V) in float32 or float64; all chunks use one block of memory, so each is
    valid until the next."""
    weight_DV, count = weight_VD.to(ctx.dtype).T, len(hidden_MD)
    block_CV = weight_DV.new_empty((min(ctx.chunk, count), weight_DV.shape[1]))
    wide_CV = _wide(block_CV)
    for start in range(0, count, ctx.chunk):
        rows = slice(start, min(start + ctx.chunk, count))
        size = rows.stop - start
        torch.mm(hidden_MD[rows].to(ctx.dtype), weight_DV, out=block_CV[:size])
        logits_CV = wide_CV[:size]
        if wide_CV is not block_CV:
            logits_CV.copy_(block_CV[:size])
        if bias_V is not None:
            logits_CV += bias_V
        if ctx.scale != 1.0:
            logits_CV *= ctx.scale
        yield rows, logits_CV


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
