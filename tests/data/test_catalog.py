import json
from pathlib import Path

import pytest

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.catalog import DATASETS, names_for
from nemo_rl_lora.data.row_sets import open_dataset

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


def rows_of(**section):
    read, rows = open_dataset("grpo", DatasetConfig.model_validate(section), "data.train", processor=None)
    return [read(row) for row in rows]


def write_lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_generated_sums_are_right_in_range_and_a_function_of_the_seed():
    rows = rows_of(dataset_name="generated_sums", low=3, high=7, num_rows=200, seed=1)
    assert len(rows) == 200
    for row in rows:
        a, b = row.row["a"], row.row["b"]
        assert row.question == f"What is {a} + {b}? Reply with the number only."
        assert row.row["answer"] == a + b
    assert {row.row["a"] for row in rows} == {3, 4, 5, 6, 7}
    assert rows == rows_of(dataset_name="generated_sums", low=3, high=7, num_rows=200, seed=1)
    assert rows != rows_of(dataset_name="generated_sums", low=3, high=7, num_rows=200, seed=2)


def test_own_rows_keep_their_keys_and_name_the_answer(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"q": "one", "a": "1", "level": 3}, "", {"q": "two", "a": "2", "level": 4})
    rows = rows_of(dataset_name="jsonl", data_path=path, input_key="q", output_key="a")
    assert [r.question for r in rows] == ["one", "two"]
    assert dict(rows[1].row) == {"q": "two", "a": "2", "level": 4, "answer": "2"}


def test_row_limit_takes_the_first_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"input": f"q{i}"} for i in range(5)))
    rows = rows_of(dataset_name="ResponseDataset", data_path=path, max_num_rows=2)
    assert [r.question for r in rows] == ["q0", "q1"]


def test_nemo_rls_name_of_the_row_limit_means_the_same(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"input": f"q{i}"} for i in range(5)))
    section = {"dataset_name": "jsonl", "data_path": path, "max_samples": 3}
    assert [r.question for r in rows_of(**section)] == ["q0", "q1", "q2"]
    assert len(rows_of(**section, max_num_rows=3)) == 3
    with pytest.raises(ValueError, match="max_samples=3: is NeMo RL's name of max_num_rows, which is 2"):
        rows_of(**section, max_num_rows=2)


@pytest.mark.parametrize("name", ["DeepScaler", "AIME2024"])
def test_competition_problems_have_their_final_answers(name, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"problem": "1 + 1?", "answer": "2", "solution": "It is 2."})
    (row,) = rows_of(dataset_name=name, data_path=path)
    assert (row.question, dict(row.row)) == ("1 + 1?", {"question": "1 + 1?", "answer": "2"})


@pytest.mark.parametrize("name", ["DAPOMath17K", "DAPOMathAIME2024"])
def test_dapos_rows_have_their_problem_in_the_first_message(name, tmp_path):
    stored = {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": "2", "style": "rule"}}
    (row,) = rows_of(dataset_name=name, data_path=write_lines(tmp_path / "a.jsonl", stored))
    assert (row.question, dict(row.row)) == ("1 + 1?", {"question": "1 + 1?", "answer": "2"})
    for wrong in ({"prompt": []}, {"prompt": "1 + 1?"}, {"reward_model": {}}, {"reward_model": "2"}):
        path = write_lines(tmp_path / "b.jsonl", stored | wrong)
        with pytest.raises(
            ValueError, match=r"^data.train.data_path: line 1 of .*b.jsonl has (prompt=|no 'reward_model')"
        ):
            rows_of(dataset_name=name, data_path=path)


def test_verls_rows_keep_their_keys_and_have_one_message(tmp_path):
    stored = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 3},
    }
    (row,) = rows_of(dataset_name="verl", data_path=write_lines(tmp_path / "a.jsonl", stored))
    assert (row.question, dict(row.row)) == ("1 + 1?", stored | {"answer": "2"})
    text = {"question": "1 + 1?"}
    (row,) = rows_of(
        dataset_name="verl", prompt_key="question", data_path=write_lines(tmp_path / "b.jsonl", stored | text)
    )
    assert row.question == "1 + 1?"
    system = {"prompt": [{"role": "system", "content": "Be brief."}, *stored["prompt"]]}
    with pytest.raises(ValueError, match=r"^data.train.prompt_key: line 1 of .*one message of the user with a text is"):
        rows_of(dataset_name="verl", data_path=write_lines(tmp_path / "c.jsonl", stored | system))


def test_parquet_reads_like_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"problem": ["2 + 2"], "expected_answer": ["4"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = rows_of(dataset_name="OpenMathInstruct-2", data_path=str(tmp_path / "a.parquet"))
    assert [(r.question, dict(r.row)) for r in rows] == [("2 + 2", {"question": "2 + 2", "answer": "4"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "x"', r"line 2 of .*a.jsonl is not valid JSON"),
        ("[1]", r"line 2 of .*a.jsonl is a JSON list"),
        ('{"prompt": "x"}', r"data.train.input_key: line 2 of .*has no 'input'; its keys are prompt"),
        ('{"input": 5}', r"line 2 of .*has input=5, and a text is needed"),
        ('{"input": "x"}', r"data.train.output_key: line 2 of .*has no 'a'; its keys are input"),
    ],
)
def test_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"input": "x", "a": 1}, line)
    with pytest.raises(ValueError, match=message):
        rows_of(dataset_name="jsonl", data_path=path, output_key="a")


def test_missing_file_empty_file_and_wrong_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.train.data_path='absent.jsonl': there is no such file"):
        rows_of(dataset_name="jsonl", data_path="absent.jsonl")
    with pytest.raises(ValueError, match=r"data.train: .*empty.jsonl has no rows"):
        rows_of(dataset_name="jsonl", data_path=write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"a file that ends with .jsonl, .json, .parquet, .* is needed"):
        rows_of(dataset_name="jsonl", data_path=write_lines(tmp_path / "a.csv", "x"))


def test_directory_needs_a_file_of_the_splits_name(tmp_path):
    write_lines(tmp_path / "test.jsonl", {"input": "x"})
    assert rows_of(dataset_name="jsonl", data_path=str(tmp_path), split="test")[0].question == "x"
    with pytest.raises(
        ValueError, match=r"no rows of the split 'train'.*, only test.jsonl. Set data.train.split to one of: test."
    ):
        rows_of(dataset_name="jsonl", data_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.train.split='test': has no meaning where data_path is a file"):
        rows_of(dataset_name="jsonl", data_path=str(tmp_path / "test.jsonl"), split="test")


def test_gsm8k_row_keeps_the_solution_and_takes_the_final_answer(tmp_path):
    solution = "He has 1000 + 200 = <<1000+200=1200>>1200 left.\n#### 1,200"
    path = write_lines(tmp_path / "a.jsonl", {"question": "How many?", "answer": solution})
    row = rows_of(dataset_name="gsm8k", data_path=path)[0]
    assert row.row == {"question": "How many?", "solution": solution, "answer": "1200"}
    path = write_lines(tmp_path / "b.jsonl", {"question": "How many?", "answer": "12"})
    with pytest.raises(ValueError, match=r"line 1 of .*b.jsonl has no '####'"):
        rows_of(dataset_name="gsm8k", data_path=path)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_every_row_of_the_real_gsm8k_has_a_number_for_an_answer():
    rows = rows_of(dataset_name="gsm8k", data_path=str(GSM8K), split="test")
    assert len(rows) == 1319
    assert rows[0].row["answer"] == "18"
    assert all(float(row.row["answer"]) == int(row.row["answer"]) for row in rows)


def test_reasoning_gym_rows_follow_task_seed_and_settings():
    section = {"dataset_name": "reasoning_gym", "task": "chain_sum", "size": 4, "seed": 7}
    rows = rows_of(**section, task_config={"min_terms": 3, "max_terms": 3})
    assert len(rows) == 4
    for row in rows:
        expression = row.question.split(":")[1].strip(" =")
        assert eval(expression) == int(row.row["answer"])
        assert row.row["metadata"]["num_terms"] == 3
    again = rows_of(**section, task_config={"min_terms": 3, "max_terms": 3})
    assert [row.question for row in rows] == [row.question for row in again]


def test_unknown_task_and_unknown_setting_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"data.train.task='chain_smu'.*Did you mean 'chain_sum'"):
        rows_of(dataset_name="reasoning_gym", task="chain_smu")
    with pytest.raises(ValueError, match=r"data.train.task_config=.*max_term.*Its settings are .*max_terms"):
        rows_of(dataset_name="reasoning_gym", task="chain_sum", task_config={"max_term": 3})


@pytest.mark.parametrize("name", sorted(DATASETS.keys() - names_for("grpo")))
def test_dataset_without_prompts_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"data.train.dataset_name='{name}': holds no prompts for GRPO. Use one of"):
        rows_of(dataset_name=name, data_path="absent.jsonl")


def test_the_table_of_the_docs_is_the_catalog():
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    header, *rows = [row for row in rows if len(row) == 5]
    assert (header[0], header[-1]) == ("`dataset_name`", "own keys")
    table = {row[0]: row[1:] for row in rows}
    assert list(table) == [", ".join(f"`{name}`" for name in dataset.names) for dataset in _each_once()]
    for dataset, (prompt, conversation, pairs, keys) in zip(_each_once(), table.values(), strict=True):
        readers = (dataset.prompt, dataset.conversation, dataset.pairs)
        assert [bool(cell) for cell in (prompt, conversation, pairs)] == [reader is not None for reader in readers]
        assert keys == ", ".join(f"`{key}`" for key in dataset.keys)
        assert dataset.hub is None or f"`{dataset.hub.name}`" in "\n".join(lines)


def _each_once():
    return list({dataset.names: dataset for dataset in DATASETS.values()}.values())


def test_every_key_of_a_dataset_is_one_of_the_configuration():
    for dataset in _each_once():
        assert set(dataset.keys) <= DatasetConfig.model_fields.keys(), dataset.names
