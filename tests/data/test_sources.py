"""Files, directories and hub datasets as rows, for every algorithm."""

import gzip
import json

import datasets
import pytest
from huggingface_hub import constants

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.sources import read_table


def table_of(**section):
    return read_table(DatasetConfig.model_validate({"dataset_name": "jsonl", **section}), "data.train")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, which holds six rows and keeps what it was asked."""
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"input": f"q{i}", "turns": [{"role": "user", "n": i}]} for i in range(6)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_path_is_looked_for_in_the_working_directory_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "examples/data/gsm8k/test.jsonl"
    assert len(table_of(data_path=name)) == 64
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text('{"input": "nearer"}\n')
    assert table_of(data_path=name)[0].values == {"input": "nearer"}


def test_blank_lines_count_in_a_rows_place(write):
    table = table_of(data_path=write({"input": "a"}, "", {"input": "b"}))
    assert [row.place.split(" of ")[0] for row in table] == ["line 1", "line 3"]
    assert table[1].place.startswith("line 3 of /")


def test_parquet_rows_are_read_in_any_order_and_as_a_whole(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"input": f"q{i}", "turns": [{"role": "user", "n": i}]} for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    table = table_of(data_path=str(tmp_path / "a.parquet"))
    assert [row.values for row in table] == rows
    assert table[2411].values == rows[2411]
    assert table[2411].place == f"row 2411 of {tmp_path}/a.parquet"
    assert len(table_of(data_path=str(tmp_path / "a.parquet"), max_num_rows=3)) == 3


def test_hub_dataset_is_asked_by_its_name_subset_and_split(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = table_of(data_path="org/rows", subset="en", split="test", max_num_rows=4)
    assert len(table) == 4
    assert [row.values["turns"][0]["n"] for row in table] == [0, 1, 2, 3]
    assert table[3].values["input"] == "q3"
    assert table[3].place == "row 3 of org/rows"
    table_of(dataset_name="gsm8k")
    table_of(dataset_name="HelpSteer3", subset="edit", split="validation")
    assert hub == [
        ("org/rows", "en", "test"),
        ("openai/gsm8k", "main", "train"),
        ("nvidia/HelpSteer3", "edit", "validation"),
    ]


def test_local_directory_comes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "rows").mkdir(parents=True)
    (tmp_path / "org" / "rows" / "train.jsonl").write_text('{"input": "local"}\n')
    assert table_of(data_path="org/rows")[0].values == {"input": "local"}
    assert hub == []


def test_unreachable_hub_names_the_way_out(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError) as error:
        table_of(dataset_name="squad")
    begin, _, end = str(error.value).partition(" (")
    assert begin == "data.train.dataset_name: rajpurkar/squad could not be loaded from the Hugging Face hub"
    assert end.endswith(
        "). Download it on a machine with a network, and set data.train.data_path to its .jsonl or .parquet file."
    )
    with pytest.raises(
        ValueError, match=r"^data.train.data_path='org/rows': there is no such file or directory, and it"
    ):
        table_of(data_path="org/rows")


def test_subset_of_a_local_file_is_refused(write):
    with pytest.raises(
        ValueError, match=r"^data.train.subset='en': has no meaning where data_path is local. Remove it.$"
    ):
        table_of(data_path=write({"input": "a"}), subset="en")


def test_file_that_is_not_what_its_name_says_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(
        ValueError, match=r"^data.train.data_path: .*/a.parquet is no Parquet file \(.*\). Correct it.$"
    ):
        table_of(data_path=str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(ValueError, match=r"^data.train.data_path: .*/a.jsonl is no text in UTF-8 \(.*\). Convert it.$"):
        table_of(data_path=str(tmp_path / "a.jsonl"))


ROWS = [{"input": f"q{i}", "output": str(i)} for i in range(5)]


def questions(**section):
    return [row.values["input"] for row in table_of(**section)]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_shards(directory, suffix, *, split="train", tail=""):
    """Five rows in two shards, as the hub names them."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        path = directory / f"{split}-0000{number}-of-00002{tail}{suffix}"
        if suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif suffix.endswith(".gz"):
            path.write_bytes(gzip.compress(as_lines(rows).encode()))
        else:
            path.write_text(as_lines(rows))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("tail", ["", "-a09b74b3ef9c3b56"])
def test_shards_of_a_split_are_one_set_of_rows(tmp_path, suffix, below, tail):
    write_shards(tmp_path / below, suffix, tail=tail)
    write_shards(tmp_path / below, suffix, split="test", tail=tail)
    table = table_of(data_path=str(tmp_path))
    assert [row.values for row in table] == ROWS
    assert [table[i].values for i in range(-5, 5)] == [*ROWS, *ROWS]
    word = "row 0" if suffix == ".parquet" else "line 1"
    assert table[3].place == f"{word} of {tmp_path / below}/train-00001-of-00002{tail}{suffix}"
    for limit in (2, 3, 4, 9):
        assert questions(data_path=str(tmp_path), max_num_rows=limit) == [row["input"] for row in ROWS[:limit]]


def test_shards_that_are_missing_or_doubled_are_refused(tmp_path):
    write_shards(tmp_path / "a", ".parquet")
    (tmp_path / "a" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="of the 2 shards of train, 1 are missing, the first of them number 00000"):
        table_of(data_path=str(tmp_path / "a"))
    write_shards(tmp_path / "b", ".parquet")
    write_shards(tmp_path / "b" / "data", ".jsonl")
    with pytest.raises(ValueError, match="several files that could be the split 'train'"):
        table_of(data_path=str(tmp_path / "b"))
    write_shards(tmp_path / "c", ".parquet", split="test")
    with pytest.raises(ValueError, match=r"no rows of the split 'train'.* Set data.train.split to one of: test.$"):
        table_of(data_path=str(tmp_path / "c"))


def test_one_shard_by_its_name_is_said_to_be_one_of_several(tmp_path, caplog):
    write_shards(tmp_path, ".parquet")
    name = "train-00000-of-00002"
    for section in ({"data_path": f"{tmp_path}/{name}.parquet"}, {"data_path": str(tmp_path), "split": name}):
        caplog.clear()
        assert questions(**section) == ["q0", "q1", "q2"]
        assert "train-00000-of-00002.parquet is one of 2 shards of train, and only its rows are used" in caplog.text


def test_files_of_a_directory_of_the_splits_name_are_one_set(tmp_path):
    (tmp_path / "train").mkdir()
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train" / f"000{number}.parquet")
    assert questions(data_path=str(tmp_path)) == [row["input"] for row in ROWS]


def test_saved_datasets_are_read(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": saved, "test": saved.select([4])}).save_to_disk(tmp_path / "splits")
    assert questions(data_path=str(tmp_path / "one")) == [row["input"] for row in ROWS]
    assert questions(data_path=str(tmp_path / "one"), max_num_rows=2) == ["q0", "q1"]
    assert questions(data_path=str(tmp_path / "splits")) == [row["input"] for row in ROWS]
    assert questions(data_path=str(tmp_path / "splits"), split="test") == ["q4"]
    assert questions(data_path=str(tmp_path / "splits" / "test")) == ["q4"]
    with pytest.raises(ValueError, match=r"split='dev': .* has no split 'dev', only train, test"):
        table_of(data_path=str(tmp_path / "splits"), split="dev")
    with pytest.raises(ValueError, match="has no meaning where data_path is one split that was saved to disk"):
        table_of(data_path=str(tmp_path / "one"), split="train")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="is no dataset that was saved to disk"):
        table_of(data_path=str(tmp_path / "one"))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_json_array_is_rows(tmp_path, name, indent):
    data = ("\ufeff" + json.dumps(ROWS, indent=indent)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    table = table_of(data_path=str(tmp_path / name))
    assert [row.values for row in table] == ROWS
    assert table[4].place == f"row 4 of {tmp_path / name}"
    assert len(table_of(data_path=str(tmp_path / name), max_num_rows=2)) == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"input": "a"}, 3]', r"row 1 of .*a.json is a JSON int, and an object is needed. Correct it.$"),
        ("a.json", b'[\n{"input": "a"},\n{"input" 4}]', r"a.json is not valid JSON \(Expecting.*, line 3, column 10\)"),
        ("a.json", b'{\n "rows": []\n}', r"line 1 of .*a.json is not valid JSON"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz cannot be read \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"input": "a"}' * 99, mtime=0)[:-9],
            r"a.jsonl.gz cannot be read \(Compressed file ended",
        ),
        ("a.parquet.gz", b"", r"a file that ends with .jsonl, .json, .parquet, .jsonl.gz, .json.gz is needed"),
    ],
)
def test_file_that_holds_no_rows_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        table_of(data_path=str(tmp_path / name))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_keys_that_a_message_does_not_have_stay_absent(tmp_path, kind):
    chats = [
        {"n": None, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"n": 1, "messages": [{"role": "user", "content": "a", "calls": [{"name": "f"}, {"args": {"x": 1}}]}]},
    ]
    stored, path = datasets.Dataset.from_list(chats), tmp_path / "rows.parquet"
    stored.to_parquet(path) if kind == "parquet" else stored.save_to_disk(path)
    section = DatasetConfig.model_validate({"dataset_name": "jsonl", "data_path": str(path)})
    assert [row.values for row in read_table(section, "data.train")] == chats
    kept = [row.values for row in read_table(section, "data.train", keep_nulls=True)]
    assert kept[0]["messages"][0] == {"role": "user", "content": "a", "calls": None}
