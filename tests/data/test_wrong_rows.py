"""Wrong rows and wrong keys of SFT and DPO data: each is refused, and what is said is here word for word."""

import pytest

from nemo_rl_lora.data.conversations import load_conversation_sets
from nemo_rl_lora.data.preferences import load_preference_sets

USER = {"role": "user", "content": "Hi"}
SAYS = {"role": "assistant", "content": "Yes"}
CHAT = {"messages": [USER, SAYS]}
OWN = {"input": "Hi", "output": "Yes"}
PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
RANKED = [{"rank": 0, "completion": [SAYS]}, {"rank": 1, "completion": [{**SAYS, "content": "No"}]}]
SQUAD = {"context": "c", "question": "q", "answers": {"text": ["a"]}}
MARKED = {"is_correct": True, "solution": "1"}
WRONG = {"is_correct": False, "solution": "2"}
SOLVED = {"question": "q", "6b_finetuning": MARKED, "6b_verification": MARKED, "175b_finetuning": MARKED}


# (id, dataset name, the first row, the second row, what is said)
WRONG_CONVERSATIONS = [
    ("no messages", "openai_format", CHAT, {"chat": []},
     "data.train.chat_key: line 2 of {file} has no 'messages'; its keys are chat. Correct the row or the key."),
    ("messages that are a text", "openai_format", CHAT, {"messages": "Hi"},
     "data.train.chat_key: line 2 of {file} has messages='Hi', and a list of messages is needed. Correct the row."),
    ("a message that is a text", "openai_format", CHAT, {"messages": [USER, "Yes"]},
     "data.train.chat_key: message 1 of line 2 of {file} is 'Yes', and an object with role and content is needed. "
     "Correct the row."),
    ("a role that nobody has", "openai_format", CHAT, {"messages": [USER, {**SAYS, "role": "robot"}]},
     "data.train.chat_key: message 1 of line 2 of {file} has role='robot', and there are system, user, assistant, "
     "tool. Correct the row."),
    ("tool calls that are a text", "openai_format", CHAT, {"messages": [USER, {**SAYS, "tool_calls": "f()"}]},
     "data.train.chat_key: message 1 of line 2 of {file} (assistant) has tool_calls='f()', and a list of objects is "
     "needed. Correct the row."),
    ("no content and no tool calls", "openai_format", CHAT, {"messages": [USER, {**SAYS, "content": None}]},
     "data.train.chat_key: message 1 of line 2 of {file} (assistant) has content=None, and a text is needed. "
     "Correct the row."),
    ("tools that are no list", "openai_format", CHAT, {**CHAT, "tools": "weather"},
     "data.train.tool_key: line 2 of {file} has tools='weather', which is no JSON (Expecting value). Correct the row."),
    ("an instruction beside the input", "jsonl", OWN, {**OWN, "instruction": "Add."},
     "data.train.input_key='input': line 2 of {file} has 'instruction', too, which would not be read. Set "
     "data.train.dataset_name=alpaca, which asks the instruction and then the input, or rename the key that is not to "
     "be asked."),
    ("content that is a list", "openai_format", CHAT, {"messages": [{**USER, "content": ["Hi"]}, SAYS]},
     "data.train.chat_key: message 0 of line 2 of {file} (user) has content=['Hi'], and a text is needed. "
     "Correct the row."),
    ("an empty answer", "tulu3_sft_mixture", CHAT, {"messages": [USER, {**SAYS, "content": " "}]},
     "data.train.chat_key: message 1 of line 2 of {file} (assistant) has content=' ', and a text is needed. "
     "Correct the row."),
    ("no turn of the assistant", "openai_format", CHAT, {"messages": [USER]},
     "data.train: line 2 of {file} has no turn of the assistant, so there is nothing to learn. Correct the row."),
    ("a turn of the assistant first", "openai_format", CHAT, {"messages": [SAYS, USER, SAYS]},
     "data.train: line 2 of {file} begins with a turn of the assistant, which answers nothing. Correct the row."),
    ("a turn of the user last", "openai_format", CHAT, {"messages": [USER, SAYS, USER]},
     "data.train: line 2 of {file} ends with a turn of the user, which nothing answers. Correct the row."),
    ("a row without its output", "jsonl", OWN, {"input": "Hi", "answer": "Yes"},
     "data.train.output_key: line 2 of {file} has no 'output'; its keys are input, answer. "
     "Correct the row or the key."),
    ("an output that is a number", "ResponseDataset", OWN, {"input": "Hi", "output": 4},
     "data.train.output_key: line 2 of {file} has output=4, and a text is needed. Correct the row."),
    ("squad without an answer", "squad", SQUAD, {**SQUAD, "answers": {"text": []}},
     "data.train.data_path: line 2 of {file} has answers={{'text': []}}, and answers.text needs a text. "
     "Correct the row."),
    ("gsm8k without its solution", "gsm8k", {"question": "q", "answer": "a"}, {"question": "q"},
     "data.train.data_path: line 2 of {file} has no 'answer'; its keys are question. Correct the row or the key."),
]  # fmt: skip

WRONG_PAIRS = [
    ("three completions", "PreferenceDataset", {"context": [USER], "completions": RANKED},
     {"context": [USER], "completions": [1, 2, 3]},
     "data.train.data_path: line 2 of {file} has completions=[1, 2, 3], and a list of two is needed, each with rank "
     "and completion. Correct the row."),
    ("a tie", "PreferenceDataset", {"context": [USER], "completions": RANKED},
     {"context": [USER], "completions": [RANKED[0], RANKED[0]]},
     "data.train.data_path: line 2 of {file} has the ranks [0, 0], and two different numbers are needed. "
     "Correct the row."),
    ("a completion by the user", "PreferenceDataset", {"context": [USER], "completions": RANKED},
     {"context": [USER], "completions": [RANKED[0], {"rank": 1, "completion": [USER]}]},
     "data.train.data_path: line 2 of {file} has completion that ends with a turn of the user, and the assistant's is "
     "needed. Correct the row."),
    ("two equal answers", "BinaryPreferenceDataset", PAIR, {**PAIR, "rejected": "Yes"},
     "data.train: line 2 of {file} has two equal answers, and one must be better. Correct the row."),
    ("no rejected answer", "BinaryPreferenceDataset", PAIR, {"prompt": "Hi", "chosen": "Yes"},
     "data.train.rejected_key: line 2 of {file} has no 'rejected'; its keys are prompt, chosen. "
     "Correct the row or the key."),
    ("a prompt that the assistant ends", "BinaryPreferenceDataset", PAIR, {**PAIR, "prompt": [USER, SAYS]},
     "data.train.prompt_key: line 2 of {file} has a prompt that ends with a turn of the assistant, and the user's is "
     "needed. Correct the row."),
    ("two prompts", "Tulu3Preference", {"chosen": [USER, SAYS], "rejected": [USER, {**SAYS, "content": "No"}]},
     {"chosen": [USER, SAYS], "rejected": [{**USER, "content": "Ho"}, {**SAYS, "content": "No"}]},
     "data.train.data_path: line 2 of {file} has rejected with another prompt than the pair's. Correct the row."),
    ("no prompt", "Tulu3Preference", {"chosen": [USER, SAYS], "rejected": [USER, {**SAYS, "content": "No"}]},
     {"chosen": [SAYS], "rejected": [SAYS]},
     "data.train.data_path: line 2 of {file} has chosen with one message, and a prompt is needed before it. "
     "Correct the row."),
    ("a preference in words", "HelpSteer3", {"context": [USER], "response1": "a", "response2": "b",
     "overall_preference": 1}, {"context": [USER], "response1": "a", "response2": "b", "overall_preference": "first"},
     "data.train.data_path: line 2 of {file} has overall_preference='first', and a number is needed. Correct the row."),
    ("a solver without a solution", "gsm8k_solutions", {**SOLVED, "175b_verification": WRONG},
     SOLVED,
     "data.train.data_path: line 2 of {file} has no '175b_verification'; its keys are question, 6b_finetuning, "
     "6b_verification, 175b_finetuning. Correct the row or the key."),
    ("a solution without its mark", "gsm8k_solutions", {**SOLVED, "175b_verification": WRONG},
     {**SOLVED, "175b_verification": "1"},
     "data.train.data_path: line 2 of {file} has 175b_verification='1', and is_correct (true or false) and solution "
     "are needed. Correct the row."),
]  # fmt: skip
SKIP = "Or leave such rows out, with data.on_bad_row=skip: of the 2 looked at so far, 1 cannot be used."


@pytest.fixture
def load_sft(make_config, smol):
    def load(train, template="default", **options):
        return load_conversation_sets(
            make_config(train, **{"env_name": None, **options}), smol(template), only_unmask_final=False
        )

    return load


@pytest.fixture
def load_dpo(make_config, smol):
    def load(train, template="default", **options):
        return load_preference_sets(make_config(train, **{"env_name": None, **options}), smol(template))

    return load


def said(load, *arguments, **options):
    with pytest.raises(ValueError) as error:
        load(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"),
    [row[1:] for row in WRONG_CONVERSATIONS],
    ids=[r[0] for r in WRONG_CONVERSATIONS],
)
def test_wrong_conversation_is_named_by_its_line(load_sft, write, name, right, wrong, message):
    load_sft({"dataset_name": name, "data_path": write(right)})
    file = write(right, wrong)
    assert said(load_sft, {"dataset_name": name, "data_path": file}) == f"{message.format(file=file)} {SKIP}"


@pytest.mark.parametrize(
    ("name", "right", "wrong", "message"), [row[1:] for row in WRONG_PAIRS], ids=[row[0] for row in WRONG_PAIRS]
)
def test_wrong_pair_is_named_by_its_line(load_dpo, write, name, right, wrong, message):
    load_dpo({"dataset_name": name, "data_path": write(right)})
    file = write(right, wrong)
    assert said(load_dpo, {"dataset_name": name, "data_path": file}) == f"{message.format(file=file)} {SKIP}"


def test_wrong_row_after_the_limit_is_not_looked_at(load_sft, write):
    (rows,), _ = load_sft({"dataset_name": "jsonl", "data_path": write(OWN, {"input": 3}), "max_num_rows": 1})
    assert len(rows) == 1


def test_pairs_that_are_all_too_long_and_pairs_that_are_none_are_refused(load_dpo, write):
    file = write(PAIR)
    section = {"dataset_name": "BinaryPreferenceDataset", "data_path": file}
    assert said(load_dpo, section, max_total=20, max_input_seq_length=64) == (
        "data.train: all 1 pairs are left out, a side being longer than 20 tokens (data.max_input_seq_length=64, "
        "policy.max_total_sequence_length=20). Raise the limits."
    )
    file = write({**SOLVED, "175b_verification": MARKED})
    assert said(load_dpo, {"dataset_name": "gsm8k_solutions", "data_path": file}) == (
        f"data.train: none of the 1 rows of {file} prefers one answer to another. Give other data."
    )


def test_prompt_files_without_a_place_are_refused(load_sft, load_dpo, write, tmp_path):
    (tmp_path / "p.txt").write_text("{}")
    asked = f"data.train.prompt_file='{tmp_path}/p.txt': has no meaning"
    files = {"prompt_file": f"{tmp_path}/p.txt"}
    section = {"dataset_name": "openai_format", "data_path": write(CHAT), **files}
    assert said(load_sft, section) == (
        f"{asked} with dataset_name='openai_format', whose rows are whole chats. Set it to null."
    )
    file = write({**PAIR, "prompt": [USER]})
    assert said(load_dpo, {"dataset_name": "BinaryPreferenceDataset", "data_path": file, **files}) == (
        f"{asked} where prompts are messages, as in line 1 of {file}. Set it to null."
    )
    section = {"dataset_name": "squad", "data_path": write(SQUAD), "system_prompt_file": f"{tmp_path}/p.txt"}
    assert said(load_sft, section) == (
        f"data.train.system_prompt_file='{tmp_path}/p.txt': has no meaning with squad, whose context is the system "
        "message. Set it to null."
    )


def test_keys_of_another_algorithm_are_refused(load_sft, load_dpo, write):
    own = {"dataset_name": "jsonl", "data_path": write(OWN)}
    pair = {"dataset_name": "BinaryPreferenceDataset", "data_path": write(PAIR, name="pairs.jsonl")}
    assert said(load_sft, own, env_name="math") == (
        "data.train.env_name='math': has no meaning in SFT, which scores nothing. Remove it."
    )
    assert said(load_sft, [own], validation=[own, {**own, "env_name": "math"}]).startswith(
        "data.validation.1.env_name='math': has no meaning in SFT"
    )
    assert said(load_sft, own, on_long_prompt="drop") == (
        "data.on_long_prompt='drop': SFT cuts the end of a row that is too long. Remove it."
    )
    assert said(load_dpo, pair, on_long_prompt="drop") == (
        "data.on_long_prompt='drop': DPO leaves pairs that are too long out. Remove it."
    )
    assert said(load_dpo, pair, add_bos=True) == (
        "data.add_bos=True: has no meaning in DPO, where the chat template alone decides which special tokens there "
        "are. Remove it."
    )
    assert said(load_dpo, pair, add_generation_prompt=False) == (
        "data.add_generation_prompt=False: DPO always ends the prompt with the assistant's header. Remove it."
    )
    assert said(load_sft, {**own, "processor": "math_hf_data_processor"}) == (
        "data.train.processor='math_hf_data_processor': is no processor of SFT. Use 'sft_processor' or null."
    )
    assert said(load_dpo, {**pair, "processor": "sft_processor"}) == (
        "data.train.processor='sft_processor': is no processor of DPO. Set it to null."
    )
    assert said(load_sft, own, validation=[{**own, "split_validation_size": 0.5}]) == (
        "data.validation.0.split_validation_size=0.5: only training rows can be held out for validation. Remove it."
    )


def test_template_that_does_not_suit_is_refused_at_the_start(load_sft, load_dpo, write):
    pair = {"dataset_name": "BinaryPreferenceDataset", "data_path": write(PAIR, name="pairs.jsonl")}
    header = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    assert said(load_dpo, pair, template=header) == (
        f"policy.tokenizer.chat_template: in line 1 of {pair['data_path']} the tokens of the prompt are not how prompt "
        "and answer begin. Give a template that writes the prompt's end (add_generation_prompt) as it begins an answer."
    )
    own = {"dataset_name": "jsonl", "data_path": write(OWN)}
    refuses = "{{ raise_exception('only one turn') }}"
    assert said(load_sft, own, template=refuses) == (
        f"policy.tokenizer.chat_template: cannot render the roles user and assistant of line 1 of {own['data_path']} "
        "(only one turn). Change the template, or set system_prompt_file to null if it takes no system message."
    )
    assert said(load_sft, own, template=header).startswith(
        "policy.tokenizer.chat_template: where turn 1 of the assistant's 1 stands in line 1 of"
    )
