"""Requests to an OpenAI-compatible server that is busy, slow, or breaks: tried again politely, never for ever.

Tried again: lost connections, time-outs, and the statuses by which servers say "later" or "my fault". The waits double,
with jitter, so that many requests do not come back together; where the server names a time (Retry-After) nothing at
all is sent before it. Not tried again: what would only fail again. The API key goes into the request's header and
nowhere else: not into messages, not into logs.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx

from qrpo.errors import RewardError

__all__ = ["ChatServer", "Unanswered"]

_LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_MISCONFIGURED = {
    401: "the API key is missing or wrong",
    403: "the API key may not do this",
    404: "no such model or URL",
}
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_ASKED_WAIT = 600.0  # a server that wants more has a daily limit, not a busy moment


class Unanswered(Exception):
    """One request got no answer; `refused` where the server read it and would only refuse it again."""

    def __init__(self, message: str, *, refused: bool):
        super().__init__(message)
        self.refused = refused


class ChatServer:
    """An asynchronous client of one server's `/chat/completions`. Use it in `async with`, in one event loop."""

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
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # the time-out here covers the whole request
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to one request body. Raises Unanswered for it alone, RewardError where none would be."""
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                longest = min(_LONGEST_BACKOFF, self._backoff * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
            await self._wait_until_welcome()
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self._client.post(self._url, json=dict(body))
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    try:
                        answer = response.json()
                    except ValueError:
                        answer = None
                    if isinstance(answer, dict):
                        return answer
                    problem = "the answer is not a JSON object"
                else:
                    problem = self._refusal(response)
        raise Unanswered(
            f"the judge did not answer in {self._attempts} attempts; the last: {self._clean(problem)}",
            refused=False,
        )

    def _refusal(self, response: httpx.Response) -> str:
        """What the server said where another attempt may help; raises otherwise."""
        status = response.status_code
        said = self._clean(" ".join(response.text.split())[:300])
        problem = f"HTTP {status} {said}".strip()
        if status in _MISCONFIGURED:
            raise RewardError(
                f"{self._url}: {_MISCONFIGURED[status]} ({problem}). Mend the reward's settings"
            )
        if status not in _LATER:
            raise Unanswered(f"the judge refused the request: {problem}", refused=True)
        wait = _retry_after(response.headers.get("retry-after"))
        if wait > _LONGEST_ASKED_WAIT:
            raise RewardError(
                f"{self._url} asks to come back in {wait:.0f} s ({problem}). What it answered is kept: run again then"
            )
        self._not_before = max(self._not_before, time.monotonic() + wait)
        return problem

    async def _wait_until_welcome(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait + random.uniform(0, self._backoff / 2))

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from a Retry-After header in seconds or as a date; 0 where there is none."""
    if value is None:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
