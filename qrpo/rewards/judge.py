"""Rewards that a language model gives: it is shown the completion with a rubric and asked for a grade.

Any OpenAI-compatible server will do (vLLM's, a provider's). The grade is read from the probabilities of the grades'
tokens, as their mean value: a judge torn between 3 and 4 gives 3.5, and completions that a single sampled grade could
not tell apart get an order (AlpacaEval 2 and constitutional rewards read judges so). Or it is parsed from the text, for
servers that give no probabilities and judges that reason first.

Answers cost money, so each is kept as it comes (`Answers`, see `qrpo.rewards.protocol`): a run that is started again,
with another weight, other values of the grades, or after a kill, asks only what was never answered.
"""

import asyncio
import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, field_validator, model_validator

from qrpo.config import execution_option, outside_input
from qrpo.data.chat import Messages
from qrpo.errors import ConfigError, RewardError
from qrpo.rewards.chat_server import ChatServer, Unanswered
from qrpo.rewards.grades import essence, read_grade
from qrpo.rewards.protocol import Answers, Columns, Reward, RewardSection, Score

__all__ = ["DEFAULT_TEMPLATE", "JudgeReward", "JudgeRewardConfig"]

DEFAULT_TEMPLATE = """\
You grade an assistant's reply by a rubric.

<rubric>
{{ rubric }}
</rubric>

<conversation>
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
</conversation>

<reply>
{{ completion }}
</reply>

Grade the reply from {{ grades[0] }} (worst) to {{ grades[-1] }} (best). Answer with the grade alone."""

_TOP = 20  # most alternatives that servers give for a token
_UNANSWERED_AT_MOST = (
    5  # requests in a row without an answer, each after all its attempts: the server is down
)
_KEEP_EVERY, _KEEP_SECONDS = 256, 5.0  # answers that a kill may cost


class JudgeRewardConfig(RewardSection):
    """A reward that is a language model's grade."""

    kind: Literal["judge"] = "judge"
    """Says that this reward is a language model that grades."""
    base_url: str = outside_input(...)
    """The server, as OpenAI's clients want it: `http://localhost:8000/v1`. Not in fingerprints: see `version`."""
    model: str = Field(min_length=1)
    """The model's name at that server."""
    version: str = ""
    """Change it when the same name means another model: another revision, quantization or server."""
    api_key_env: str | None = execution_option(None)
    """The environment variable that holds the API key. The key itself is never written anywhere."""
    rubric: str = Field(min_length=1)
    """What makes a good completion, in words. The template shows it to the judge."""
    template: str = DEFAULT_TEMPLATE
    """Jinja template of the request; it knows `rubric`, `grades`, `messages`, `prompt` (the last message), `completion`
    and the dataset's other columns."""
    system: str | None = None
    """A system message before it."""
    grades: dict[str, float] = Field(
        default_factory=lambda: {str(grade): float(grade) for grade in range(1, 6)}, min_length=2
    )
    """What the judge may answer, worst first, and what each answer is worth."""
    read: Literal["probabilities", "text"] = "probabilities"
    """The mean over the grades' token probabilities, or the grade that the text names."""
    pattern: str | None = None
    """Where the grade stands in a longer answer: a regular expression whose one group is the grade; its last match
    counts. By default the answer's first token (probabilities), or the last grade that the text names."""
    min_probability: float = Field(0.5, ge=0.0, le=1.0)
    """Least probability of all grades together; with less, the judge answered something else and the row fails."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer; by default 1 token where that is the grade, else 1024."""
    temperature: float | None = Field(0.0, ge=0.0)
    """For sampling the answer."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More of the request's body (`seed`, `reasoning_effort`, `chat_template_kwargs`, ...); null takes a field out."""
    concurrency: int = execution_option(32, ge=1)
    """Requests at the same time."""
    timeout: float = execution_option(120.0, gt=0.0)
    """Longest wait for one answer, in seconds."""
    attempts: int = execution_option(8, ge=1)
    """How often a request is tried where the server is busy or breaks."""
    backoff: float = execution_option(1.0, gt=0.0)
    """The first wait between attempts, in seconds; it doubles up to a minute. Retry-After is obeyed besides."""
    max_calls: int | None = execution_option(None, ge=0)
    """Most answers to pay for. Those kept in the store count, so that a run started again does not begin anew."""
    max_total_tokens: int | None = execution_option(None, ge=0)
    """Most tokens, of requests and answers together, to pay for; the calls under way when it is reached may go past it."""

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
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("expected the name of an environment variable, not a key")
        return value

    @field_validator("grades", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return {str(label): worth for label, worth in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _can_be_read(self) -> "JudgeRewardConfig":
        labels = list(self.grades)
        if any(label != label.strip() or not label for label in labels):
            raise ValueError(f"grades: the labels {labels} may not be empty, nor begin or end with a space")
        if not all(map(math.isfinite, self.grades.values())):
            raise ValueError("grades: each must be worth a finite number")
        if self.read == "probabilities":
            for one in labels:
                if begun := [other for other in labels if other != one and other.startswith(one)]:
                    raise ValueError(
                        f"grades: {begun[0]!r} begins with {one!r}, so a first token cannot tell them apart; use other "
                        "labels (0 to 9, letters), or `read: text`"
                    )
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern: not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern: expected one group, the grade, got {groups}")
        try:
            _ENVIRONMENT.parse(self.template)
        except TemplateError as error:
            raise ValueError(f"template: {error}") from error
        return self

    def identity(self) -> dict[str, Any]:
        """Nothing: all that could change a grade and can be known is a setting."""
        return {}

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The judge; ConfigError where the API key's variable is not set."""
        return JudgeReward(self, answers)

    def body(self, text: str) -> dict[str, Any]:
        """The request that asks for the grade of a rendered template."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": text}],
            "max_tokens": self.max_tokens or (1 if self._first_token else 1024),
            "temperature": self.temperature,
        }
        if self.read == "probabilities":
            body |= {"logprobs": True, "top_logprobs": _TOP}
        body |= self.extra
        return {name: value for name, value in body.items() if value is not None}

    @property
    def _first_token(self) -> bool:
        return self.read == "probabilities" and self.pattern is None


_ENVIRONMENT = SandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


class JudgeReward:
    """A judge, as the `Reward` protocol wants it. Works in this process: all it does is wait."""

    def __init__(self, config: JudgeRewardConfig, answers: Answers | None = None):
        self._config = config
        self._template = _ENVIRONMENT.from_string(config.template)
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else None
        if self._key == "":
            raise ConfigError(
                f"the API key of {config.name}: the environment variable {config.api_key_env} is not set"
            )
        self._store = answers
        # what decides an answer; how it is read afterwards does not, so that may change for nothing
        asked = [config.version, config.read, config.pattern, config.template, config.rubric, config.body("")]
        self._group = _digest(asked)
        self._answers: dict[str, dict[str, Any]] = {}
        self._loaded = False
        self._lock = threading.Lock()
        self._calls = self._tokens = self._in_flight = 0
        self._unanswered = 0  # in a row
        self._scored_any = False

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One grade per completion, in order. RewardError where the budget is used up or the server does not answer."""
        scores: dict[int, Score] = {}
        bodies: dict[str, dict[str, Any]] = {}
        keys: dict[int, str] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            given = {name: values[row] for name, values in columns.items()}
            try:
                body = self._config.body(self._render(prompt, completion, given))
            except TemplateError as error:
                scores[row] = Score(None, f"the judge's template cannot be filled: {error}")
                continue
            keys[row] = _digest(body)
            bodies[keys[row]] = body
        with self._lock:
            self._load()
            missing = {key: body for key, body in bodies.items() if key not in self._answers}
            failed = _run(self._ask(missing)) if missing else {}
            for row, key in keys.items():
                answer = self._answers.get(key)
                scores[row] = Score(None, failed[key]) if answer is None else read_grade(answer, self._config)
        self._scored_any = self._scored_any or any(score.error is None for score in scores.values())
        if not self._scored_any and len(completions) > 1:
            raise RewardError(
                f"{self._config.name} failed on each of {len(completions)} completions: {scores[0].error}. Mend it"
            )
        return [scores[row] for row in range(len(completions))]

    def close(self) -> None:
        """Forget the answers that were loaded. They stay where they are kept."""
        with self._lock:
            self._answers, self._loaded = {}, False

    def _render(self, prompt: Messages, completion: str, columns: Mapping[str, Any]) -> str:
        return self._template.render(
            {
                **columns,
                "rubric": self._config.rubric,
                "grades": list(self._config.grades),
                "messages": [dict(message) for message in prompt],
                "prompt": prompt[-1]["content"],
                "completion": completion,
            }
        )

    def _load(self) -> None:
        if self._loaded:
            return
        kept = self._store.load(self._group) if self._store is not None else {}
        self._answers = {key: json.loads(text) for key, text in kept.items()}
        self._calls = len(self._answers)
        self._tokens = sum(answer["tokens"] for answer in self._answers.values())
        self._loaded = True

    async def _ask(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, str]:
        """Ask for all; answers go to `self._answers` and are kept. What failed and why, by key."""
        config = self._config
        failed: dict[str, str] = {}
        waiting = iter(bodies.items())
        keeper = _Keeper(self._store, self._group)
        server = ChatServer(
            config.base_url,
            self._key,
            connections=config.concurrency,
            attempts=config.attempts,
            backoff=config.backoff,
            timeout=config.timeout,
        )

        async def work() -> None:
            for key, body in self._within_budget(waiting):
                self._in_flight += 1
                try:
                    answer = essence(await server.complete(body), config)
                except Unanswered as error:
                    self._note_unanswered(error)
                    failed[key] = str(error)
                    continue
                finally:
                    self._in_flight -= 1
                self._unanswered = 0
                self._calls += 1
                self._tokens += answer["tokens"]
                self._answers[key] = answer
                await keeper.add(key, answer)

        try:
            async with server, asyncio.TaskGroup() as group:
                for _ in range(min(config.concurrency, len(bodies))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            keeper.flush()
        left = sum(key not in self._answers and key not in failed for key in bodies)
        if left:
            raise RewardError(
                f"{config.name}: the budget is used up ({self._calls} calls, {self._tokens} tokens) with {left} "
                "completions to go. The answers are kept: raise max_calls or max_total_tokens and run again"
            )
        return failed

    def _within_budget(
        self, waiting: Iterator[tuple[str, dict[str, Any]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self._config
        while True:
            if config.max_calls is not None and self._calls + self._in_flight >= config.max_calls:
                return
            if config.max_total_tokens is not None and self._tokens >= config.max_total_tokens:
                return
            if (item := next(waiting, None)) is None:
                return
            yield item

    def _note_unanswered(self, error: Unanswered) -> None:
        self._unanswered = 0 if error.refused else self._unanswered + 1
        if self._unanswered >= _UNANSWERED_AT_MOST:
            raise RewardError(
                f"{self._config.name}: {self._config.base_url} left {self._unanswered} requests in a row without an "
                f"answer; {error}. The answers so far are kept: see to the server and run again"
            )


class _Keeper:
    """Hands answers to where they are kept, some at a time and seldom more than a few seconds late."""

    def __init__(self, store: Answers | None, group: str):
        self._store, self._group = store, group
        self._fresh: dict[str, str] = {}
        self._since = time.monotonic()

    async def add(self, key: str, answer: Mapping[str, Any]) -> None:
        self._fresh[key] = json.dumps(answer, ensure_ascii=False)
        if len(self._fresh) >= _KEEP_EVERY or time.monotonic() - self._since > _KEEP_SECONDS:
            fresh, self._fresh = self._fresh, {}
            self._since = time.monotonic()
            await asyncio.to_thread(self._keep, fresh)

    def flush(self) -> None:
        fresh, self._fresh = self._fresh, {}
        self._keep(fresh)

    def _keep(self, fresh: Mapping[str, str]) -> None:
        if fresh and self._store is not None:
            self._store.keep(self._group, fresh)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _run(asking: Any) -> Any:
    """The result of a coroutine, from a thread that has an event loop of its own already or not."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as thread:  # a notebook's
        return thread.submit(asyncio.run, asking).result()
