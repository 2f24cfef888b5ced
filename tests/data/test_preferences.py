import json
import logging
from pathlib import Path

import pytest

from nemo_rl_lora.data.catalog import names_for
from nemo_rl_lora.data.preferences import load_preference_sets

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "examples" / "data" / "gsm8k" / "solutions.jsonl"
SHARED_SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"

USER = {"role": "user", "content": "Hi"}
CONTEXT = [{"role": "system", "content": "Be kind."}, USER]


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(make_config, smol):
    """load(train, ...) -> (training sets, validation sets), in SmolLM2's template."""

    def load_sets(train, *, template="default", **options):
        return load_preference_sets(make_config(train, env_name=None, **options), smol(template))

    return load_sets


def texts(smol, pair):
    decode = smol().decode
    return decode(pair.prompt_ids), decode(pair.chosen_ids), decode(pair.rejected_ids)


def kind(user="Hi", system="Be kind."):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("section", "row"),
    [
        (
            {"dataset_name": "PreferenceDataset"},
            {
                "context": CONTEXT,
                "completions": [{"rank": 1, "completion": [says("No")]}, {"rank": 0, "completion": [says("Yes")]}],
            },
        ),
        ({"dataset_name": "BinaryPreferenceDataset"}, {"prompt": CONTEXT, "chosen": "Yes", "rejected": "No"}),
        (
            {"dataset_name": "BinaryPreferenceDataset", "prompt_key": "p", "chosen_key": "c", "rejected_key": "r"},
            {"p": CONTEXT, "c": [says("Yes")], "r": [*CONTEXT, says("No")]},
        ),
        (
            {"dataset_name": "HelpSteer3"},
            {"context": CONTEXT, "response1": "Yes", "response2": "No", "overall_preference": -2},
        ),
        (
            {"dataset_name": "HelpSteer3"},
            {"context": CONTEXT, "response1": "No", "response2": "Yes", "overall_preference": 1},
        ),
        ({"dataset_name": "Tulu3Preference"}, {"chosen": [*CONTEXT, says("Yes")], "rejected": [*CONTEXT, says("No")]}),
    ],
)
def test_row_of_each_dataset_becomes_its_pair(load, smol, write, section, row):
    (pairs,), validation = load({**section, "data_path": write(row)})
    assert validation == []
    assert texts(smol, pairs[0]) == (kind(), "Yes<|im_end|>\n", "No<|im_end|>\n")
    assert (pairs[0].index, pairs[0].source) == (0, section["dataset_name"])
    assert pairs[0].cluster == "Be kind.\nHi"


def test_text_prompt_is_the_users_and_takes_the_prompt_files(load, smol, write, tmp_path):
    (tmp_path / "p.txt").write_text("Q: {}")
    (tmp_path / "s.txt").write_text("Reply.")
    section = {"dataset_name": "BinaryPreferenceDataset"}
    section["data_path"] = write({"prompt": "Hi", "chosen": "Yes", "rejected": "No"})
    files = {"prompt_file": str(tmp_path / "p.txt"), "system_prompt_file": str(tmp_path / "s.txt")}
    (pairs,), _ = load({**section, **files})
    assert texts(smol, pairs[0])[0] == kind("Q: Hi", "Reply.")
    section["data_path"] = write({"prompt": CONTEXT, "chosen": "Yes", "rejected": "No"})
    (pairs,), _ = load({**section, "system_prompt_file": str(tmp_path / "s.txt")})
    assert texts(smol, pairs[0])[0] == kind()


def solution(is_correct, text):
    return {"is_correct": is_correct, "solution": text}


QUESTION = {
    "question": "1 + 1?",
    "ground_truth": "2",
    "6b_finetuning": solution(False, "small wrong"),
    "6b_verification": solution(True, "small right"),
    "175b_finetuning": solution(True, "large right"),
    "175b_verification": solution(False, "large wrong"),
}
WRONG_ONLY = {**QUESTION, "6b_verification": solution(False, "w1"), "175b_finetuning": solution(False, "w2")}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            "all",
            [
                ("small right", "small wrong", "same_model"),
                ("small right", "large wrong", "other_model"),
                ("large right", "small wrong", "other_model"),
                ("large right", "large wrong", "same_model"),
            ],
        ),
        ("same_model", [("small right", "small wrong", "same_model"), ("large right", "large wrong", "same_model")]),
        ("one", [("small right", "small wrong", "same_model")]),
    ],
)
def test_marked_solutions_are_paired_as_asked(load, smol, write, caplog, pairs, expected):
    section = {"dataset_name": "gsm8k_solutions", "data_path": write(WRONG_ONLY, QUESTION), "pairs": pairs}
    with caplog.at_level(logging.INFO):
        (found,), _ = load(section)
    end = "<|im_end|>\n"
    assert [(*texts(smol, pair)[1:], pair.source) for pair in found] == [
        (right + end, wrong + end, f"gsm8k_solutions/{part}") for right, wrong, part in expected
    ]
    assert [pair.index for pair in found] == list(range(len(expected)))
    assert {pair.cluster for pair in found} == {"1 + 1?"}
    assert "data.train: 1 of 2 rows are left out, preferring no answer to another" in caplog.text


def test_solutions_are_taken_in_the_order_of_the_file(load, smol, write):
    turned = {key: QUESTION[key] for key in reversed(QUESTION)}
    section = {"dataset_name": "gsm8k_solutions", "data_path": write(turned), "pairs": "one"}
    (found,), _ = load(section)
    assert texts(smol, found[0])[1:] == ("large right<|im_end|>\n", "large wrong<|im_end|>\n")


def test_no_question_is_on_both_sides(load):
    section = {"dataset_name": "gsm8k_solutions", "data_path": str(SOLUTIONS), "split_validation_size": 0.2}
    (train,), (held_out,) = load(section, max_total=4096)
    questions, others = {pair.cluster for pair in train}, {pair.cluster for pair in held_out}
    assert (len(questions), len(others)) == (128, 32)
    assert not questions & others
    (every,), _ = load({**section, "split_validation_size": 0.0}, max_total=4096)
    assert sorted(pair.index for pair in [*train, *held_out]) == list(range(len(every)))
    assert len(every) > 300
    assert held_out[3] == next(pair for pair in every if pair.index == held_out[3].index)


def test_answers_are_what_follows_the_prompt_in_the_whole_chat(load, smol):
    """Token by token, as the speed comparison's rows are made."""
    tokenizer = smol()
    (pairs,), _ = load({"dataset_name": "gsm8k_solutions", "data_path": str(SOLUTIONS), "pairs": "one"}, max_total=4096)
    rows = [json.loads(line) for line in SOLUTIONS.read_text().splitlines()]
    assert len(pairs) == len(rows) == 160
    for pair, row in zip(pairs[:40], rows[:40], strict=True):
        solutions = [value for value in row.values() if isinstance(value, dict)]
        asked = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        for is_correct, answer in ((True, pair.chosen_ids), (False, pair.rejected_ids)):
            text = next(item["solution"] for item in solutions if item["is_correct"] is is_correct)
            whole = tokenizer.apply_chat_template([*asked, says(text)], return_dict=True)["input_ids"]
            assert (*pair.prompt_ids, *answer) == tuple(whole)
            assert list(pair.prompt_ids) == prompt


@pytest.mark.parametrize("limits", [{"max_total": 40}, {"max_input_seq_length": 40}])
def test_pair_with_a_long_side_is_left_out_and_counted(load, write, caplog, limits):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b" if i % 3 else "many words " * 30} for i in range(6)]
    section = {"dataset_name": "BinaryPreferenceDataset", "data_path": write(*rows)}
    with caplog.at_level(logging.WARNING):
        (pairs,), _ = load(section, **limits)
    assert [(pair.index, pair.cluster) for pair in pairs] == [(i, f"q{i}") for i in (1, 2, 4, 5)]
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("data.train: 2 of 6 pairs are left out, a side being longer than 40 tokens (data.max_in")
    (train,), (held_out,) = load({**section, "split_validation_size": 0.5}, **limits)
    assert sorted(pair.index for pair in [*train, *held_out]) == [1, 2, 4, 5]


def test_side_of_just_the_limit_stays(load, write):
    section = {
        "dataset_name": "BinaryPreferenceDataset",
        "data_path": write({"prompt": "q", "chosen": "a", "rejected": "b c"}),
    }
    (pairs,), _ = load(section)
    limit = len(pairs[0].prompt_ids) + len(pairs[0].rejected_ids)
    assert len(load(section, max_total=limit)[0][0]) == 1
    with pytest.raises(ValueError, match=f"all 1 pairs are left out, a side being longer than {limit - 1} tokens"):
        load(section, max_total=limit - 1)


def test_preference_of_zero_is_left_out_and_counted(load, write, caplog):
    row = {"context": CONTEXT, "response1": "a", "response2": "b", "overall_preference": 0}
    section = {"dataset_name": "HelpSteer3", "data_path": write(row, {**row, "overall_preference": 3}, row)}
    with caplog.at_level(logging.INFO):
        (pairs,), _ = load(section)
    assert len(pairs) == 1
    assert [record.message for record in caplog.records] == [
        "data.train: 2 of 3 rows are left out, preferring no answer to another"
    ]


def test_mixture_and_validation_sets_have_names_of_their_own(load, write):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    binary = {"dataset_name": "BinaryPreferenceDataset", "data_path": write(row), "rate": 3}
    solutions = {"dataset_name": "gsm8k_solutions", "data_path": write(QUESTION, name="s.jsonl")}
    train, validation = load([binary, solutions, solutions], validation=[solutions, solutions])
    assert [(rows.name, rows.rate, len(rows)) for rows in train] == [
        ("BinaryPreferenceDataset", 3.0, 1),
        ("gsm8k_solutions", 1.0, 4),
        ("gsm8k_solutions#2", 1.0, 4),
    ]
    assert train[2][1].source == "gsm8k_solutions#2/other_model"
    assert [rows.name for rows in validation] == ["gsm8k_solutions", "gsm8k_solutions#2"]


@pytest.mark.parametrize("name", ["jsonl", "gsm8k", "squad", "generated_sums"])
def test_dataset_of_another_algorithm_is_refused_with_what_there_is(load, name):
    with pytest.raises(ValueError) as error:
        load({"dataset_name": name, **({"data_path": "absent.jsonl"} if name == "jsonl" else {})})
    assert str(error.value) == (
        f"data.train.dataset_name='{name}': holds no preference pairs for DPO. Use one of "
        f"{', '.join(names_for('dpo'))}."
    )


@pytest.mark.skipif(not SHARED_SOLUTIONS.is_file(), reason="the GSM8K files are not beside the project")
def test_every_marked_solution_of_the_real_file_is_paired(load):
    (pairs,), _ = load({"dataset_name": "gsm8k_solutions", "data_path": str(SHARED_SOLUTIONS)}, max_total=10_000)
    rows = [json.loads(line) for line in SHARED_SOLUTIONS.read_text().splitlines()]
    marks = [[value["is_correct"] for value in row.values() if isinstance(value, dict)] for row in rows]
    assert len(pairs) == sum(mark.count(True) * mark.count(False) for mark in marks)


@pytest.mark.parametrize("blanks", ["\n", "\n\n", " ", "\n \n", "\t", "\r\n", "   ", "\u3000", "\n\n\n\n"])
def test_an_answer_may_begin_with_blanks_that_the_tokenizer_joins_to_the_prompt(load, smol, write, blanks):
    row = {"prompt": CONTEXT, "chosen": f"{blanks}Yes", "rejected": "No"}
    (pairs,), _ = load({"dataset_name": "BinaryPreferenceDataset", "data_path": write(row)})
    assert texts(smol, pairs[0]) == (kind(), f"{blanks}Yes<|im_end|>\n", "No<|im_end|>\n")
    assert list(pairs[0].prompt_ids) == smol()(kind())["input_ids"]
