"""Leases: so that of two runs on one store each part is worked on by one.

A process has one heartbeat, `leases/holders/<id>.json`, written again every third of its time to live by a thread; a
claim, `leases/parts/<stage>/<fingerprint>.json`, names its holder and is created atomically where the backend can.
So the cost is one small write every few seconds, however many parts are claimed.

A holder is dead when its heartbeat has not changed for its time to live *by the watcher's own monotonic clock*: no two
machines' clocks are compared. One that was killed on this very machine is seen to be gone at once. Then one waiter
takes its claims over. A holder that lives but does not come to an end is waited for only so long.

A lease saves work; nothing rests on it. Parts are created and never replaced, so in the worst case (a holder that
slept longer than its time to live) a part is computed twice, and the first commit stands.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from storage.errors import LeaseLostError, StoreError
from storage.parts import PartKey, PartRecord
from storage.store import Store

__all__ = ["Holder", "Leases", "Watch", "claim_holder"]

HOLDERS = "leases/holders"
CLAIMS = "leases/parts"


@dataclass(frozen=True)
class Holder:
    """Who holds leases, and what a heartbeat says: `beat` counts up, `ttl` is in seconds, `families` are being made."""

    id: str
    host: str
    process: int
    started: str
    machine: str
    ttl: float
    beat: int = 0
    families: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of its heartbeat."""
        return f"{HOLDERS}/{self.id}.json"

    @property
    def is_gone(self) -> bool:
        """Whether this holder ran on this machine and its process is no more. False where that cannot be known."""
        if not self.machine or self.machine != _machine():
            return False
        return _started(self.process) != self.started


class Watch:
    """Which holders live, as seen by one watcher. The first look at a holder starts its clock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[Holder | None, float]] = {}

    def is_dead(self, holder_id: str, ttl: float) -> bool:
        """Whether a holder is gone from this machine, or silent since its time to live (`ttl` where it never said)."""
        holder = self.holder(holder_id)
        if holder is not None and holder.is_gone:
            return True
        now = time.monotonic()
        if holder_id not in self._seen or self._seen[holder_id][0] != holder:
            self._seen[holder_id] = holder, now
            return False
        return now - self._seen[holder_id][1] >= (holder.ttl if holder else ttl)

    def holder(self, holder_id: str) -> Holder | None:
        """What a holder's heartbeat says now; None where there is none or it cannot be read."""
        try:
            value = json.loads(self._store.read_bytes(f"{HOLDERS}/{holder_id}.json"))
            return Holder(**{**value, "families": tuple(value["families"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def holders(self) -> list[Holder]:
        """All holders that are not gone from this machine, by a listing; some may have died elsewhere."""
        names = [info.key.rsplit("/", 1)[-1].removesuffix(".json") for info in self._store.listing(HOLDERS)]
        return [holder for name in names if (holder := self.holder(name)) is not None and not holder.is_gone]


class Leases:
    """This process's leases on one store; use it in a `with`.

        with Leases(store) as leases:
            done, mine, others = leases.share(keys)
            for key in mine:
                compute_and_commit(key)
                leases.release(key)
            for key, record in leases.wait(others):
                ...  # record: what another run committed; None: the claim is ours now, compute it

    `ttl` is how long, in seconds, a holder may be silent before others take over; `poll` how often a waiter looks.
    """

    def __init__(self, store: Store, ttl: float = 60.0, poll: float = 1.0) -> None:
        if ttl <= 0 or poll <= 0:
            raise StoreError(
                f"a lease with ttl {ttl} and poll {poll} cannot be kept: expected seconds above 0."
            )
        self.store = store
        self.ttl = ttl
        self.poll = poll
        process = os.getpid()
        self._me = Holder(
            secrets.token_hex(8), socket.gethostname(), process, _started(process), _machine(), ttl
        )
        self._watch = Watch(store)
        self._held: set[PartKey] = set()
        self._families: set[str] = set()
        self._beat = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> "Leases":
        self.renew()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StoreError):  # what stays behind expires
            for key in list(self._held):
                self.release(key)
            self.store.delete(self._me.key)

    def renew(self) -> None:
        """Write the heartbeat now; the thread does so by itself."""
        with self._lock:
            self._beat += 1
            beat = asdict(self._me) | {"beat": self._beat, "families": sorted(self._families)}
            self.store.write_bytes(self._me.key, json.dumps(beat).encode())

    def protect(self, family: str) -> None:
        """Keep `gc` from a family's parts as long as this run lives: they are in no manifest until all are there."""
        if family not in self._families:
            self._families.add(family)
            self.renew()

    def acquire(self, key: PartKey) -> bool:
        """Claim a part; False where another run that may be alive has it. Takes over from one that is dead."""
        claim = _claim(key)
        mine = json.dumps({"holder": self._me.id}).encode()
        if not self.store.files.create(claim, mine):
            owner = self._owner(key)
            if owner != self._me.id:
                if owner is not None and not self._watch.is_dead(owner, self.ttl):
                    return False
                self.store.delete(claim)
                if not self.store.files.create(claim, mine):
                    return False  # another waiter was quicker
        self._held.add(key)
        return True

    def share(self, keys: Iterable[PartKey]) -> tuple[dict[str, PartRecord], list[PartKey], list[PartKey]]:
        """Which of these parts are committed (fingerprint -> record), which are claimed for us now, which by others."""
        wanted = list(dict.fromkeys(keys))
        done = self.store.find_parts(wanted)
        missing = [key for key in wanted if key.fingerprint not in done]
        mine = [key for key in missing if self.acquire(key)]
        late = self.store.find_parts(mine)  # committed and released between the look and the claim
        for key in mine:
            if key.fingerprint in late:
                self.release(key)
        others = [key for key in missing if key not in self._held and key.fingerprint not in late]
        return done | late, [key for key in mine if key.fingerprint not in late], others

    def check(self, key: PartKey) -> None:
        """Raise LeaseLostError where another run has taken this part over, StoreError where the heartbeat fails."""
        owner = self._owner(key)
        if owner != self._me.id:
            self._held.discard(key)
            raise LeaseLostError(
                f"{key} was taken over by {owner or 'nobody'}: this process was silent for more than {self.ttl:g} s. "
                "The result that is committed first stands; nothing is lost."
            )
        if self._failure is not None:
            raise StoreError(f"the heartbeat of this run's leases fails: {self._failure}")

    def release(self, key: PartKey) -> None:
        """Give a claim back, after its part was committed or given up."""
        self._held.discard(key)
        if self._owner(key) == self._me.id:
            self.store.delete(_claim(key))

    def wait(
        self, keys: Iterable[PartKey], patience: float = 3600.0, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[PartKey, PartRecord | None]]:
        """Each part as soon as it is settled: with its record once another run commits it, or None: it is ours now.

        A part is taken over when its claim is given back or its holder is dead, and after `patience` seconds in any
        case: this never waits for ever. `progress` is told how many are waited for, once each round.
        """
        waiting = list(dict.fromkeys(keys))
        give_up = time.monotonic() + patience
        while waiting:
            found = self.store.find_parts(waiting)
            for key in [key for key in waiting if key.fingerprint in found]:
                waiting.remove(key)
                yield key, found[key.fingerprint]
            impatient = time.monotonic() >= give_up
            for key in list(waiting):
                if impatient:
                    self.store.delete(_claim(key))
                if self.acquire(key):
                    waiting.remove(key)
                    record = self.store.part(key)  # committed between the look and the claim
                    if record is not None:
                        self.release(key)
                    yield key, record
            if progress is not None:
                progress(len(waiting))
            if waiting:
                time.sleep(self.poll)

    def _owner(self, key: PartKey) -> str | None:
        return claim_holder(self.store, _claim(key))

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.ttl / 3):
            try:
                self.renew()
                self._failure = None
            except StoreError as error:  # `check` tells it; the next beat may succeed
                self._failure = error


def claim_holder(store: Store, key: str) -> str | None:
    """The id of the holder in a claim's file; None where there is no such file, or it cannot be read."""
    try:
        return str(json.loads(store.read_bytes(key))["holder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _claim(key: PartKey) -> str:
    return f"{CLAIMS}/{key.stage}/{key.fingerprint}.json"


def _machine() -> str:
    """The running kernel and the process namespace; empty where they cannot be known."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + os.readlink("/proc/self/ns/pid")
        )
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process started, in the kernel's ticks since boot; empty where there is no such process, or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
