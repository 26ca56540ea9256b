import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storage
from storage import PartKey, PartRecord, Store, StoreURLError, UnsafeNameError
from storage.names import check_key, redact, secrets_of
from storage.parts import dump_checksummed
from storage.verify import verify

DOTS = ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/"]
CHARACTERS = ["a\\b", "a b", "a\n", "a\0b", "é", "~", "$HOME", "a:b", "-rf", "%2e%2e", "*", ".tmp-1"]
LONG = ["x" * 201, "a/" * 451 + "a"]


@pytest.mark.parametrize("key", DOTS + CHARACTERS + LONG)
def test_an_unsafe_key_is_refused_everywhere(store: Store, key: str) -> None:
    for act in (
        lambda: store.read_bytes(key),
        lambda: store.write_bytes(key, b"x"),
        lambda: store.delete(key),
        lambda: store.exists(key),
        lambda: store.open_input(key),
        lambda: store.url_of(key),
        lambda: store.write_run(key, {}),
        lambda: store.run(key),
        lambda: store.manifest("rewards", key),
        lambda: store.manifest(key, "f"),
        lambda: store.family_parts("rewards", key),
        lambda: PartKey("rewards", "f", key),
    ):
        with pytest.raises(UnsafeNameError):
            act()
    assert store.list() == []


@given(st.text(max_size=30))
def test_any_text_is_either_refused_or_stays_inside_the_folder(key: str) -> None:
    root = Path("/store/root")
    try:
        check_key(key)
    except UnsafeNameError:
        return
    assert re.fullmatch(r"[A-Za-z0-9._+@=/-]+", key)
    assert (root / key).resolve().is_relative_to(root)
    assert (root / key).resolve() != root


def test_a_key_inside_an_edited_record_cannot_leave_the_store(store: Store) -> None:
    key = PartKey("rewards", "family", "part")
    value = {
        "stage": "rewards",
        "family": "family",
        "fingerprint": "part",
        "files": [["x", "../../etc/passwd", 1, "0" * 64]],
        "rows": 1,
        "rejects": 0,
    }
    with pytest.raises((UnsafeNameError, storage.DamagedError)):
        PartRecord.from_file(dump_checksummed(value), key)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:verysecret@bucket/x",
        "https://user:verysecret@host/x",
        "s3://bucket/x?X-Amz-Signature=verysecret",
        *("nonsense://x", "simplecache::s3://bucket/x", "s3://", "memory://"),  # these name no store
    ],
)
def test_a_url_with_credentials_or_without_a_store_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(StoreURLError) as caught:
        Store(url)
    assert "verysecret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_secrets_are_cut_out_of_texts() -> None:
    secrets = secrets_of(
        {"key": "AKIA1234", "client_kwargs": {"aws_session_token": "tokentoken"}, "region": "eu-west-1"}
    )
    assert secrets == {"AKIA1234", "tokentoken"}
    text = "403 for AKIA1234 at https://me:pw@host/b?X-Amz-Signature=abc&x=1 in eu-west-1"
    assert redact(text, secrets) == "403 for *** at https://***@host/b?X-Amz-Signature=***&x=1 in eu-west-1"
    for url in (
        "s3://AKIA1234:se/cr+et@bucket/x",
        "https://host/x?token=secret",
        "https://host/x?a=1&key=secret",
        "https://host/x?X-Goog-Signature=secret&X-Goog-Date=secret",
    ):
        shown = redact(f"cannot read {url}, try again")
        assert "secret" not in shown
        assert "se/cr" not in shown
        assert shown.startswith("cannot read ")
        assert shown.endswith((", try again", "=*** try again"))


def test_texts_without_secrets_stay_as_they_are() -> None:
    urls = ("git@host:x", "ssh://git@host/x", "http://a:80/x", 'http://a:1","b@c')
    for text in ("csv=a.csv&design=b", "a@b", *urls):
        assert redact(text) == text


def test_no_module_of_the_store_uses_pickle() -> None:
    for path in Path(storage.__file__).parent.glob("*.py"):
        assert not re.search(
            r"\b(pickle|marshal|shelve|joblib|eval|exec)\b\s*[.(]|^import pickle", path.read_text(), re.M
        ), path


def test_credentials_that_a_config_holds_do_not_reach_records_manifests_or_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    monkeypatch.setenv("HF_TOKEN", "hf_verysecrettoken")
    config = {
        "prompts": {"path": "s3://me:verysecretpassword@bucket/prompts.jsonl", "other": ["http://a", "me@b"]},
        "hub": "hf_verysecrettoken",
        "signed": "https://host/x?X-Amz-Signature=verysecretsignature&a=1",
    }
    record = store.commit_part(PartKey("metrics", "f", "p"), pa.table({"x": [1]}), metadata=config)
    assert record == store.part(record.key)
    made = store.commit_manifest(storage.manifest_of("metrics", "f", [record], config=config))
    assert made == store.manifest("metrics", made.fingerprint)
    store.write_run("run", {"config": config, "stages": {"metrics": made.fingerprint}})
    stored = b"".join(store.read_bytes(key) for key in store.list() if key.endswith(".json"))
    assert stored.count(b"***") == 4 * 3  # the manifest holds the record's too
    assert b"verysecret" not in stored
    assert b'["http://a","me@b"]' in stored
    assert list(verify(store)) == []
