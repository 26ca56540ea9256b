"""The identity of a model's folder in stores of earlier versions, and what is said of samples that were cut."""

import shutil
from pathlib import Path

import pytest

from qrpo.models import ModelConfig, model_identity
from storage import Manifest, PartRecord, Store
from storage.fingerprints import canonical_json
from tasks.models import known_identity
from tasks.stages import STAGES


@pytest.mark.parametrize("stage", ["completions", "rewards"])
def test_a_store_of_an_earlier_version_keeps_what_it_has_of_a_model(
    tiny_model: Path, tmp_path: Path, stage: str
) -> None:
    folder, store = tmp_path / "model", Store(tmp_path / "store")
    shutil.copytree(tiny_model, folder)
    model = ModelConfig(path=str(folder))
    earlier, now = model_identity(model, every_file=True), model_identity(model)
    assert earlier != now == known_identity(model, Store(tmp_path / "new"), stage)
    outside = {"model": earlier} if stage == "completions" else {"quality": {"model": earlier}}
    note = {"version": 1, "settings": {}, "outside": outside}
    store.write_bytes(f"families/{stage}/1234.json", canonical_json(note))
    assert known_identity(model, store, stage) == earlier
    (folder / "README.md").write_text("# A model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": true}')
    assert known_identity(model, Store(tmp_path / "store"), stage) == earlier
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert known_identity(model, store, stage) == model_identity(model) not in (earlier, now)


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ([{"cut": 5}, {"cut": 6}], "11 of 20 samples were cut at max_tokens"),
        ([{"cut": 5}, {"cut": 5}], None),
        ([{}, {"cut": 6}], "6 of 10 samples"),  # a part of an earlier version did not count them
        ([{}], None),
    ],
)
def test_a_stage_says_when_most_samples_were_cut(cut: list[dict[str, int]], said: str | None) -> None:
    for stage in ("completions", "evaluation"):
        parts = tuple(PartRecord(stage, "", str(i), (), 10, 0, metadata=one) for i, one in enumerate(cut))
        manifest = Manifest(stage, "", "", {}, {}, {}, parts, rows=10 * len(parts), bytes=0, rejects=0)
        remark = STAGES[stage].remark
        assert remark is not None
        found = remark(manifest)
        assert found is None if said is None else str(found).startswith(said)
