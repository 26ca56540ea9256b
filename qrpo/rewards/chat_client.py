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
from urllib.parse import urlsplit

import httpx
from pydantic import field_validator

from qrpo.config import execution_option, outside_input
from qrpo.errors import RewardError
from qrpo.rewards.protocol import RewardSection

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


class RequestSection(RewardSection):
    """The settings of the server and of requests to it."""

    base_url: str = outside_input(...)
    """URL of the server: `http://localhost:8000/v1`. Not in fingerprints: see `version`."""
    api_key_env: str | None = execution_option(None)
    """The environment variable that holds the API key. The key itself is never written anywhere."""
    concurrency: int = execution_option(32, ge=1)
    """Concurrent requests."""
    timeout: float = execution_option(120.0, gt=0.0)
    """Maximum wait for one answer, in seconds."""
    attempts: int = execution_option(8, ge=1)
    """Attempts per request where the server is busy or fails."""
    backoff: float = execution_option(1.0, gt=0.0)
    """First wait between attempts, in seconds; doubles up to a minute. Retry-After is obeyed."""

    @field_validator("base_url")
    @classmethod
    def _names_a_server(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "the URL may hold no credentials or query: name the key's variable in api_key_env"
            )
        return value

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*|[a-z_]{1,40}", value):
            raise ValueError("expected the name of an environment variable, not a key")
        return value


class ChatClient:
    """A client of one server's `/chat/completions`, for one event loop. Enter `http` first."""

    def __init__(self, settings: RequestSection, api_key: str | None):
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._key, self._settings = api_key, settings
        self._not_before = 0.0  # on time.monotonic
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # `complete` limits the whole request
            limits=httpx.Limits(
                max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
            ),
        )

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request body.

        Raises RequestFailed where this request has no answer, RewardError where no request would
        have one.
        """
        problem = ""
        for attempt in range(self._settings.attempts):
            if attempt:
                longest = min(_MAX_BACKOFF, self._settings.backoff * 2 ** (attempt - 1))
                await asyncio.sleep(random.uniform(longest / 2, longest))
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait + random.uniform(0, self._settings.backoff / 2))
            try:
                async with asyncio.timeout(self._settings.timeout):
                    response = await self.http.post(self._url, json=dict(body))
            except TimeoutError:
                problem = f"no answer within {self._settings.timeout:g} s"
                continue
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            status, answer = _status_and_answer(response)
            if status == 200 and answer.get("choices"):
                return answer
            problem = self._retryable_problem(status, response)
        raise RequestFailed(
            f"the judge did not answer in {self._settings.attempts} attempts; the last: {self._without_key(problem)}",
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
        date = parsedate_to_datetime(value)  # no zone where it is -0000 or missing: HTTP dates are UTC
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    return 0.0


def _status_and_answer(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status, also one that a router reports in the body of a 200, and the answer ({} if it has
    another form)."""
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
