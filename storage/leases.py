"""Leases: of several runs on one store, only one computes a part.

A process has one heartbeat, `leases/holders/<id>.json`, which a thread rewrites three times per
time-to-live. A claim, `leases/parts/<stage>/<fingerprint>.json`, names its holder and is created
atomically where the backend can. So leases cost one small write every few seconds, plus one per part.

A holder is dead once its heartbeat has not changed for its time-to-live on the watcher's monotonic
clock; clocks of machines are never compared. A process killed on this machine is dead at once. One
waiter then takes over its claims. A waiter also takes over after a maximum wait.

Leases save work; no guarantee rests on them. Parts are created and never replaced, so at worst (a
holder slept longer than its time-to-live) a part is computed twice and the first commit stays.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

from storage.errors import LeaseLostError, StoreError
from storage.fingerprints import canonical_json
from storage.parts import PartKey, PartRecord
from storage.processes import machine, started
from storage.store import Store

__all__ = ["CLAIMS", "HOLDERS", "Holder", "Leases", "Watch", "claim_holder"]

HOLDERS = "leases/holders"
CLAIMS = "leases/parts"


@dataclass(frozen=True)
class Holder:
    """The content of a heartbeat: a counter, a time-to-live in seconds, protected families."""

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
        """The key of the heartbeat."""
        return f"{HOLDERS}/{self.id}.json"

    @property
    def is_gone(self) -> bool:
        """Whether this holder ran on this machine and its process has ended. False if unknown."""
        if not self.machine or self.machine != machine():
            return False
        return started(self.process) != self.started


class Watch:
    """Which holders are alive, for one watcher. The first look at a holder starts its clock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, tuple[Holder | None, float]] = {}

    def is_dead(self, holder_id: str, ttl: float) -> bool:
        """Whether a holder ended on this machine or was silent for its ttl (`ttl` if unknown)."""
        holder = self.holder(holder_id)
        if holder is not None and holder.is_gone:
            return True
        now = time.monotonic()
        if holder_id not in self._seen or self._seen[holder_id][0] != holder:
            self._seen[holder_id] = holder, now
            return False
        return now - self._seen[holder_id][1] >= (holder.ttl if holder else ttl)

    def holder(self, holder_id: str) -> Holder | None:
        """The current heartbeat of a holder; None where it is missing or cannot be read."""
        try:
            value = json.loads(self._store.read_bytes(f"{HOLDERS}/{holder_id}.json"))
            return Holder(**{**value, "families": tuple(value["families"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def holders(self) -> list[Holder]:
        """All holders that have not ended on this machine; some may be dead elsewhere."""
        names = [info.key.rsplit("/", 1)[-1].removesuffix(".json") for info in self._store.listing(HOLDERS)]
        return [holder for name in names if (holder := self.holder(name)) is not None and not holder.is_gone]


class Leases:
    """The leases of this process on one store, as a context manager.

        with Leases(store) as leases:
            done, mine, others = leases.share(keys)
            for key in mine:
                compute_and_commit(key)
                leases.release(key)
            for key, record in leases.wait(others):
                ...  # record: another run committed it; None: it is claimed for us now, compute it

    `ttl` is the silence, in seconds, after which others take over; `poll` the pause between two looks.
    """

    def __init__(self, store: Store, ttl: float = 60.0, poll: float = 1.0) -> None:
        if ttl <= 0 or poll <= 0:
            raise StoreError(f"a lease with ttl {ttl} and poll {poll}: expected seconds above 0.")
        self.store = store
        self.ttl = ttl
        self.poll = poll
        process = os.getpid()
        self._me = Holder(
            secrets.token_hex(8), socket.gethostname(), process, started(process), machine(), ttl
        )
        self._watch = Watch(store)
        self._held: set[PartKey] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        self.renew()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(StoreError):  # a remaining lease expires
            for key in list(self._held):
                self.release(key)
            self.store.delete(self._me.key)

    def renew(self, families: Iterable[str] = ()) -> None:
        """Write the heartbeat now, with these families added; the thread does so regularly."""
        with self._lock:
            protected = tuple(sorted({*self._me.families, *families}))
            self._me = replace(self._me, beat=self._me.beat + 1, families=protected)
            self.store.write_bytes(self._me.key, canonical_json({**vars(self._me)}))

    def protect(self, *families: str) -> None:
        """Keep `gc` from the parts of these families until the end of the block.

        Hold it until a manifest lists the parts and a run names the manifest.
        """
        if not set(families) <= set(self._me.families):
            self.renew(families)

    def acquire(self, key: PartKey) -> bool:
        """Claim a part, also from a dead holder; False where a holder that may be alive has it."""
        claim = _claim(key)
        content = canonical_json({"holder": self._me.id})
        if not self.store.files.create(claim, content):
            owner = self._owner(key)
            if owner != self._me.id:
                if owner is not None and not self._watch.is_dead(owner, self.ttl):
                    return False
                self.store.delete(claim)
                if not self.store.files.create(claim, content):
                    return False  # another waiter was quicker
        self._held.add(key)
        return True

    def share(self, keys: Iterable[PartKey]) -> tuple[dict[str, PartRecord], list[PartKey], list[PartKey]]:
        """Sort parts into committed (fingerprint -> record), claimed for us, claimed by others."""
        wanted = list(dict.fromkeys(keys))
        done = self.store.find_parts(wanted)
        mine = [key for key in wanted if key.fingerprint not in done and self.acquire(key)]
        done |= self.store.find_parts(mine)  # committed and released before our claim
        for key in mine:
            if key.fingerprint in done:
                self.release(key)
        missing = [key for key in wanted if key.fingerprint not in done]
        mine = [key for key in missing if key in self._held]
        return done, mine, [key for key in missing if key not in self._held]

    def check(self, key: PartKey) -> None:
        """Raise LeaseLostError if another run took this part over, StoreError if heartbeats fail."""
        owner = self._owner(key)
        if owner != self._me.id:
            self._held.discard(key)
            raise LeaseLostError(
                f"{key} was taken over by {owner or 'nobody'}: this process was silent for more than {self.ttl:g} s. "
                "The result that is committed first stays; nothing is lost."
            )
        if self._failure is not None:
            raise StoreError(f"the heartbeat of this run's leases fails: {self._failure}")

    def release(self, key: PartKey) -> None:
        """Release a claim, after its part was committed or given up."""
        self._held.discard(key)
        if self._owner(key) == self._me.id:
            self.store.delete(_claim(key))

    def wait(
        self, keys: Iterable[PartKey], patience: float = 3600.0, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[PartKey, PartRecord | None]]:
        """Yield each part with its record once another run commits it, or None once it is ours.

        A part is claimed when its claim was released, when its holder is dead, and in any case after
        `patience` seconds. `progress` gets the number of parts still waited for, once per round.
        """
        waiting = list(dict.fromkeys(keys))
        deadline = time.monotonic() + patience
        while waiting:
            found = self.store.find_parts(waiting)
            for key in [key for key in waiting if key.fingerprint in found]:
                waiting.remove(key)
                yield key, found[key.fingerprint]
            expired = time.monotonic() >= deadline
            for key in list(waiting):
                if expired:
                    self.store.delete(_claim(key))
                if self.acquire(key):
                    waiting.remove(key)
                    record = self.store.part(key)  # committed before our claim
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
            except StoreError as error:  # `check` raises it; the next beat may succeed
                self._failure = error


def claim_holder(store: Store, key: str) -> str | None:
    """The id of the holder in a claim's file; None where the file is missing or cannot be read."""
    try:
        return str(json.loads(store.read_bytes(key))["holder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _claim(key: PartKey) -> str:
    return f"{CLAIMS}/{key.stage}/{key.fingerprint}.json"
