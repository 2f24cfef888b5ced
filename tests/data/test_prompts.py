import json
import logging

import pytest

from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.prompts import load_prompt_sets, load_prompts

SUMS = {"dataset_name": "generated_sums", "low": 0, "high": 9, "num_rows": 20, "seed": 5}


def test_prompt_is_the_rendered_template_and_the_row(tokenizer, make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input": "What is 3 + 4 ?", "n": 7}))
    section = {"dataset_name": "jsonl", "data_path": str(tmp_path / "a.jsonl"), "output_key": "n"}
    train, validation = load_prompt_sets(make_config(section), tokenizer)
    prompt = train[0]
    words = ["user", ":", "What", "is", "3", "+", "4", "?", "assistant", ":"]
    assert list(prompt.token_ids) == tokenizer.convert_tokens_to_ids(words)
    assert (prompt.index, prompt.text, prompt.environment) == (0, "What is 3 + 4 ?", "last_number")
    assert prompt.row == {"input": "What is 3 + 4 ?", "n": 7, "answer": 7}
    assert validation is None
    assert train.environment_names == ("last_number",)


def test_prompt_file_and_system_prompt_file_are_put_around_the_question(tokenizer, make_config, tmp_path):
    (tmp_path / "p.txt").write_text("Q {{x}} : {}\n")
    (tmp_path / "s.txt").write_text("Reply number\n")
    files = {"prompt_file": str(tmp_path / "p.txt"), "system_prompt_file": str(tmp_path / "s.txt")}
    train, _ = load_prompt_sets(make_config({**SUMS, **files}), tokenizer)
    row = train[0].row
    assert train[0].text == f"Q {{x}} : What is {row['a']} + {row['b']}? Reply with the number only."
    start = ["system", ":", "Reply", "number", "user", ":"]
    assert list(train[0].token_ids)[: len(start)] == tokenizer.convert_tokens_to_ids(start)


def test_repeated_rows_are_prompts_of_their_own(tokenizer, make_config):
    section = {**SUMS, "num_rows": 4, "repeat": 3, "split_validation_size": 0.25}
    train, validation = load_prompt_sets(
        make_config(section, validation={**SUMS, "num_rows": 2, "repeat": 2}), tokenizer
    )
    assert [prompt.index for prompt in train] == list(range(9))
    assert [prompt.text for prompt in train] == [prompt.text for prompt in train[:3]] * 3
    texts = [prompt.text for prompt in validation]
    assert (len(texts), texts[1:3]) == (5, texts[3:])
    assert texts[0] not in {prompt.text for prompt in train}


@pytest.mark.parametrize(
    ("text", "message"),
    [("no place", "found none"), ("{} {}", "found {}, {}"), ("{name}", "found {name}"), ("{", "braces do not match")],
)
def test_prompt_file_needs_exactly_one_placeholder(tokenizer, make_config, tmp_path, text, message):
    (tmp_path / "p.txt").write_text(text)
    config = make_config({**SUMS, "prompt_file": str(tmp_path / "p.txt")})
    with pytest.raises(ValueError, match=r"data.train.prompt_file=.*") as error:
        load_prompt_sets(config, tokenizer)
    assert message in str(error.value)


def test_file_of_the_repository_is_found_from_any_directory(tokenizer, make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, _ = load_prompt_sets(make_config({**SUMS, "prompt_file": "examples/prompts/cot.txt"}), tokenizer)
    assert "\\boxed{}" in train[0].text
    with pytest.raises(ValueError, match=r"data.train.prompt_file='absent.txt': there is no such file"):
        load_prompt_sets(make_config({**SUMS, "prompt_file": "absent.txt"}), tokenizer)


def test_prompt_that_is_too_long_is_refused_or_dropped(tokenizer, make_config, tmp_path, caplog):
    lines = [{"input": "1"}, {"input": "1 2 3 4 5 6"}, {"input": "2"}]  # 5, 10 and 5 tokens with the template
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    section = {"dataset_name": "jsonl", "data_path": str(tmp_path / "a.jsonl")}
    for limits in ({"max_input_seq_length": 9}, {"max_total": 10}):
        with pytest.raises(
            ValueError, match=r"data.on_long_prompt='error': 1 of 3 prompts.*line 2 of .*with 10 tokens"
        ):
            load_prompt_sets(make_config(section, **limits), tokenizer)
    assert len(load_prompt_sets(make_config(section, max_input_seq_length=10, max_total=11), tokenizer)[0]) == 3
    with caplog.at_level(logging.WARNING):
        config = make_config(section, max_input_seq_length=9, on_long_prompt="drop")
        train, _ = load_prompt_sets(config, tokenizer)
    assert [(p.index, p.text) for p in train] == [(0, "1"), (1, "2")]
    assert "1 of 3 prompts are left out" in caplog.text
    with pytest.raises(ValueError, match="all 3 prompts"):
        load_prompt_sets(make_config(section, max_input_seq_length=2, on_long_prompt="drop"), tokenizer)


def test_held_out_rows_and_training_rows_are_all_rows_and_follow_the_seed(tokenizer, make_config):
    def split(**change):
        return load_prompt_sets(make_config({**SUMS, "split_validation_size": 0.25, **change}), tokenizer)

    every = [p.row for p in load_prompts(make_config(SUMS).data.train, tokenizer, config=make_config(SUMS), key="k")]
    train, held_out = split()
    assert (len(train), len(held_out)) == (15, 5)
    merged = [p.row for p in train] + [p.row for p in held_out]
    key = lambda row: sorted(row.items())  # noqa: E731
    assert sorted(merged, key=key) == sorted(every, key=key)
    assert [p.row for p in split()[1]] == [p.row for p in held_out]
    assert [p.row for p in held_out] != every[:5]
    with pytest.raises(ValueError, match=r"split_validation_size=0.01: holds out 0 of 20 rows"):
        split(split_validation_size=0.01)


def test_validation_is_the_held_out_rows_then_its_own_dataset(tokenizer, make_config):
    train = {**SUMS, "split_validation_size": 0.25}
    validation = {**SUMS, "low": 50, "high": 59, "num_rows": 3, "env_name": "math"}
    _, prompts = load_prompt_sets(make_config(train, validation=validation), tokenizer)
    assert [p.index for p in prompts] == list(range(8))
    assert [p.row["a"] >= 50 for p in prompts] == [False] * 5 + [True] * 3
    assert prompts.environment_names == ("last_number", "math")
    assert prompts[-1].row == prompts[7].row
    assert [p.index for p in prompts[5:7]] == [5, 6]
    assert [p.row for p in prompts.unencoded()] == [p.row for p in prompts]


def test_keys_without_a_meaning_in_grpo_are_refused_by_name(tokenizer, make_config):
    for key, value in (("add_bos", True), ("add_eos", False), ("add_generation_prompt", False)):
        with pytest.raises(ValueError, match=f"data.{key}={value}"):
            load_prompt_sets(make_config(SUMS, **{key: value}), tokenizer)
    with pytest.raises(ValueError, match=r"data.train.processor='sft_processor'"):
        load_prompt_sets(make_config({**SUMS, "processor": "sft_processor"}), tokenizer)
    with pytest.raises(ValueError, match=r"data.train.env_name=None"):
        load_prompt_sets(make_config(SUMS, env_name=None), tokenizer)
    with pytest.raises(ValueError, match=r"data.train=None"):
        load_prompt_sets(make_config(None), tokenizer)
    validation = {**SUMS, "split_validation_size": 0.5}
    with pytest.raises(ValueError, match=r"data.validation.split_validation_size=0.5"):
        load_prompt_sets(make_config(SUMS, validation=validation), tokenizer)


def test_template_that_refuses_a_role_is_named(tokenizer, make_config, tmp_path, monkeypatch):
    (tmp_path / "s.txt").write_text("Be brief.")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    config = make_config({**SUMS, "system_prompt_file": str(tmp_path / "s.txt")})
    with pytest.raises(ValueError, match=r"policy.tokenizer.chat_template.*system and user.*no system role"):
        load_prompt_sets(config, tokenizer)


def test_list_of_datasets_is_refused_in_grpo(tokenizer, make_config):
    with pytest.raises(
        ValueError, match=r"^data.train=\[generated_sums, generated_sums\]: GRPO draws its prompts from"
    ):
        load_prompt_sets(make_config([SUMS, SUMS]), tokenizer)
    with pytest.raises(ValueError, match=r"^data.validation=\[generated_sums\]: GRPO draws its prompts from one"):
        load_prompt_sets(make_config(SUMS, validation=[SUMS]), tokenizer)


def test_prompts_are_drawn_by_the_loader_in_the_order_of_their_indices(tokenizer, make_config):
    prompts, _ = load_prompt_sets(make_config(SUMS), tokenizer)
    loader = RowLoader([prompts], 6, key="grpo.num_prompts_per_step", seed=3, shuffle=False)
    assert [prompt.index for prompt in next(loader)] == [0, 1, 2, 3, 4, 5]
    assert next(loader)[0].token_ids == prompts[6].token_ids
