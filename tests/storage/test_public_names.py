import storage
from tests.support.storage import run_code


def test_all_equals_the_public_names_and_each_can_be_loaded() -> None:
    assert sorted(storage.__all__) == sorted(set(storage.__all__)) == dir(storage)
    for name in storage.__all__:
        assert getattr(storage, name) is not None


def test_import_storage_loads_no_heavy_package() -> None:
    code = "import sys, storage; storage.fingerprint([1]); print([m for m in ('torch', 'pyarrow', 'polars', 'fsspec', 'numpy', 'prefect', 'qrpo') if m in sys.modules])"
    assert run_code(code).strip() == "[]"


def test_the_store_works_without_torch_and_prefect() -> None:
    code = "import sys, storage; storage.Store('memory://x'); print([m for m in ('torch', 'prefect', 'qrpo', 'transformers') if m in sys.modules])"
    assert run_code(code).strip() == "[]"
