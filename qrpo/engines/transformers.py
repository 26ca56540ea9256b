"""Sampling with plain transformers: slower than vLLM, the same protocol.

Runs in the child process that `qrpo.engines.open_engine` starts. Each sample has its own random
stream (one uniform number per token, mapped to a token by the inverse of the cumulative
distribution). So a completion depends on its seed and prompt and not on the rest of its batch, up
to floating-point ties. Batches hold samples in the order requested, padded on the left; finished
rows leave the batch at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qrpo.data.chat import load_tokenizer
from qrpo.engines import EngineConfig
from qrpo.engines.decoding import completion_text, stop_strings, stop_token_ids
from qrpo.engines.sampling import Sample, SampleRequest, SamplingConfig
from qrpo.models import ModelConfig, load_causal_lm
from qrpo.models.limits import Limits


@dataclass(slots=True)
class _Row:
    """One sample that is being generated."""

    request: SampleRequest
    index: int
    random: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None


class TransformersEngine:
    """A loaded transformers model and its tokenizer."""

    def __init__(self, config: EngineConfig, model: ModelConfig, limits: Limits):
        self._config, self._model = model, load_causal_lm(model, config.device)
        self._tokenizer = load_tokenizer(model, chat_template=False)
        self._batch_size = config.max_num_seqs
        self._stops: frozenset[int] = frozenset()
        self._strings: list[str] = []

    def sample(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[str, list[Sample]]]:
        """Yield (key, samples) of each request as its last sample finishes."""
        self._stops = stop_token_ids(self._tokenizer, self._config, sampling)
        self._strings = stop_strings(self._tokenizer, sampling)
        rows = [
            _Row(request, index, np.random.default_rng(seed))
            for request in requests
            for index, seed in request.samples
        ]
        left = {request.key: len(request.samples) for request in requests}
        finished: dict[str, dict[int, Sample]] = {request.key: {} for request in requests}
        for start in range(0, len(rows), self._batch_size):
            for row in self._run(rows[start : start + self._batch_size], sampling):
                key = row.request.key
                finished[key][row.index] = Sample(
                    index=row.index,
                    text=self._text(row, self._strings),
                    token_ids=row.token_ids,
                    finish_reason=row.finish_reason or "length",
                    sampled_logprob=row.logprob,
                )
                left[key] -= 1
                if not left[key]:
                    samples = finished.pop(key)
                    yield key, [samples[index] for index, _ in row.request.samples]

    def _run(self, rows: list[_Row], sampling: SamplingConfig) -> Iterator[_Row]:
        """Generate a batch; yield each row as it finishes."""
        import torch
        from transformers import DynamicCache

        device = self._model.device
        longest = max(len(row.request.prompt_token_ids) for row in rows)
        input_ids_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            prompt = torch.as_tensor(list(row.request.prompt_token_ids))
            input_ids_BT[index, longest - len(prompt) :] = prompt
            mask_BT[index, longest - len(prompt) :] = 1
        input_ids_BT, mask_BT = input_ids_BT.to(device), mask_BT.to(device)
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        while rows:
            with torch.inference_mode():
                logits_BV = self._model(
                    input_ids=input_ids_BT,
                    attention_mask=mask_BT,
                    position_ids=positions_BT,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1).cpu().numpy()
            for row, logprobs_V in zip(rows, logprobs_BV, strict=True):
                token_id = _draw(logprobs_V, sampling, row.random)
                row.token_ids.append(token_id)
                row.logprob += float(logprobs_V[token_id])
                row.finish_reason = self._finish(row, sampling)
            running = [index for index, row in enumerate(rows) if row.finish_reason is None]
            yield from (row for row in rows if row.finish_reason is not None)
            if len(running) < len(rows):
                rows = [rows[index] for index in running]
                keep = torch.as_tensor(running, dtype=torch.long, device=device)
                if not rows:
                    return
                cache.batch_select_indices(keep)
                mask_BT, positions_BT = mask_BT[keep], positions_BT[keep]
            input_ids_BT = torch.as_tensor([[row.token_ids[-1]] for row in rows], device=device)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones((len(rows), 1))], dim=-1)
            positions_BT = positions_BT[:, -1:] + 1

    def _finish(self, row: _Row, sampling: SamplingConfig) -> Literal["stop", "length"] | None:
        if row.token_ids[-1] in self._stops:
            return "stop"
        if self._strings:
            text = self._text(row, [])
            if any(string in text for string in self._strings):
                return "stop"
        return "length" if len(row.token_ids) == sampling.max_tokens else None

    def _text(self, row: _Row, strings: Sequence[str]) -> str:
        prompt = row.request.prompt_token_ids
        return completion_text(self._tokenizer, prompt, row.token_ids, self._stops, strings)


def _draw(
    logprobs_V: "np.ndarray[Any, np.dtype[np.float64]]", sampling: SamplingConfig, random: np.random.Generator
) -> int:
    """Draw one token. Temperature, min-p, top-k and top-p apply in this order, as in vLLM."""
    if sampling.temperature == 0.0:
        return int(logprobs_V.argmax())
    scaled_V = logprobs_V / sampling.temperature
    probabilities_V = np.exp(scaled_V - scaled_V.max())
    if sampling.min_p:
        probabilities_V[probabilities_V < sampling.min_p] = 0.0  # the likeliest has 1 here
    if 0 < sampling.top_k < len(probabilities_V):
        kth = np.partition(probabilities_V, -sampling.top_k)[-sampling.top_k]
        probabilities_V[probabilities_V < kth] = 0.0
    if sampling.top_p < 1.0:
        order = np.argsort(-probabilities_V, kind="stable")
        mass = np.cumsum(probabilities_V[order])
        before = mass - probabilities_V[order]
        probabilities_V[order[before >= sampling.top_p * mass[-1]]] = 0.0
    cumulative_V = np.cumsum(probabilities_V)
    token_id = np.searchsorted(cumulative_V, random.random() * cumulative_V[-1], side="right")
    return int(min(token_id, np.flatnonzero(probabilities_V)[-1]))
