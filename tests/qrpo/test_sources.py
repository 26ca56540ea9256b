"""Rows from real files of every kind; what cannot be read is told in its place and the rest is read on."""

import gzip
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qrpo.data.sources import is_dataset, read_rows, source_files
from qrpo.errors import DataError
from tests.support.refusals import refuses

ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(5)]


def rows_of(source):
    return [row for _, row in read_rows(str(source))]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(jsonl(ROWS))
    assert list(read_rows(str(path)))[1] == (f"{path}:2", ROWS[1])
    assert rows_of(path) == ROWS


def test_an_unreadable_line_is_told_and_reading_goes_on(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": str(n)}).encode() for n in range(20)]
    lines[16] = b'{"prompt": "cut o'
    lines[17] = b'["a list"]'
    lines[18] = b'{"prompt": "\xff\xfe"}'
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(str(path)))
    assert len(rows) == 20
    where, error = rows[16]
    assert where == f"{path}:17"
    assert isinstance(error, DataError)
    assert str(error).startswith(f"{path}:17: not valid JSON")
    assert "got a JSON list, expected an object" in str(rows[17][1])
    assert isinstance(rows[18][1], DataError)
    assert rows[19][1] == {"prompt": "19"}


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    assert rows_of(path) == ROWS
    assert [where for where, _ in read_rows(str(path))][-1].endswith(":9")


def test_json_may_be_a_list_or_hold_one_or_be_lines(tmp_path):
    for number, text in enumerate([json.dumps(ROWS), json.dumps({"version": 1, "data": ROWS}), jsonl(ROWS)]):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        assert rows_of(path) == ROWS
    broken = tmp_path / "broken.json"
    broken.write_text("[1, 2")
    refuses(DataError, r"broken\.json is not valid JSON", rows_of, broken)
    broken.write_text('"text"')
    refuses(DataError, "got a JSON str, expected a list", rows_of, broken)


def test_csv_is_read_with_its_header(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('\n\nquestion,answer\n"two\nlines",4\none,2,3\nlast,6\n', encoding="utf-8-sig")
    rows = list(read_rows(str(path)))
    assert rows[0] == (f"{path}:4", {"question": "two\nlines", "answer": "4"})
    assert str(rows[1][1]) == f"{path}:6: got 3 fields, expected the header's 2"
    assert rows[2] == (f"{path}:7", {"question": "last", "answer": "6"})


def test_undecodable_csv_spoils_its_own_row_only(tmp_path):
    from qrpo.data.prompts import PromptsConfig, parse_row

    path = tmp_path / "data.csv"
    path.write_bytes(b"prompt\n\xff\xfe\ngood\n")
    rows = rows_of(path)
    refuses(DataError, "not valid Unicode", parse_row, rows[0], PromptsConfig(source="x"))
    assert rows[1] == {"prompt": "good"}


def test_parquet_keeps_nested_messages(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"prompt": [messages] * 3000, "n": range(3000)}), path)
    rows = list(read_rows(str(path)))
    assert len(rows) == 3000
    assert rows[2999] == (f"{path}[2999]", {"prompt": messages, "n": 2999})
    path.write_bytes(b"not parquet")
    refuses(DataError, "not a readable Parquet file", rows_of, path)


def test_compressed_files_globs_and_urls_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[:2]).encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS[2:]).encode()))
    assert rows_of(tmp_path / "*.jsonl.gz") == ROWS
    with fsspec.open("memory://sources/data.jsonl", "w") as file:
        file.write(jsonl(ROWS))
    assert rows_of("memory://sources/data.jsonl") == ROWS
    assert source_files("memory://sources/*.jsonl") == ["memory:///sources/data.jsonl"]
    assert rows_of(f"file://{tmp_path}/a.jsonl.gz") == ROWS[:2]


def test_missing_and_unknown_files_say_so(tmp_path):
    refuses(DataError, r"no file nowhere\.jsonl \(from .*\): fix the path", rows_of, "nowhere.jsonl")
    refuses(DataError, "no file memory://sources/nothing", rows_of, "memory://sources/nothing.jsonl")
    refuses(DataError, "cannot list nosuch://x", rows_of, "nosuch://x.jsonl")
    (tmp_path / "data.docx").write_text("x")
    refuses(DataError, r"data\.docx has no known format, expected \.csv", rows_of, tmp_path / "data.docx")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS * 50).encode())[:-20])
    refuses(DataError, r"cannot read .*cut\.jsonl\.gz", rows_of, tmp_path / "cut.jsonl.gz")


def test_hugging_face_datasets_are_read_from_disk_and_by_name(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(jsonl(ROWS))
    assert is_dataset(f"hf://{tmp_path}/one")
    assert not is_dataset("hf://datasets/org/name/file.parquet")
    assert rows_of(f"hf://{tmp_path}/one") == ROWS
    assert rows_of(f"hf://{tmp_path}/two:test") == ROWS[:1]
    assert rows_of(f"hf://{tmp_path}/files:train") == ROWS
    refuses(DataError, r"cannot load hf://.*two:nothing", rows_of, f"hf://{tmp_path}/two:nothing")
    refuses(DataError, "cannot load hf://org/nothing", rows_of, "hf://org/nothing/configuration@main:train")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"prompt,x,prompt\na,b,c\n", r"a\.csv:1: the column 'prompt' is there more than once"),
        ("h.csv", b"prompt,,\na,b,c\n", r"h\.csv:1: the column '' is there more than once"),
        ("b.csv", b'prompt,x\na,1\n"open,2\nb,3\n', r"b\.csv:3: a quote that opens here is not closed"),
        ("c.csv", b'prompt,x\n"open,1\nb,2\n"c",3\n', r"c\.csv:2: a quote that opens here is not closed"),
        ("d.csv", "prompt\nhé\n".encode("utf-16"), "UTF-16"),
        ("e.csv", "prompt\nhé\n".encode("utf-16-be"), "UTF-16"),
        ("f.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("g.jsonl", '{"prompt": "a"}\n'.encode("utf-16-le"), "UTF-16"),
    ],
)
def test_a_file_that_would_lose_rows_or_columns_is_refused(tmp_path, name, data, problem):
    (tmp_path / name).write_bytes(data)
    refuses(DataError, problem, rows_of, tmp_path / name)


def test_a_bad_row_costs_only_itself(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,x\n"a"b,1\nsay "hi",2\n')
    first, second = rows_of(tmp_path / "a.csv")
    assert "a.csv:2: not valid CSV" in str(first)
    assert second == {"prompt": 'say "hi"', "x": "2"}
    twice = '{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "m": [[{"x": 1, "x": 2}]]}', '{"prompt": "c"}'
    for name, text in (("b.jsonl", "\n".join(twice)), ("b.json", f"[{','.join(twice)}]")):
        (tmp_path / name).write_text(text)
        *bad, good = rows_of(tmp_path / name)
        assert ["more than once" in str(row) for row in bad] == [True, True]
        assert good == {"prompt": "c"}
    late = pa.array([0, 569_000_000_000], pa.timestamp("s"))  # the year 20000
    pq.write_table(pa.table({"prompt": ["a", "b"], "t": late}), tmp_path / "c.parquet")
    first, second = rows_of(tmp_path / "c.parquet")
    assert first["prompt"] == "a"
    assert "c.parquet[1]: a value that Python cannot hold" in str(second)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    refuses(DataError, "'prompt' is there more than once", rows_of, tmp_path / "a.parquet")


def test_labels_are_read_by_their_names(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": [1, 0, -1]}, features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "data.parquet")
    for source in (f"hf://{tmp_path}/saved", tmp_path / "data.parquet"):
        assert [row["answer"] for row in rows_of(source)] == ["yes", "no", None]


def test_brackets_in_a_folders_name_are_no_pattern(tmp_path):
    folder = tmp_path / "data [v1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text(jsonl(ROWS[:1]))
    (folder / "b.jsonl").write_text(jsonl(ROWS[1:2]))
    assert rows_of(folder / "a.jsonl") == ROWS[:1]
    assert rows_of(folder / "*.jsonl") == ROWS[:2]
    (tmp_path / "a1.jsonl").write_text(jsonl(ROWS))
    assert rows_of(tmp_path / "a[0-9].jsonl") == ROWS


def test_a_dataset_folder_that_is_written_again_gives_its_new_rows(tmp_path):
    import os

    import datasets

    from qrpo.data.prompts import PromptsConfig
    from tasks.stages.prompts import source_identity

    datasets.disable_progress_bars()

    def write(rows):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / "train.jsonl").write_text(jsonl(rows))
        os.utime(tmp_path / "files" / "train.jsonl", (1, 1))

    sources = [f"hf://{tmp_path}/saved", f"hf://{tmp_path}/files"]
    before, after = [{"prompt": "one"}], [{"prompt": "two"}]
    write(before)
    assert [rows_of(source) for source in sources] == [before, before]
    identities = [source_identity(PromptsConfig(source=source), {}) for source in sources]
    write(after)
    assert [rows_of(source) for source in sources] == [after, after]
    assert all(
        source_identity(PromptsConfig(source=source), {}) != identity
        for source, identity in zip(sources, identities, strict=True)
    )


def test_a_data_folder_with_configurations_names_them_and_reads_each(tmp_path):
    (tmp_path / "many").mkdir()
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("easy", "hard")]
    (tmp_path / "many" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    for number, name in enumerate(("easy", "hard")):
        (tmp_path / "many" / f"{name}.jsonl").write_text(jsonl(ROWS[number : number + 1]))
    refuses(DataError, r"'easy', 'hard'", rows_of, f"hf://{tmp_path}/many")
    assert rows_of(f"hf://{tmp_path}/many/hard") == ROWS[1:2]
