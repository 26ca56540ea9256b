"""An asynchronous client of an OpenAI-compatible server that retries with limits.

Retried are lost connections, time-outs, answers without choices, and the statuses that mean "later"
or "server error", also where a router sends them in the body of a 200. Waits double and have
jitter. Where the server sends Retry-After, no request at all goes out before that time. Other
statuses are not retried. The API key is sent in the request's header and removed from
every error message.

The `openai` package is not used: its waits between attempts are private constants (0.5 to 8 s,
where `backoff` is a setting here), and its Retry-After delays one request, not all of them.
"""

import asyncio
import contextlib
import math
import random
import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from qrpo.errors import RewardError

__all__ = ["ChatClient", "RequestFailed"]

_MISCONFIGURED = {
    401: "the API key is missing or wrong",
    403: "the API key may not do this",
    404: "no such model or URL",
}
_MAX_BACKOFF = 60.0  # seconds
_MAX_RETRY_AFTER = 600.0  # a server that asks for more has reached a daily limit


class RequestFailed(Exception):
    """One request has no answer. `refused`: the server read it and would refuse it again."""

    def __init__(self, message: str, *, refused: bool):
        super().__init__(message)
        self.refused = refused


class ChatClient:
    """A client of one server's `/chat/completions`, for one event loop. Enter `http` first."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        connections: int,
        attempts: int,
        backoff: float,
        timeout: float,
    ):
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._key = api_key
        self._attempts, self._backoff, self._timeout = attempts, backoff, timeout
        self._not_before = 0.0  # on time.monotonic
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # `complete` limits the whole request
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request body.

        Raises RequestFailed where this request has no answer, RewardError where no request would
        have one.
        """
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                longest = min(_MAX_BACKOFF, self._backoff * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait + random.uniform(0, self._backoff / 2))
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self.http.post(self._url, json=dict(body))
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
                continue
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            status, answer = _status_and_answer(response)
            if status == 200 and answer.get("choices"):
                return answer
            problem = self._retryable_problem(status, response)
        raise RequestFailed(
            f"the judge did not answer in {self._attempts} attempts; the last: {self._without_key(problem)}",
            refused=False,
        )

    def _retryable_problem(self, status: int, response: httpx.Response) -> str:
        """Describe a failure that another attempt may overcome; raise for any other."""
        said = " ".join(self._without_key(response.text).split())[:300]
        problem = f"HTTP {status} {said}".strip()
        if status in _MISCONFIGURED:
            raise RewardError(f"{self._url}: {_MISCONFIGURED[status]} ({problem}). Fix the reward's settings")
        if status not in (200, 408, 409, 425, 429, 500, 502, 503, 504, 529):
            raise RequestFailed(f"the judge refused the request: {problem}", refused=True)
        wait = _retry_after(response.headers.get("retry-after", ""))
        if wait > _MAX_RETRY_AFTER:
            raise RewardError(
                f"{self._url} asks to come back in {wait:.0f} s ({problem}). What it answered is kept: run again then"
            )
        self._not_before = max(self._not_before, time.monotonic() + wait)
        return problem

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after(value: str) -> float:
    """Seconds to wait, from a Retry-After header in seconds or as a date; 0 where there is none."""
    with contextlib.suppress(ValueError):
        return seconds if math.isfinite(seconds := float(value)) else 0.0
    with contextlib.suppress(ValueError, TypeError):
        date = parsedate_to_datetime(
            value
        )  # without a zone where that is -0000 or missing: HTTP dates are UTC
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    return 0.0


def _status_and_answer(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status, also one that a router reports in the body of a 200, and the answer ({} if it has another form)."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code != 200 or not isinstance(answer, dict):
        return response.status_code, {}
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if not (error := answer.get("error") or first.get("error")):
        return 200, answer
    codes = [error.get(name) for name in ("code", "status", "status_code")] if isinstance(error, dict) else []
    return next((int(str(code)) for code in codes if re.fullmatch(r"[45]\d\d", str(code))), 502), {}
