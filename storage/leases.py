"""Leases: of several runs on one store, only one computes a part.

A process has one heartbeat, `leases/holders/<id>.json`, which a thread rewrites three times per
time-to-live. A claim, `leases/parts/<stage>/<fingerprint>.json`, names its holder and is created
atomically where the backend can. So leases cost one small write every few seconds, plus one per
part.

A holder is dead once its heartbeat has not changed for its time-to-live on the watcher's monotonic
clock; clocks of machines are never compared. A process killed on this machine is dead at once. One
waiter then takes over its claims: whoever creates the file `<claim>.<dead holder>` first may
replace that holder, which any backend with an atomic create allows. A waiter also takes over after
a maximum wait.

A holder can lose its claim without knowing it: the machine slept longer than the time-to-live. So
it calls `check_claim` before it writes what a second holder may write too. Parts are created and
never
replaced: at worst one is computed twice, and the first commit stays.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from types import MappingProxyType
from typing import Self

from storage.contents import again
from storage.errors import DamagedError, LeaseLostError, StoreError, UnsafeNameError
from storage.fingerprints import canonical_json
from storage.parts import PartKey, PartRecord
from storage.processes import machine, started
from storage.store import Store

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
        except (FileNotFoundError, ValueError, TypeError, KeyError, UnsafeNameError):
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

    `ttl` is the silence, in seconds, after which others take over; `poll` the pause between two
    looks.
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
        self._waiting: dict[str, tuple[str, float]] = {}  # claim -> its holder, and since when
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)

    @property
    def holder(self) -> str:
        """The id of this holder, for `check_claim` in the processes that compute its parts."""
        return self._me.id

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

    def acquire(self, key: PartKey, patience: float = inf) -> bool:
        """Claim a part, also from a holder that is dead or was waited for longer than `patience`
        seconds; False where another holder has it."""
        if not self._take(_claim(key), patience):
            return False
        self._held.add(key)
        return True

    def share(
        self, keys: Iterable[PartKey], known: Mapping[str, PartRecord] = MappingProxyType({})
    ) -> tuple[dict[str, PartRecord], list[PartKey], list[PartKey]]:
        """Sort parts into committed (fingerprint -> record), claimed for us, claimed by others.

        A part that is still as in `known` (by fingerprint) does not count as committed: it is to be
        replaced.
        """
        wanted = list(dict.fromkeys(keys))
        done = self._committed(wanted, known)
        mine = [key for key in wanted if key.fingerprint not in done and self.acquire(key)]
        done |= self._committed(mine, known)  # committed and released before our claim
        missing = []
        for key in wanted:
            if key.fingerprint not in done:
                missing.append(key)
            elif key in mine:
                self.release(key)
        return done, [key for key in missing if key in mine], [key for key in missing if key not in mine]

    def release(self, key: PartKey) -> None:
        """Release a claim, after its part was committed or given up."""
        self._give_back(_claim(key))
        self._held.discard(key)

    @contextmanager
    def locked(self, kind: str, name: str) -> Iterator[None]:
        """Hold the store's lock of this name; wait while another holder has it."""
        claim = f"{CLAIMS}/{kind}/{name}.json"
        while not self._take(claim):
            time.sleep(min(self.poll, 0.1))
        try:
            yield
        finally:
            self._give_back(claim)

    def wait(
        self,
        keys: Iterable[PartKey],
        patience: float = 3600.0,
        known: Mapping[str, PartRecord] = MappingProxyType({}),
    ) -> Iterator[tuple[PartKey, PartRecord | None]]:
        """Yield each part with its record once another run commits it, or None once it is ours.

        A part is claimed when its claim was released, when its holder is dead, and in any case
        after `patience` seconds of one holder. `known` is as in `share`.
        """
        waiting = list(dict.fromkeys(keys))
        while waiting:
            found = self._committed(waiting, known)
            for key in [key for key in waiting if key.fingerprint in found]:
                waiting.remove(key)
                yield key, found[key.fingerprint]
            for key in list(waiting):
                if self.acquire(key, patience):
                    waiting.remove(key)
                    record = self._committed([key], known).get(key.fingerprint)  # before our claim
                    if record is not None:
                        self.release(key)
                    yield key, record
            if waiting:
                time.sleep(self.poll)

    def _committed(self, keys: Iterable[PartKey], known: Mapping[str, PartRecord]) -> dict[str, PartRecord]:
        found = self.store.find_parts(keys)
        return {name: record for name, record in found.items() if known.get(name) != record}

    def _take(self, claim: str, patience: float = inf) -> bool:
        """Make the file `claim` name this holder: create it, or replace a holder that may be
        replaced."""
        content = canonical_json({"holder": self._me.id})
        if self.store.files.create(claim, content):
            return True
        owner = claim_holder(self.store, claim)
        if owner is None:  # released just now
            return False
        if owner == self._me.id:
            return True
        if owner and not self._watch.is_dead(owner, self.ttl) and self._waited(claim, owner) < patience:
            return False
        right = f"{claim}.{owner or 'unreadable'}"
        if not self._take(right):
            return False
        try:
            if claim_holder(self.store, claim) != owner:
                return False  # another waiter was quicker
            self.store.write_bytes(claim, content)
            return True
        finally:
            self.store.delete(right)

    def _give_back(self, claim: str) -> None:
        if claim_holder(self.store, claim, self._me.id) == self._me.id:
            self.store.delete(claim)

    def _waited(self, claim: str, owner: str) -> float:
        """Seconds since this holder of the claim was seen first."""
        now = time.monotonic()
        if self._waiting.get(claim, ("", now))[0] != owner:
            self._waiting[claim] = owner, now
        return now - self._waiting[claim][1]

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.ttl / 3):
            with suppress(StoreError):  # the next beat may succeed; `check_claim` says where none did in time
                self.renew()


def claim_holder(store: Store, key: str, expected: str | None = None) -> str | None:
    """The id of the holder in a claim's file; None where there is no file, "" where it cannot be
    read.

    It is read again where it cannot be read, or is not the `expected` one.
    """
    owner: str | None = None

    def read() -> None:
        nonlocal owner
        try:
            owner = str(json.loads(store.read_bytes(key))["holder"])
        except FileNotFoundError:
            owner = None
        except (ValueError, KeyError, TypeError):
            owner = ""
        if owner == "" or expected not in (None, owner):
            raise DamagedError(f"{key} is held by {owner!r}")

    with suppress(DamagedError):
        again(store.files, read)
    return owner


def check_claim(store: Store, key: PartKey, holder: str) -> None:
    """Raise LeaseLostError where `holder` does not claim the part any more. Any process may call
    it."""
    owner = claim_holder(store, _claim(key), holder)
    if owner == holder:
        return
    other = Watch(store).holder(owner) if owner else None
    who = f"process {other.process} on {other.host}" if other else "another run, which has ended"
    raise LeaseLostError(
        f"{key} was taken over by {who}: this run was silent for longer than run.lease_ttl (its machine slept, or it "
        "was stopped), or the other waited longer than its run.lease_patience. This run stops, so that no two write the "
        "same files. Nothing committed is lost: start the same command again to go on from there."
    )


def _claim(key: PartKey) -> str:
    return f"{CLAIMS}/{key.stage}/{key.fingerprint}.json"
