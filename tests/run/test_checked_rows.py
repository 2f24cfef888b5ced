"""What a run says of its rows before it loads a weight, and of rows that have changed since: by the drivers."""

import json
import math

import pytest

from tests.driver import TinyRun

HALF = "half an emoji: \ud83d"
ROWS = {
    "sft": lambda i, more="": {"input": f"{i} + 1?", "output": f"{i + 1} {more}"},
    "dpo": lambda i, more="": {"prompt": f"{i} + 1?", "chosen": f"{i + 1} {more}", "rejected": "no"},
    "grpo": lambda i, more="": {"input": f"{i} + 1? {more}", "output": str(i + 1)},
}
NAMES = {"sft": "jsonl", "dpo": "BinaryPreferenceDataset", "grpo": "jsonl"}


@pytest.fixture
def run_of(tiny_llama, tmp_path):
    """run_of(algorithm, rows) -> a run that trains and validates on these rows, in their order."""

    def make(algorithm, rows):
        run = TinyRun(root=tmp_path, model=tiny_llama, algorithm=algorithm)
        file = tmp_path / "own.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = f"_override_: true, dataset_name: {NAMES[algorithm]}, data_path: '{file}'"
        data = ["data.shuffle=false", *(f"data.{side}={{{keys}}}" for side in ("train", "validation"))]
        return lambda *overrides: run(*data, *overrides), run, file

    return make


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_row_that_no_tokenizer_takes_is_refused_by_its_line_or_skipped(run_of, algorithm):
    row = ROWS[algorithm]
    start, run, file = run_of(algorithm, [*(row(i) for i in range(6)), row(6, HALF), *(row(i) for i in range(7, 13))])

    ended = start()
    assert ended.code == 2, ended.err
    assert f"data.train: line 7 of {file} holds '\\ud83d', half of a character" in ended.err
    assert "data.on_bad_row=skip" in ended.err
    ended = start("data.on_bad_row=skip", "--plan")
    assert ended.code == 0, ended.out
    assert "12 of" in ended.out or "12 training prompts" in ended.out
    ended = start("data.on_bad_row=skip")
    assert ended.code == 0, ended.err
    assert "1 of 13" in ended.err + ended.out
    assert len(run.metrics(experiment=1)) == 2


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content.lower() if not loop.last else m.content }}{% endfor %}", "be proven"),
        ("{% for m in messages %}{{ m.content + 3 if m.content[20] else m.content }}{% endfor %}", "cannot render"),
        ("{% for m in messages %}{% if m.content == 'A' %}{% generation %}{{ m.content }}{% endgeneration %}"
         "{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "nothing is learned of"),
    ],
)  # fmt: skip
def test_a_later_row_for_which_the_template_does_not_suit_is_found_at_the_start(tiny_sft, template, said):
    """The first row passes, though its roles are the same."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "A"}] * n} for q, n in
            [("a", 1), ("a", 1), ("Aber Doch", 2)]]  # fmt: skip
    rows[2]["messages"][-1]["content"] = "b" * 30
    file = tiny_sft.root / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train={{_override_: true, dataset_name: openai_format, data_path: '{file}'}}"
    ended = tiny_sft(data, "data.validation=null", "policy.train_global_batch_size=1", json_text(template))
    assert ended.code == 2, ended.err
    assert f"line 3 of {file}" in ended.err
    assert said in ended.err


def json_text(template):
    return f"policy.tokenizer.chat_template={json.dumps(template)}"


def test_an_answer_that_is_cut_whole_is_left_out_and_the_run_goes_to_its_end(run_of):
    rows = [{"input": "word", "output": "Yes."} for _ in range(5)]
    rows[4]["input"] = "word " * 60
    start, run, _ = run_of("sft", rows)

    ended = start("policy.train_global_batch_size=1", "sft.max_num_steps=9", "sft.max_num_epochs=1")
    assert ended.code == 0, ended.err
    assert "data.train: 1 of 5 rows are left out, nothing of their answers being within 64 tokens" in ended.err
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]


def test_a_validation_whose_answers_are_all_cut_gives_a_warning_and_no_number(run_of, tmp_path):
    start, run, file = run_of("sft", [ROWS["sft"](i) for i in range(4)])
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"input": "word " * 60, "output": "Yes."}) + "\n")

    ended = start(f"data.validation.data_path={long}", "sft.val_at_end=true", "sft.max_num_steps=1")
    assert ended.code == 0, ended.err
    assert "data.validation: all 1 rows are left out" in ended.err
    assert "so this validation gives no number" in ended.err
    assert run.metrics("validation") == []


def test_of_a_large_set_the_rest_is_checked_as_it_is_drawn(run_of):
    rows = [ROWS["sft"](i) for i in range(12)]
    rows[9]["output"] = HALF
    start, run, file = run_of("sft", rows)

    some = ("data.validation=null", "data.num_checked_rows=4", "sft.max_num_steps=3")
    ended = start(*some)
    assert ended.code == 1, ended.err
    assert f"line 10 of {file} holds" in ended.err
    assert run.steps() == ["step_2"]
    ended = start(*some, "data.on_bad_row=skip")  # as it is advised
    assert ended.code == 0, ended.err
    assert "the next row is used in place of one that cannot be" in ended.err
    assert run.steps() == ["step_2", "step_3"]


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_resume_on_other_rows_is_refused_by_name_or_goes_on(run_of, algorithm):
    row = ROWS[algorithm]
    start, run, file = run_of(algorithm, [row(i) for i in range(12)])
    assert start().code == 0
    file.write_text("".join(json.dumps(row(i + 50)) + "\n" for i in range(12)))

    ended = start(f"{algorithm}.max_num_steps=3")
    assert ended.code == 2, ended.err
    assert f"data.train: the rows, as tokenised, are not those of {run.checkpoints / 'step_2'}" in ended.err
    ended = start(f"{algorithm}.max_num_steps=3", "data.on_change=continue")
    assert ended.code == 0, ended.err
    assert "goes on with the rows as they are now" in ended.err
    assert run.steps() == ["step_2", "step_3"]


def test_reference_logprobs_never_belong_to_other_rows(run_of):
    """At a learning rate of 0 the loss is log 2, whatever the file has become."""
    start, run, file = run_of("dpo", [ROWS["dpo"](i) for i in range(8)])
    still = ("policy.optimizer.kwargs.lr=0", "dpo.max_num_epochs=4", "data.validation=null")
    assert start(*still, "dpo.max_num_steps=2").code == 0
    file.write_text("".join(json.dumps(ROWS["dpo"](i, "or so")) + "\n" for i in range(90, 79, -1)))
    ended = start(*still, "dpo.max_num_steps=4", "data.on_change=continue")
    assert ended.code == 0, ended.err
    assert [line["loss"] for line in run.metrics(experiment=2)] == [pytest.approx(math.log(2), abs=1e-6)] * 2


CLOCK = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ m.content }}<|end|>"
    "{% else %}{{ strftime_now('%H:%M:%S.%f') }} {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_with_a_clock_writes_one_time_in_a_run_and_its_resumes(run_of):
    start, run, _ = run_of("dpo", [ROWS["dpo"](i) for i in range(8)])
    still = (json_text(CLOCK), "dpo.max_num_epochs=3", "policy.optimizer.kwargs.lr=0")
    assert start(*still).code == 0
    ended = start(*still, "dpo.max_num_steps=4")
    assert ended.code == 0, ended.err
    info = json.loads((run.checkpoints / "step_4" / "training_info.json").read_text())
    assert f"reads the clock, which stands at {info['clock']} in this run" in ended.err
    losses = [line["loss"] for experiment in (1, 2) for line in run.metrics(experiment=experiment)]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)] * 4


def test_a_changed_reward_file_is_said(tiny_run):
    assert tiny_run().code == 0
    file = tiny_run.root / "rewards.py"
    file.write_text(file.read_text() + "\n# changed\n")
    ended = tiny_run("grpo.max_num_steps=3")
    assert ended.code == 0, ended.err
    assert "env.tiny.reward_function: the file has changed since" in ended.err


NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}<|end|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("algorithm", "template"), [("sft", NO_END), ("sft", MARKED), ("dpo", NO_END)])
def test_rows_that_teach_no_end_are_said_with_a_remedy_that_helps(run_of, algorithm, template):
    start, _, _ = run_of(algorithm, [ROWS[algorithm](i) for i in range(4)])
    said = "nothing that is learned ends the assistant's turn"
    few = (json_text(template), f"{algorithm}.max_num_steps=1", "checkpointing.enabled=false")
    ended = start(*few)
    assert ended.code == 0, ended.err
    assert f"data.train: in 4 of 4 {'pairs' if algorithm == 'dpo' else 'rows'} {said}" in ended.err
    assert "Set data.add_eos=true, which adds '<|end|>' and learns it" in ended.err
    ended = start(*few, "data.add_eos=true")
    assert ended.code == 0, ended.err
    assert said not in ended.err
