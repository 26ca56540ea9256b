import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import storage
from storage import PartKey, Store
from storage.leases import HOLDERS, Leases, Watch
from tests.support.storage import at_once, part_key, scores

HOLD = """
import sys, time, storage
from storage.leases import Leases
store = storage.Store(sys.argv[1])
with Leases(store, ttl=float(sys.argv[2])) as leases:
    assert leases.acquire(storage.PartKey("rewards", "family", "part"))
    print("held", flush=True)
    time.sleep(60)
"""
KEY = PartKey("rewards", "family", "part")


@contextmanager
def holder_process(url: str, ttl: float) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, url, str(ttl)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_part_is_claimed_by_one(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as first, Leases(store) as second:
        assert first.acquire(key)
        assert first.acquire(key)
        assert not second.acquire(key)
        first.release(key)
        assert second.acquire(key)
        assert not first.acquire(key)


def test_leaving_gives_everything_back(store: Store) -> None:
    with Leases(store) as leases:
        assert leases.acquire(part_key("rewards", 0))
        assert leases.acquire(part_key("rewards", 1))
        leases.protect("family")
    assert store.list("leases") == []


def test_many_threads_that_claim_at_once_get_one_winner(store: Store) -> None:
    runs = [Leases(store) for _ in range(8)]
    won = at_once(8, lambda number: runs[number].acquire(part_key("rewards")))
    assert won.count(True) == 1


def test_a_waiter_gets_what_the_other_run_commits(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as first, Leases(store, poll=0.02) as second:
        assert first.acquire(key)
        assert not second.acquire(key)

        def work() -> None:
            time.sleep(0.2)
            store.commit_part(key, scores(10))
            first.release(key)

        worker = threading.Thread(target=work)
        worker.start()
        settled = list(second.wait([key]))
        worker.join()
    assert settled == [(key, store.part(key))]
    assert settled[0][1] is not None


def test_a_waiter_takes_over_what_is_given_back_without_a_commit(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as first, Leases(store, poll=0.02) as second:
        assert first.acquire(key)
        timer = threading.Timer(0.1, first.release, [key])
        timer.start()
        assert list(second.wait([key])) == [(key, None)]
        assert not first.acquire(key)
        timer.join()


def test_a_holder_killed_on_this_machine_is_taken_over_from_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with holder_process(store.url, ttl=3600) as process, Leases(store) as mine:
        assert not mine.acquire(KEY)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert mine.acquire(KEY)


def test_a_silent_holder_elsewhere_is_taken_over_after_its_time_to_live(store: Store) -> None:
    key = part_key("rewards")
    dead = Leases(store, ttl=0.4)
    object.__setattr__(dead._me, "machine", "another machine")
    dead.renew()  # one beat, and no thread: silent from here on
    assert dead.acquire(key)
    with Leases(store, ttl=30, poll=0.05) as mine:
        started = time.monotonic()
        assert not mine.acquire(key)
        assert list(mine.wait([key])) == [(key, None)]
        assert 0.4 <= time.monotonic() - started < 60
    with pytest.raises(storage.LeaseLostError, match=f"{key.fingerprint} was taken over"):
        dead.check(key)


def test_a_holder_that_beats_is_never_taken_over_from_within_patience(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store, ttl=0.3) as busy, Leases(store, ttl=0.3, poll=0.05) as waiter:
        assert busy.acquire(key)
        rounds: list[int] = []
        settled = list(waiter.wait([key], patience=1.2, progress=rounds.append))
    assert settled == [(key, None)]  # patience ended: nobody waits for ever
    assert len(rounds) > 5


def test_clocks_of_machines_are_not_compared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    key = part_key("rewards")
    with Leases(store, ttl=30) as busy:
        assert busy.acquire(key)
        monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is decades ahead
        assert not Leases(store, ttl=30).acquire(key)


def test_share_sorts_parts_into_done_mine_and_others(store: Store) -> None:
    keys = [part_key("rewards", number) for number in range(3)]
    record = store.commit_part(keys[0], scores(10))
    with Leases(store) as first, Leases(store) as second:
        assert first.acquire(keys[1])
        assert second.share(keys) == ({keys[0].fingerprint: record}, [keys[2]], [keys[1]])
        assert second.share(keys) == ({keys[0].fingerprint: record}, [keys[2]], [keys[1]])


def test_a_claim_that_cannot_be_read_is_nobodys(store: Store) -> None:
    key = part_key("rewards")
    store.write_bytes(f"leases/parts/rewards/{key.fingerprint}.json", b"torn")
    with Leases(store) as leases:
        assert leases.acquire(key)
        leases.check(key)


def test_the_heartbeat_says_what_is_being_made(store: Store) -> None:
    with Leases(store) as leases:
        leases.protect("abc")
        (holder,) = Watch(store).holders()
        assert holder.families == ("abc",)
        assert not holder.is_gone
    assert store.list(HOLDERS) == []


@pytest.mark.slow
def test_two_runs_share_the_work_and_both_end_right(tmp_path: Path) -> None:
    code = """
import sys, time, numpy as np, pyarrow as pa, storage
from storage.leases import Leases
store = storage.Store(sys.argv[1])
keys = [storage.PartKey("metrics", "family", f"part-{n}") for n in range(30)]
def compute(key):
    time.sleep(0.05)
    store.commit_part(key, pa.table({"by": [sys.argv[2]]}))
    leases.release(key)
    print(key.fingerprint, flush=True)
with Leases(store, poll=0.05) as leases:
    others = []
    for key in keys:
        done, mine, busy = leases.share([key])
        others += busy
        for key in mine: compute(key)
    for key, record in leases.wait(others):
        if record is None: compute(key)
assert len(store.find_parts(keys)) == 30
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    computed = [run.communicate()[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    together = [part for parts in computed for part in parts]
    assert len(set(together)) == 30
    assert len(together) == 30  # nothing twice
    assert Store(tmp_path).list("leases") == []
