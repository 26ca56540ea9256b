import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import storage
from storage import PartKey, Store
from storage.gc import collect, plan_gc
from storage.leases import CLAIMS, Leases, Watch, check_claim
from tests.support.storage import at_once, part_key, scores

HOLD = """
import sys, time, storage
from storage.leases import Leases
with Leases(storage.Store(sys.argv[1]), ttl=3600) as leases:
    assert leases.acquire(storage.PartKey("rewards", "family", "part"))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_part_is_claimed_by_one_until_it_is_given_back(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as first, Leases(store) as second:
        assert first.acquire(key)
        assert first.acquire(key)
        assert not second.acquire(key)
        first.release(key)
        assert second.acquire(key)
        assert not first.acquire(key)
        assert second.acquire(part_key("rewards", 1))
        second.protect("abc")
        holders = Watch(store).holders()
        assert sorted(holder.families for holder in holders) == [(), ("abc",)]
        assert not any(holder.is_gone for holder in holders)
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
    store, key = Store(tmp_path), PartKey("rewards", "family", "part")
    command = [sys.executable, "-c", HOLD, store.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, Leases(store) as mine:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert not mine.acquire(key)
        process.kill()
        process.wait()
        assert mine.acquire(key)


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
        check_claim(store, key, dead.holder)


def test_a_holder_that_beats_is_never_taken_over_from_within_patience(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = part_key("rewards")
    with Leases(store, ttl=0.3) as busy, Leases(store, ttl=0.3, poll=0.05) as waiter:
        assert busy.acquire(key)
        monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is decades ahead
        started = time.monotonic()
        settled = list(waiter.wait([key], patience=1.2))
    assert settled == [(key, None)]  # patience ended
    assert time.monotonic() - started >= 1.2


def silent(store: Store) -> Leases:
    """A holder on another machine that beat once, long ago as every watcher's clock has it."""
    dead = Leases(store, ttl=1e-9)
    object.__setattr__(dead._me, "machine", "another machine")
    dead.renew()
    return dead


def test_of_many_that_take_over_at_once_one_wins(store: Store) -> None:
    takers = [Leases(store) for _ in range(4)]
    for number in range(300 if store.url.startswith("memory") else 20):
        key = part_key("rewards", number)
        dead = silent(store)
        assert dead.acquire(key)
        for taker in takers:
            taker._watch.is_dead(dead.holder, 1.0)  # the first look starts its clock
        won = at_once(4, lambda one: takers[one].acquire(key))  # noqa: B023
        assert won.count(True) <= 1
        (winner,) = [taker for taker in takers if taker.acquire(key)]  # it has it, or takes it now
        assert won.count(True) == 0 or winner is takers[won.index(True)]
        check_claim(store, key, winner.holder)
    assert not [name for name in store.list(CLAIMS) if not name.endswith(".json")]


def test_a_taker_that_died_while_it_took_over_is_taken_over_from(store: Store) -> None:
    key = part_key("rewards")
    dead, taker, heir = silent(store), silent(store), Leases(store)
    assert dead.acquire(key)
    claim = f"{CLAIMS}/rewards/{key.fingerprint}.json"
    assert taker._take(f"{claim}.{dead.holder}")  # and was killed before it replaced the claim
    assert any(heir.acquire(key) for _ in range(4))  # the first looks at each holder start its clock
    assert store.list(CLAIMS) == [claim]


def test_patience_ends_for_one_of_two_waiters(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as busy:
        assert busy.acquire(key)
        waiters = [Leases(store, poll=0.01) for _ in range(2)]
        for waiter in waiters:
            waiter.renew()
            assert not waiter.acquire(key)
        won = at_once(2, lambda one: waiters[one].acquire(key, patience=1e-9))
        assert won.count(True) <= 1
        assert any(waiter.acquire(key, patience=0.2) for waiter in waiters)
        with pytest.raises(storage.LeaseLostError, match=r"longer than its run\.lease_patience"):
            check_claim(store, key, busy.holder)


def test_a_part_to_replace_is_claimed_and_waited_for_like_a_missing_one(store: Store) -> None:
    key = part_key("rewards")
    old = store.commit_part(key, scores(10))
    known = {key.fingerprint: old}
    with Leases(store) as first, Leases(store, poll=0.02) as second:
        assert first.share([key], known) == ({}, [key], [])
        assert second.share([key], known) == ({}, [], [key])
        new = store.commit_part(key, scores(12), replace=True)
        assert list(second.wait([key], known=known)) == [(key, new)]


def test_gc_spares_a_claim_that_was_taken_over_after_its_plan(store: Store) -> None:
    key = part_key("rewards")
    dead = silent(store)
    assert dead.acquire(key)
    store.delete(dead._me.key)
    plan = plan_gc(store, grace=0)
    assert plan.others == (f"{CLAIMS}/rewards/{key.fingerprint}.json",)
    with Leases(store, ttl=1e-9) as mine:
        assert list(mine.wait([key])) == [(key, None)]
        collect(store, plan)
        check_claim(store, key, mine.holder)


def test_who_lost_a_claim_is_told_who_has_it(store: Store) -> None:
    key = part_key("rewards")
    with Leases(store) as slept, Leases(store) as other:
        assert slept.acquire(key)
        store.delete(f"{CLAIMS}/rewards/{key.fingerprint}.json")
        with pytest.raises(storage.LeaseLostError, match=r"taken over by another run, which has ended"):
            check_claim(store, key, slept.holder)
        assert other.acquire(key)
        with pytest.raises(storage.LeaseLostError, match=rf"process {os.getpid()} on .* run\.lease_ttl"):
            check_claim(store, key, slept.holder)


def test_a_lock_is_held_by_one_at_a_time(store: Store) -> None:
    holders = [Leases(store, poll=0.001) for _ in range(4)]
    store.write_bytes("count", b"0")

    def count(number: int) -> None:
        holders[number].renew()
        for _ in range(5):
            with holders[number].locked("runs", "demo"):
                store.write_bytes("count", str(int(store.read_bytes("count")) + 1).encode())

    at_once(4, count)
    assert store.read_bytes("count") == b"20"
    assert store.list(CLAIMS) == []


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
        check_claim(store, key, leases.holder)


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
