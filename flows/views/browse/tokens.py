"""A completion's tokens coloured by log-ratio, for rows that store log-probabilities of every
token.

Such a row has `token_ids` and, of the same length, `model_token_logprobs` and `ref_token_logprobs`.
The words come from the tokenizer in the run's policy; without one the ids are shown.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from storage import Manifest, PartKey, Store

_COLUMNS = ("token_ids", "model_token_logprobs", "ref_token_logprobs")
_STRONGEST = 3.0  # nats: the colour of any larger log-ratio
_STEPS = 5


def coloured_tokens(store: Store, policy: Manifest | None, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per token `text`, `log_ratio` (nats) and `shade` from -5 to 5; empty if the row does not
    store them."""
    ids, model_T, ref_T = (row.get(name) or () for name in _COLUMNS)
    if not len(ids) == len(model_T) == len(ref_T):
        return []
    ratios = [None if None in pair else pair[0] - pair[1] for pair in zip(model_T, ref_T, strict=True)]
    texts = _texts(ids, _tokenizer(store, policy))
    return [
        {"text": text, "log_ratio": ratio, "shade": _shade(ratio)}
        for text, ratio in zip(texts, ratios, strict=True)
    ]


def _shade(ratio: float | None) -> int:
    if ratio is None or ratio != ratio:
        return 0
    return round(max(-1.0, min(1.0, ratio / _STRONGEST)) * _STEPS)


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the decoded text; a character of several tokens is shown with the
    last of them."""
    if tokenizer is None:
        return [f"{token} " for token in ids]
    texts, done, start = [], "", 0
    for stop in range(1, len(ids) + 1):
        whole = tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False)
        if whole.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(done) :])
        done = whole
        if stop - start > 64:  # decode from here on, so that long completions take linear time
            done, start = "", stop
    return texts


def _tokenizer(store: Store, policy: Manifest | None) -> Any:
    return _load(store, policy.parts[0].key) if policy and policy.parts else None


@cache
def _load(store: Store, key: PartKey) -> Any:
    from tokenizers import Tokenizer

    record = store.part(key)
    data = store.read_file(record, "tokenizer.json") if record else None
    return None if data is None else Tokenizer.from_str(data.decode())
