import json
import logging
from pathlib import Path

import datasets
import pytest

from nemo_rl_lora.data import checked_rows, seen_rows
from nemo_rl_lora.data.catalog import names_for
from nemo_rl_lora.data.chat import stop_clock
from nemo_rl_lora.data.conversations import load_conversation_sets
from nemo_rl_lora.data.seen_rows import recipe_of
from nemo_rl_lora.models.source import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARED_GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture
def load(make_config, smol):
    """load(train, ...) -> (training sets, validation sets), in SmolLM2's template."""

    def load_sets(train, *, only_unmask_final=False, template="default", **options):
        config = make_config(train, env_name=None, **options)
        return load_conversation_sets(config, smol(template), only_unmask_final=only_unmask_final)

    return load_sets


def written(smol, example):
    """The text of an example, and that of its learned tokens."""
    tokenizer = smol()
    learned = [token for token, mark in zip(example.token_ids, example.loss_mask, strict=True) if mark]
    return tokenizer.decode(example.token_ids), tokenizer.decode(learned)


def turns(*contents, system=SMOL_SYSTEM):
    """ChatML of a system message and of turns of user and assistant."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    return "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, [system, *contents], strict=False)
    )


SQUAD = {"context": "Paris is in France.", "question": "Where is Paris?", "answers": {"text": ["France", "in France"]}}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
SUM = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
PROBLEM = {"problem": "2 + 2?", "generated_solution": "Four.", "expected_answer": "4"}


@pytest.mark.parametrize(
    ("section", "row", "text", "learned"),
    [
        ({"dataset_name": "openai_format"}, {"messages": CHAT}, turns("Hi", "Hello", system="Be kind."), "Hello"),
        ({"dataset_name": "openai_format", "chat_key": "c"}, {"c": CHAT[1:]}, turns("Hi", "Hello"), "Hello"),
        ({"dataset_name": "tulu3_sft_mixture"}, {"id": 3, "messages": CHAT[1:]}, turns("Hi", "Hello"), "Hello"),
        ({"dataset_name": "jsonl"}, {"input": "Hi", "output": "Ho"}, turns("Hi", "Ho"), "Ho"),
        (
            {"dataset_name": "ResponseDataset", "input_key": "q", "output_key": "a"},
            {"q": "Hi", "a": "Ho"},
            turns("Hi", "Ho"),
            "Ho",
        ),
        (
            {"dataset_name": "squad"},
            SQUAD,
            turns("Where is Paris?", "France", system="Paris is in France."),
            "France",
        ),
        ({"dataset_name": "gsm8k"}, SUM, turns("1 + 1?", SUM["answer"]), SUM["answer"]),
        ({"dataset_name": "OpenMathInstruct-2"}, PROBLEM, turns("2 + 2?", "Four."), "Four."),
        ({"dataset_name": "OpenMathInstruct-2", "output_key": "expected_answer"}, PROBLEM, turns("2 + 2?", "4"), "4"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_row_of_each_dataset_becomes_its_conversation(load, smol, tmp_path, section, row, text, learned, suffix):
    path = tmp_path / f"train.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    for data_path in (path, tmp_path):  # the file, and the directory with a file of the split's name
        (rows,), validation = load({**section, "data_path": str(data_path)})
        assert validation == []
        assert written(smol, rows[0]) == (text, f"{learned}<|im_end|>\n")
        assert (rows[0].source, rows[0].num_cut_tokens) == (section["dataset_name"], 0)


def test_only_unmask_final_learns_the_last_answer(load, smol, write):
    chat = [*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]
    section = {"dataset_name": "openai_format", "data_path": write({"messages": chat})}
    assert written(smol, load(section)[0][0][0])[1] == "Hello<|im_end|>\nBye<|im_end|>\n"
    assert written(smol, load(section, only_unmask_final=True)[0][0][0])[1] == "Bye<|im_end|>\n"


def test_prompt_file_and_system_prompt_file_are_put_around_questions(load, smol, write, tmp_path):
    (tmp_path / "p.txt").write_text("Q: {} ({{}})\n")
    (tmp_path / "s.txt").write_text("Reply.\n")
    section = {"dataset_name": "gsm8k", "data_path": write(SUM), "prompt_file": str(tmp_path / "p.txt")}
    (rows,), _ = load({**section, "system_prompt_file": str(tmp_path / "s.txt")})
    assert written(smol, rows[0])[0] == turns("Q: 1 + 1? ({})", SUM["answer"], system="Reply.")


def test_system_prompt_file_is_for_chats_without_a_system_message(load, smol, write, tmp_path):
    (tmp_path / "s.txt").write_text("Reply.")
    path = write({"messages": CHAT}, {"messages": CHAT[1:]})
    (rows,), _ = load(
        {"dataset_name": "openai_format", "data_path": path, "system_prompt_file": str(tmp_path / "s.txt")}
    )
    texts = [written(smol, row)[0] for row in rows]
    assert texts == [turns("Hi", "Hello", system="Be kind."), turns("Hi", "Hello", system="Reply.")]


def test_other_keys_of_a_message_reach_the_template(load, smol, write):
    chat = [CHAT[1], {"role": "assistant", "content": "4", "thought": "2 + 2"}]
    template = "{% for m in messages %}[{{ m.thought }}]{{ m.content }}{% endfor %}"
    (rows,), _ = load({"dataset_name": "openai_format", "data_path": write({"messages": chat})}, template=template)
    assert written(smol, rows[0])[0] == "[]Hi[2 + 2]4"


@pytest.mark.parametrize("limits", [{"max_total": 50}, {"max_total": 512, "max_input_seq_length": 50}])
def test_long_row_is_cut_at_the_smaller_limit_and_says_by_how_much(load, write, limits):
    section = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "one two three " * 30})}
    (rows,), _ = load(section, max_total=512)
    (cut,), _ = load(section, **limits)
    whole = rows[0]
    assert (len(cut[0].token_ids), len(cut[0].loss_mask)) == (50, 50)
    assert cut[0].token_ids == whole.token_ids[:50]
    assert cut[0].num_cut_tokens == len(whole.token_ids) - 50


def test_rows_whose_answers_are_cut_away_are_left_out_and_counted(load, write, caplog):
    short, long = {"input": "Hi", "output": "Ho"}, {"input": "Hi " * 60, "output": "Ho"}
    section = {"dataset_name": "jsonl", "data_path": write(short, long, short)}
    with caplog.at_level(logging.WARNING):
        (rows,), _ = load(section, max_total=50)
    assert [sum(row.loss_mask) > 0 for row in rows] == [True, True]
    limits = "50 tokens (data.max_input_seq_length=None, policy.max_total_sequence_length=50)"
    assert f"data.train: 1 of 3 rows are left out, nothing of their answers being within {limits}" in caplog.text
    with pytest.raises(ValueError, match="data.train: all 3 rows are left out, nothing of their answers"):
        load(section, max_total=5)
    _, (validation,) = load(section, validation={**section, "data_path": write(long, name="v.jsonl")}, max_total=50)
    assert len(validation) == 0
    assert "data.validation: all 1 rows are left out" in caplog.text


def test_keys_of_the_data_block_change_the_tokens(load, smol, write, sft_template):
    section = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "Ho"})}
    tokenizer = smol(sft_template)
    keys = {"add_bos": True, "add_eos": True, "add_generation_prompt": False}
    (rows,), _ = load(section, template=sft_template, **keys)
    text = f"{tokenizer.bos_token} Question: Hi Answer: Ho{tokenizer.eos_token}"
    assert written(smol, rows[0]) == (text, f" Answer: Ho{tokenizer.eos_token}")


def test_mixture_has_a_set_for_each_dataset_with_its_rate_and_name(load, smol, write):
    own = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "Ho"}, name="a.jsonl")}
    other = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "Hey"}, name="b.jsonl"), "rate": 0.5}
    chat = {"dataset_name": "openai_format", "data_path": write({"messages": CHAT}, name="c.jsonl")}
    train, validation = load([own, other, chat], validation=[chat, own])
    assert [(rows.name, rows.rate) for rows in train] == [("jsonl", 1.0), ("jsonl#2", 0.5), ("openai_format", 1.0)]
    assert [rows[0].source for rows in train] == ["jsonl", "jsonl#2", "openai_format"]
    assert written(smol, train[1][0])[1] == "Hey<|im_end|>\n"
    assert [rows.name for rows in validation] == ["openai_format", "jsonl"]


def test_held_out_rows_and_training_rows_are_all_rows_and_follow_the_seed(load):
    def split(**section):
        gsm8k = {"dataset_name": "gsm8k", "data_path": "examples/data/gsm8k", "split": "test", **section}
        (train,), (held_out,) = load({"split_validation_size": 0.25, **gsm8k}, max_total=512)
        return [row.token_ids for row in train], [row.token_ids for row in held_out]

    (every,), _ = load({"dataset_name": "gsm8k", "data_path": "examples/data/gsm8k", "split": "test"}, max_total=512)
    train, held_out = split()
    assert (len(train), len(held_out)) == (48, 16)
    assert sorted(train + held_out) == sorted(row.token_ids for row in every)
    assert split() == (train, held_out)
    assert split(seed=43) != (train, held_out)


def test_validation_is_what_is_held_out_and_then_its_own_sets(load, write):
    rows = [{"input": f"q{i}", "output": f"a{i}"} for i in range(8)]
    train = {"dataset_name": "jsonl", "data_path": write(*rows), "split_validation_size": 0.25}
    validation = {"dataset_name": "jsonl", "data_path": write(*rows[:3], name="v.jsonl")}
    _, sets = load([train, {**train, "dataset_name": "ResponseDataset"}], validation=validation)
    assert [(rows.name, len(rows)) for rows in sets] == [("jsonl", 2), ("ResponseDataset", 2), ("jsonl#2", 3)]


def test_set_is_a_sequence(load, write):
    rows = [{"input": f"q{i}", "output": f"a{i}"} for i in range(5)]
    (found,), _ = load({"dataset_name": "jsonl", "data_path": write(*rows), "max_num_rows": 4})
    assert len(found) == 4
    assert [row.token_ids for row in found[1:3]] == [found[1].token_ids, found[2].token_ids]
    assert found[-1] == found[3]
    assert len(list(found)) == 4


@pytest.mark.parametrize("name", names_for("dpo"))
def test_dataset_of_another_algorithm_is_refused_with_what_there_is(load, name):
    with pytest.raises(ValueError) as error:
        load({"dataset_name": name, "data_path": "absent.jsonl"})
    assert str(error.value) == (
        f"data.train.dataset_name='{name}': holds no conversations for SFT. Use one of {', '.join(names_for('sft'))}."
    )


@pytest.mark.skipif(not SHARED_GSM8K.is_dir(), reason="the GSM8K files are not beside the project")
def test_every_row_of_the_real_gsm8k_learns_its_whole_answer(load, smol):
    (train,), _ = load({"dataset_name": "gsm8k", "data_path": str(SHARED_GSM8K), "split": "test"}, max_total=4096)
    rows = [json.loads(line) for line in (SHARED_GSM8K / "test.jsonl").read_text().splitlines()]
    assert len(train) == len(rows) == 1319
    for example, row in zip(train, rows, strict=True):
        assert written(smol, example)[1] == row["answer"] + "<|im_end|>\n"


CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": {"c": "P"}}}],
}
TOOL_CHAT = [
    {"role": "user", "content": "Weather?"},
    CALLS,
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None, []])
@pytest.mark.parametrize("kind", ["jsonl", "content left out", "parquet"])
def test_tool_calls_are_learned_where_the_template_has_them(load, smol, tmp_path, tools, kind):
    chat = [{key: value for key, value in m.items() if kind != "content left out" or value} for m in TOOL_CHAT]
    row, path = {"messages": chat, "tools": tools}, tmp_path / ("rows.parquet" if kind == "parquet" else "rows.jsonl")
    if kind == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps(row) + "\n")
    (rows,), _ = load({"dataset_name": "openai_format", "data_path": str(path)}, template=TOOL_TEMPLATE)
    calls = '[{"function": {"name": "weather", "arguments": {"c": "P"}}}]'
    expected = smol(TOOL_TEMPLATE).apply_chat_template(TOOL_CHAT, tools=TOOLS if tools else None, tokenize=False)
    assert ("<|im_start|>system" in expected) is bool(tools)
    assert written(smol, rows[0]) == (expected, f"{calls}<|im_end|>\nSunny.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "row", "what"),
    [
        (
            TOOL_TEMPLATE.replace("tools", "other"),
            {"messages": TOOL_CHAT[:1] + TOOL_CHAT[3:], "tools": TOOLS},
            "the tools",
        ),
        (TOOL_TEMPLATE.replace("m.tool_calls", "m.x"), {"messages": TOOL_CHAT}, "the tool_calls"),
        (
            TOOL_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
            {"messages": TOOL_CHAT},
            "all messages of the role tool",
        ),
        ("default", {"messages": TOOL_CHAT}, "the tool_calls"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(load, write, template, row, what):
    with pytest.raises(ValueError, match=f"^policy.tokenizer.chat_template: does not write {what} of line 1 of"):
        load({"dataset_name": "openai_format", "data_path": write(row)}, template=template)


SYSTEM_CHAT = [{"role": "system", "content": "Hi"}, *CHAT[1:]]  # what the user says too


@pytest.mark.parametrize(
    ("left_out", "chat", "role"),
    [
        ("m.role == 'system'", SYSTEM_CHAT, "system"),
        ("m.role == 'system' and not loop.first", [*SYSTEM_CHAT, CHAT[0], *CHAT[1:]], "system"),
        ("m.role == 'user' and loop.index > 2", [*CHAT, *CHAT[1:]], "user"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused(load, write, left_out, chat, role):
    template = TOOL_TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages %}{% if not (" + left_out + ") %}"
    )
    section = {"dataset_name": "openai_format", "data_path": write({"messages": chat})}
    with pytest.raises(ValueError, match=f"does not write all messages of the role {role} of line 1 of"):
        load(section, template=template.replace("{% endfor %}", "{% endif %}{% endfor %}"))


def test_a_system_prompt_that_the_template_leaves_out_is_refused(load, write, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.")
    section = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "Ho"})}
    template = TOOL_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    load(section, template=template)
    with pytest.raises(ValueError, match="does not write all messages of the role system of line 1 of"):
        load({**section, "system_prompt_file": str(tmp_path / "system.txt")}, template=template)


@pytest.mark.parametrize("as_text", [False, True])
def test_half_a_character_in_the_tools_is_named(load, write, as_text):
    tools = [{"name": "f", "description": "a\ud83d"}]
    row = {"messages": CHAT[1:], "tools": json.dumps(tools) if as_text else tools}
    with pytest.raises(ValueError, match=r"line 1 of .* holds '\\ud83d', half of a character"):
        load({"dataset_name": "openai_format", "data_path": write(row)}, template=TOOL_TEMPLATE)


def test_rows_are_looked_at_again_where_the_text_of_a_prompt_file_has_changed(load, write, tmp_path, monkeypatch):
    monkeypatch.setattr(checked_rows, "_SECONDS_WORTH_KEEPING", -1.0)
    monkeypatch.setattr(seen_rows, "cache_directory", lambda: tmp_path / "cache")
    section = {"dataset_name": "jsonl", "data_path": write({"input": "Hi", "output": "Ho"})}
    files = {name: str(tmp_path / f"{name}.txt") for name in ("prompt_file", "system_prompt_file")}

    def digest(pattern, system):
        for file, text in zip(files.values(), (pattern, system), strict=True):
            Path(file).write_text(text)
        return load({**section, **files})[0][0].digest

    texts = [("Say {}", "Be brief."), ("Tell {}", "Be brief."), ("Say {}", "Be long.")]
    assert len({digest(*one) for one in texts}) == 3
    assert len({digest(*one) for one in texts}) == 3
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 3


def test_what_was_seen_of_rows_depends_on_the_time_that_their_template_writes(smol_path):
    def recipe(moment):
        tokenizer = load_tokenizer(smol_path, "{{ strftime_now('%Y') }}")
        stop_clock(tokenizer, moment)
        return recipe_of(tokenizer)

    assert recipe("2024-01-01T00:00:00") == recipe("2024-01-01T00:00:00") != recipe("2025-01-01T00:00:00")


def test_tools_are_read_under_tool_key_or_not_at_all(load, smol, write):
    section = {"dataset_name": "openai_format", "data_path": write({"messages": TOOL_CHAT, "functions": TOOLS})}
    for key, shown in (("functions", True), ("tools", False), (None, False)):
        (rows,), _ = load({**section, "tool_key": key}, template=TOOL_TEMPLATE)
        assert ('"type": "function"' in smol().decode(rows[0].token_ids)) is shown


def test_a_template_that_cannot_join_null_is_blamed_and_not_the_program(load, write):
    template = "{% for m in messages %}{{ m.role + ' ' + m.content }}{{ m.tool_calls }}{% endfor %}"
    with pytest.raises(ValueError, match="^policy.tokenizer.chat_template: cannot render the roles user and assistant"):
        load({"dataset_name": "openai_format", "data_path": write({"messages": TOOL_CHAT})}, template=template)


def test_alpaca_rows_are_asked_whole(load, smol, write):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Name a fruit.", "input": "", "output": "Fig"},
        {"instruction": "Name a fruit.", "output": "Fig"},
    ]
    (read,), _ = load({"dataset_name": "alpaca", "data_path": write(*rows)})
    said = [smol().decode(example.token_ids).split("<|im_start|>user\n")[1] for example in read]
    fig = "Name a fruit.<|im_end|>\n<|im_start|>assistant\nFig<|im_end|>\n"
    assert said == ["Add.\n\n2 and 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n", fig, fig]
