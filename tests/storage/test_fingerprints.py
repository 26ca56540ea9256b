import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import StoreError, file_digest, fingerprint, folder_digest
from tests.support.storage import run_code

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_fingerprint_is_the_sha256_of_canonical_json() -> None:
    text = '{"a":[1,2.5,null,true,"\\u00e9"],"b":{}}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert fingerprint({"b": {}, "a": (1, 2.5, None, True, "é")}) == expected


@given(JSON)
def test_fingerprint_survives_a_round_trip_through_json(value: object) -> None:
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_fingerprint_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


def test_fingerprint_tells_close_values_apart() -> None:
    close = [0.1, 0.1 + 1e-17 * 2, 0.30000000000000004, 0.3]
    values = [0, 0.0, -0.0, "0", False, None, [], {}, [[]], "", *close]
    assert len({fingerprint(value) for value in values}) == len({json.dumps(value) for value in values})


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {2, 3}]}, r"\$\.a\[1\] is a set"),
        ({"a": {"b": Path("x")}}, r"\$\.a\.b is a \w*Path"),
        ({"a": np.float32(1)}, r"\$\.a is a float32"),
        ({"a": {1: 2}}, r"\$\.a has the key 1 of type int"),
        (b"bytes", r"\$ is a bytes"),
        ({"x": [float("nan")]}, r"\$\.x\[0\] is nan"),
        (float("inf"), r"\$ is inf"),
    ],
)
def test_a_value_that_is_not_json_is_refused_with_its_path(value: object, path: str) -> None:
    with pytest.raises((TypeError, ValueError), match=path):
        fingerprint(value)


def test_file_digest_is_the_same_for_a_path_and_a_url(tmp_path: Path) -> None:
    import fsspec

    data = bytes(range(256)) * 9000
    (tmp_path / "data").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/digests/data", data)
    expected = hashlib.sha256(data).hexdigest()
    assert file_digest(tmp_path / "data") == file_digest("memory://digests/data") == expected
    assert file_digest(f"file://{tmp_path}/data") == expected


def test_file_digest_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere does not exist"):
        file_digest(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is a folder"):
        file_digest(tmp_path)


def test_folder_digest_follows_names_and_contents_only(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "weights").write_bytes(b"12")
    digest = folder_digest(tmp_path / "one")
    assert folder_digest(tmp_path / "two") == digest
    (tmp_path / "two" / "config.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert folder_digest(tmp_path / "link") == digest
    (tmp_path / "two" / "sub" / "weights").rename(tmp_path / "two" / "weights")
    assert folder_digest(tmp_path / "two") != digest
    (tmp_path / "one" / "config.json").write_text("{ }")
    assert folder_digest(tmp_path / "one") != digest


def test_fingerprint_is_the_same_in_another_process() -> None:
    value = {"stage": "rewards", "config": {"beta": 0.1, "names": ["é", "b"]}}
    code = f"import storage; print(storage.fingerprint({value!r}))"
    assert run_code(code).strip() == fingerprint(value)
