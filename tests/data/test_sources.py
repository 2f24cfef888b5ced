"""Files, directories and hub datasets as rows, for every algorithm."""

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
