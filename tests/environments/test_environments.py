import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.environments.registry import check_prompts, make_environment, make_environments
from tests.environments.own_rewards import environment_of, own, prompt_of, wait_until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "rewards"


# last_number


@pytest.mark.parametrize(
    ("text", "reward"),
    [("7", 1.0), ("3 + 4 = 7.", 1.0), ("7 or 8", 0.0), ("-7", 0.0), ("", 0.0), ("seven", 0.0), ("007", 1.0)],
)
def test_last_integer_is_compared(text, reward):
    assert environment_of("last_number").score([prompt_of(answer=7)], [text]).rewards == (reward,)


def test_endless_digits_are_no_answer():
    assert environment_of("last_number").score([prompt_of(answer=7)], ["9" * 100_000]).rewards == (0.0,)


def test_answers_as_text_count_and_rows_without_an_integer_are_named():
    environment = environment_of("last_number")
    assert environment.score([prompt_of(answer=" 1,200 ")], ["so 1200"]).rewards == (1.0,)
    for row in ({}, {"answer": "x"}, {"answer": 1.5}, {"answer": True}):
        with pytest.raises(ValueError, match="env.last_number: row 4 has answer="):
            environment.check([prompt_of(index=4, **row)])


# reasoning_gym


def gym_prompt(index=0, task="chain_sum"):
    from nemo_rl_lora.config.data import DatasetConfig
    from nemo_rl_lora.data.reasoning_gym import generate_gym_rows

    section = {"dataset_name": "reasoning_gym", "task": task, "seed": 3, "size": 4}
    rows = list(generate_gym_rows(DatasetConfig(**section), "data.train"))
    return prompt_of("reasoning_gym", index, **rows[index])


@pytest.fixture(scope="module")
def gym_environment():
    environment = environment_of("reasoning_gym", timeout_seconds=1.0)
    environment.check([gym_prompt()])
    yield environment
    environment.close()


def test_reasoning_gym_scores_with_the_tasks_own_scorer(gym_environment):
    prompt = gym_prompt(1)
    numbers = prompt.row["metadata"]["expression"]
    right, wrong = str(eval(numbers)), str(eval(numbers) + 1)
    texts = [right, f"I think <answer>{right}</answer>, yes", wrong, f"<answer>{wrong}</answer>"]
    scores = gym_environment.score([prompt] * 4, texts)
    assert scores.rewards == (1.0, 1.0, 0.0, 0.0)
    assert scores.metrics == {"reasoning_gym_scorer_errors": 0.0, "reasoning_gym_timeouts": 0.0}


@pytest.mark.slow  # three starts of a process
def test_what_a_scorer_evaluates_cannot_hang_or_end_the_run(gym_environment):
    """This task's scorer hands the answer to `eval`: the first one computes for ever in C, the second one exits."""
    prompt = gym_prompt(task="binary_matrix")
    gym_environment.check([prompt])
    scores = gym_environment.score([prompt] * 3, ["9**9**9", "__import__('os')._exit(0)", prompt.row["answer"]])
    assert scores.rewards == (0.0, 0.0, 1.0)
    assert scores.metrics == {"reasoning_gym_scorer_errors": 1.0, "reasoning_gym_timeouts": 1.0}


@pytest.fixture
def task_of_python(monkeypatch):
    """A scorer in this process, of a task that evaluates what it is given."""
    from nemo_rl_lora.environments import reasoning_gym_worker

    class Task:
        def score_answer(self, answer, entry):
            return float(eval(answer))

    monkeypatch.setattr(reasoning_gym_worker, "make_task", lambda *args: Task())
    monkeypatch.setattr(reasoning_gym_worker.logging, "disable", lambda level: None)
    return reasoning_gym_worker.Scorer({})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.25", (0.25, None)),
        ("no number", (0.0, "error")),
        ("float('nan')", (0.0, "error")),
        ("[0 for _ in iter(int, 1)]", (0.0, "timeout")),
    ],
)
def test_scorer_that_fails_gives_nothing_and_says_how(task_of_python, text, expected):
    assert task_of_python.call((gym_prompt().row, text, 0.2)) == expected


def test_rows_of_another_dataset_are_refused_by_reasoning_gym():
    with pytest.raises(ValueError, match="env.reasoning_gym: row 2 is not of a reasoning-gym task"):
        environment_of("reasoning_gym").check([prompt_of(index=2, answer=3)])


# math


@pytest.fixture(scope="module")
def math_environment():
    environment = environment_of("math", num_workers=2, timeout_seconds=1.0)
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def patient_environment():
    """With a limit that a busy machine does not reach."""
    environment = environment_of("math", num_workers=1, timeout_seconds=30.0)
    yield environment
    environment.close()


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("72", "The answer is 72.", 1.0),
        ("72", "First 10, then \\boxed{72}.", 1.0),
        ("72", "\\boxed{71}", 0.0),
        ("\\frac{1}{2}", "It is $0.5$", 1.0),
        ("x^2 + 2x + 1", "Thus $(x+1)^2$.", 1.0),
        ("1200", "\\boxed{1,200}", 1.0),
        (3, "so $3$", 1.0),
        ("5", "no number at all", 0.0),
        ("5", "", 0.0),
    ],
)
def test_mathematically_equal_answers_count(patient_environment, answer, text, reward):
    scores = patient_environment.score([prompt_of(answer=answer)], [text])
    assert scores.rewards == (reward,)
    assert scores.metrics == {"math_verify_timeouts": 0.0, "math_unreadable_answers": 0.0}


def test_endless_verification_costs_its_time_and_is_counted_while_others_score(math_environment):
    prompts = [prompt_of(answer="7")] * 4
    math_environment.score(prompts, ["7"] * 4)  # started
    start = time.monotonic()
    scores = math_environment.score(prompts, ["7", "\\boxed{(10^{10^{9}}) \\mod 11}", "8", "7"])
    assert scores.rewards == (1.0, 0.0, 0.0, 1.0)
    assert scores.metrics["math_verify_timeouts"] == 1.0
    assert time.monotonic() - start < 10


def test_math_scores_outside_the_main_thread(math_environment):
    results = []
    score = lambda: results.append(math_environment.score([prompt_of(answer="7")], ["7"]))  # noqa: E731
    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert results[0].rewards == (1.0,)


def test_worker_that_died_is_replaced(math_environment):
    math_environment.score([prompt_of(answer="7")] * 4, ["7"] * 4)
    for pid in math_environment._workers.pids():
        os.kill(pid, 9)
    wait_until(lambda: not math_environment._workers.pids())
    assert math_environment.score([prompt_of(answer="7")] * 4, ["7"] * 4).rewards == (1.0,) * 4


def test_math_row_without_an_answer_is_named(math_environment):
    for row in ({}, {"answer": "  "}):
        with pytest.raises(ValueError, match="env.math: row 3 has answer="):
            math_environment.check([prompt_of(index=3, **row)])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("50%", ["\\boxed{50\\%}", "It is 50%.", "50 percent", "50", "0.5", "\\frac{1}{2}"], ["5000%", "5", "0.5%"]),
        ("\\boxed{50\\%}", ["\\boxed{50\\%}", "$50\\%$", "\\boxed{50}"], ["\\boxed{5}"]),
        ("50", ["\\boxed{50\\%}", "50%"], ["\\boxed{5\\%}"]),
        ("0.5", ["50%"], ["50"]),
        ("33 1/3 %", ["\\boxed{33\\frac{1}{3}\\%}"], ["33"]),
        ("7.", ["\\boxed{7}", "so 7.", "\\boxed{7.}"], ["\\boxed{8}"]),
        (
            "1 1/2",
            ["\\boxed{\\frac{3}{2}}", "1.5", "It is 1 1/2.", "\\boxed{1 1/2}"],
            ["1", "1/2", "\\boxed{\\frac12}"],
        ),
        ("-2½", ["-2.5", "\\boxed{-2 1/2}"], ["2.5", "-1.5"]),
        ("1", ["1"], ["\\boxed{1 1/2}", "1 1/2"]),
        ("$12", ["\\boxed{\\$12}", "costs \\$12.", "12 dollars", "$12"], ["\\boxed{1}"]),
        ("1,234", ["\\boxed{1{,}234}", "1234", "\\boxed{1 234}"], ["1", "234"]),
        ("3/4", ["0.75", "\\boxed{\\frac{3}{4}}"], ["3", "4"]),
        ("x=5", ["\\boxed{5}", "$x = 5$", "5"], ["\\boxed{y=5}", "6"]),
        ("(2, 3)", ["\\boxed{(2,3)}", "$(2, 3)$"], ["\\boxed{(3,2)}"]),
        ("7 apples", ["\\boxed{7}", "7 apples", "\\boxed{7 apples}"], ["8 apples"]),
        ("1.5e3", ["1500", "\\boxed{1.5e3}"], ["1.5"]),
        ("so\n#### 9", ["9"], ["3"]),
        ("sqrt(2)/2", ["\\boxed{\\frac{1}{\\sqrt{2}}}", "\\boxed{√2/2}"], ["2"]),
        ("\\text{Friday}", ["\\boxed{\\text{Friday}}"], ["\\boxed{\\text{Monday}}"]),
    ],
)
def test_answers_are_read_as_people_write_them(patient_environment, answer, right, wrong):
    texts = [*right, *wrong]
    scores = patient_environment.score([prompt_of(answer=answer)] * len(texts), texts)
    assert dict(zip(texts, scores.rewards, strict=True)) == {**dict.fromkeys(right, 1.0), **dict.fromkeys(wrong, 0.0)}


def test_answers_that_cannot_be_read_are_counted_and_named_at_the_start(patient_environment, caplog):
    answers = ["7", "seven", "50%", "yes", "abc", "True", "seven", "\\frac{", "\\text{no}"]
    rows = [prompt_of(index=i, answer=answer) for i, answer in enumerate(answers)]
    with caplog.at_level("WARNING"):
        patient_environment.check(rows)
    assert "env.math: 5 of 9 rows have an answer that cannot be read as mathematics" in caplog.text
    assert "row 1 has 'seven'; row 3 has 'yes'; row 5 has 'True'; row 7 has '\\\\frac{'." in caplog.text
    scores = patient_environment.score(rows[:2], ["7", "\\boxed{seven}"])
    assert scores.rewards == (1.0, 0.0)
    assert scores.metrics["math_unreadable_answers"] == 1.0


def test_rows_of_which_no_answer_can_be_read_are_refused(patient_environment):
    rows = [prompt_of(index=i, answer=answer) for i, answer in enumerate(["seven", "eight"])]
    with pytest.raises(ValueError, match="env.math: 2 of 2 rows have an answer that cannot be read"):
        patient_environment.check(rows)


def test_verification_process_imports_no_torch():
    program = (
        "import sys; from nemo_rl_lora.environments.math_worker import verify; verify('1', '1');"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


# reward functions of one's own


def test_own_function_gets_prompt_completion_and_row(tmp_path):
    source = "def reward(prompt, completion, row):\n    return len(prompt) * 100 + len(completion) * 10 + row['k']\n"
    environment = own(tmp_path, source)
    assert environment.name == "mine"
    scores = environment.score([prompt_of(text="abc", k=5), prompt_of(text="", k=6)], ["xy", ""])
    assert scores.rewards == (325.0, 6.0)


def test_function_may_change_its_row_without_harm(tmp_path):
    environment = own(tmp_path, "def reward(p, c, row):\n    return row.pop('k')\n")
    prompt = prompt_of(k=1)
    assert environment.score([prompt, prompt], ["", ""]).rewards == (1.0, 1.0)


def test_function_of_a_package_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "own_rewards").mkdir()
    (tmp_path / "own_rewards" / "short.py").write_text("def reward(p, completion, r):\n    return -len(completion)\n")
    monkeypatch.syspath_prepend(tmp_path)
    environment = environment_of("mine", reward_function="own_rewards.short:reward")
    assert environment.score([prompt_of()], ["abc"]).rewards == (-3.0,)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return float('nan')", "returned nan for row 7 and the completion 'text'. Return a finite number, or None"),
        ("return [1.0]", r"returned \[1.0\] for row 7"),
        ("return '1.0'", "returned '1.0' for row 7"),
        ("return 10 ** 400", "returned 1000.* for row 7"),
        ("return 1j", "returned 1j for row 7"),
        ("import sys; sys.exit(0)", r"mine.py:reward': raised SystemExit \(0\) for row 7 and the completion 'text'"),
        ("import sys; sys.exit('no')", r"raised SystemExit \(no\) for row 7"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("raise type('Halt', (KeyboardInterrupt,), {})('now')", r"raised Halt \(now\) for row 7"),
        ("return row['absent']", r"raised KeyError \('absent'\) for row 7"),
    ],
)
def test_reward_that_is_no_number_and_function_that_raises_name_the_row(tmp_path, body, message):
    environment = own(tmp_path, f"def reward(prompt, completion, row):\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        environment.score([prompt_of(index=7)], ["text"])


@pytest.mark.parametrize(
    "value",
    ["1", "True", "numpy.float32(1)", "numpy.float64(1)", "numpy.int64(1)", "numpy.bool_(True)", "numpy.array(1.0)",
     "torch.tensor(1.0)", "torch.tensor([1.0])", "torch.tensor(True)", "fractions.Fraction(1)", "decimal.Decimal(1)"],
)  # fmt: skip
def test_whatever_is_a_number_is_a_reward(tmp_path, value):
    source = (
        "import decimal, fractions, numpy, torch\n\ndef reward(prompt, completion, row):\n    return " + value + "\n"
    )
    rewards = own(tmp_path, source).score([prompt_of()], ["text"]).rewards
    assert rewards == (1.0,)
    assert type(rewards[0]) is float


def test_none_is_worth_nothing_and_counted_but_never_for_a_whole_rollout(tmp_path):
    environment = own(tmp_path, "def reward(prompt, completion, row):\n    return len(completion) or None\n")
    scores = environment.score([prompt_of()] * 3, ["ab", "", "a"])
    assert scores.rewards == (2.0, 0.0, 1.0)
    assert scores.metrics == {"mine_unscored": 1.0}
    with pytest.raises(ValueError, match="returned None for all 2 completions of a rollout"):
        environment.score([prompt_of()] * 2, ["", ""])


def test_ctrl_c_is_no_failure_of_the_function(tmp_path):
    environment = own(tmp_path, "def reward(prompt, completion, row):\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        environment.score([prompt_of()], ["text"])


def test_neighbours_of_the_file_are_imported_at_once_and_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "first_neighbour.py").write_text("ONE = 1.0\n")
    (tmp_path / "second_neighbour.py").write_text("TWO = 2.0\n")
    source = "from first_neighbour import ONE\n\ndef reward(prompt, completion, row):\n"
    assert own(tmp_path, source + "    from second_neighbour import TWO\n    return ONE + TWO\n").score(
        [prompt_of()], [""]
    ).rewards == (3.0,)


def test_parameters_are_given_by_their_names(tmp_path):
    source = "def reward(*, row, completion, prompt, token_ids):\n    return row['k'] * len(prompt) + token_ids[-1]\n"
    scores = own(tmp_path, source).score([prompt_of(text="abc", k=2)], ["x"], [(5, 9)])
    assert scores.rewards == (15.0,)
    source = "def reward(completion, prompt, row):\n    return float(completion == 'c') + 2 * float(prompt == 'p')\n"
    assert own(tmp_path, source).score([prompt_of(text="p")], ["c"]).rewards == (3.0,)


@pytest.mark.parametrize(
    "signature", ["prompts, completions, **kwargs", "completions, answer, completion_ids", "completions, **kwargs"]
)
def test_functions_of_trl_get_lists(tmp_path, signature):
    answers = "answer" if "answer" in signature else "kwargs['answer']"
    ids = "completion_ids" if "completion_ids" in signature else "kwargs['completion_ids']"
    source = f"import numpy\n\ndef reward({signature}):\n    found = zip(completions, {answers}, {ids}, strict=True)\n"
    source += "    return [None if a is None else numpy.float32(float(c == a) + i[0]) for c, a, i in found]\n"
    rows = [prompt_of(index=i, answer=answer) for i, answer in enumerate(["x", "y", None])]
    scores = own(tmp_path, source).score(rows, ["x", "x", "x"], [(10,), (20,), (30,)])
    assert scores.rewards == (11.0, 20.0, 0.0)
    assert scores.metrics == {"mine_unscored": 1.0}


@pytest.mark.parametrize("body", ["return 1.0", "return [1.0]", "return None"])
def test_a_list_function_that_returns_something_else_is_refused(tmp_path, body):
    with pytest.raises(ValueError, match="takes `completions`, a list, and returned .* for 2 of them. Return a list"):
        own(tmp_path, f"def reward(completions, **kwargs):\n    {body}\n").score([prompt_of()] * 2, ["", ""])


def test_functions_of_verl_get_the_expected_answer(tmp_path):
    source = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
    source += "    return {'score': float(solution_str == ground_truth), 'acc': data_source, 'more': extra_info}\n"
    environment = own(tmp_path, source, "compute_score")
    rows = [
        prompt_of(reward_model={"style": "rule", "ground_truth": "x"}, data_source="d", extra_info={"i": 1}),
        prompt_of(ground_truth="x"),
        prompt_of(answer="y"),
    ]
    environment.check(rows)
    assert environment.score(rows, ["x"] * 3).rewards == (1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="takes ground_truth as verl's functions do, and row 4 has neither"):
        environment.check([prompt_of(index=4, label="x")])


@pytest.mark.parametrize("parameters", ["solution_str, ground_truth, extra_info=None", "ground_truth, solution_str"])
def test_scorers_of_verl_without_a_data_source_are_called_by_name(tmp_path, parameters):
    environment = own(tmp_path, f"def reward({parameters}):\n    return float(solution_str == ground_truth)\n")
    assert environment.score([prompt_of(text="ask", answer="x")] * 2, ["x", "y"]).rewards == (1.0, 0.0)


def test_function_that_cannot_be_had_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"env.mine.reward_function='absent.py:f': there is no file"):
        environment_of("mine", reward_function="absent.py:f")
    with pytest.raises(ValueError, match="importing absent_package raised ModuleNotFoundError"):
        environment_of("mine", reward_function="absent_package:f")
    with pytest.raises(ValueError, match="has no function 'reward'. It has: rewrd"):
        own(tmp_path, "def rewrd(p, c, r):\n    return 1.0\n")
    with pytest.raises(ValueError, match=r"called as reward\(prompt, completion, row\), but too many"):
        own(tmp_path, "def reward(completion):\n    return 1.0\n")
    with pytest.raises(ValueError, match="raised SyntaxError"):
        own(tmp_path, "def reward(:\n")
    with pytest.raises(ValueError, match=r"importing .*mine.py raised SystemExit \(0\). Correct the file"):
        own(tmp_path, "import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match="but missing a required argument: 'style'"):
        own(tmp_path, "def reward(prompt, completion, row, style):\n    return 1.0\n")


@pytest.mark.parametrize(
    ("parameters", "name", "gets"),
    [
        ("completion, prompt, answer", "completion", "prompt"),
        ("queries, prompts, labels, **kwargs", "queries", "prompt"),
        ("data_sources, solution_strs, ground_truths, extra_infos=None", "data_sources", "prompt"),
        ("prompt, completion, answer", "answer", "row"),
        ("prompt, response, label", "label", "row"),
        ("p, prompt_text, r", "prompt_text", "completion"),
        ("pred, gold, meta=None", "pred", "prompt"),
        ("prompt, gold_answer, row", "gold_answer", "completion"),
    ],
)
def test_a_parameter_whose_name_says_something_else_than_its_place_is_refused(tmp_path, parameters, name, gets):
    said = rf"called as reward\(prompt, completion, row\), but its parameter '{name}' would get the {gets}\. Give it"
    with pytest.raises(ValueError, match=said):
        own(tmp_path, f"def reward({parameters}):\n    return 1.0\n")


@pytest.mark.parametrize(
    "parameters",
    [
        "question, model_answer, example",
        "p, response, row, *rest",
        "prompt, completion, extra_info",
        "p, c, gold_row",
        "*given",
        "a, b, c",
    ],
)
def test_other_names_are_given_by_position(tmp_path, parameters):
    environment = own(tmp_path, f"def reward({parameters}):\n    return 1.0\n")
    assert environment.score([prompt_of()], ["text"]).rewards == (1.0,)


def test_a_function_that_a_module_makes_when_asked_is_found(tmp_path):
    made = "def __getattr__(name):\n    return lambda prompt, completion, row: 1.0\n"
    environment = own(tmp_path, made)
    assert environment.score([prompt_of()], ["text"]).rewards == (1.0,)


METHODS = """
class Scorer:
    def __init__(self, first=1, second=2, third=3): ...
    def __call__(self, prompt, completion, row): return 1.0
    def method(self, completion, row): return 1.0
    async def waits(self, completion, row): return 1.0
    def bound(self, prompt, completion, row): return 1.0
    @classmethod
    def of_class(cls, prompt, completion, row): return 1.0
    @staticmethod
    def alone(prompt, completion, row): return 1.0
    other = alone
scorer = Scorer()
"""


@pytest.mark.parametrize("reference", ["Scorer.of_class", "Scorer.alone", "Scorer.other", "scorer", "scorer.bound"])
def test_an_object_and_what_needs_none_are_called(tmp_path, reference):
    assert own(tmp_path, METHODS, reference).score([prompt_of()], ["text"]).rewards == (1.0,)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("Scorer", "is a class, and calling it makes an object"),
        ("Scorer.method", "is a method of the class Scorer, called without an object"),
        ("Scorer.waits", "is a method of the class Scorer, called without an object"),
    ],
)
def test_classes_and_methods_without_an_object_are_refused(tmp_path, reference, said):
    with pytest.raises(ValueError, match=f"env.mine.reward_function='.*mine.py:{reference}': {said}"):
        own(tmp_path, METHODS, reference)


@pytest.mark.parametrize("name", ["max", "min"])
def test_what_does_not_tell_its_parameters_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^env.mine.reward_function='builtins:{name}': "):
        environment_of("mine", reward_function=f"builtins:{name}")
    with pytest.raises(ValueError, match="is a method of the class str"):
        environment_of("mine", reward_function="builtins:str.upper")


@pytest.mark.parametrize("parameters", ["completions, solution", "completions, trainer_state, **kwargs"])
def test_a_column_that_no_row_has_is_named_at_the_start(tmp_path, parameters):
    source = f"def reward({parameters}):\n    return [float(bool(a)) for a in solution]\n"
    environment, name = own(tmp_path, source), parameters.split(", ")[1]
    said = rf"^env.mine.reward_function='.*': takes {name}, and no row has such a key; they have answer\. Give"
    with pytest.raises(ValueError, match=said):
        environment.check([prompt_of(answer="x"), prompt_of(answer="y")])


def test_a_column_that_some_rows_have_is_none_for_the_others(tmp_path):
    environment = own(tmp_path, "def reward(completions, solution):\n    return [float(bool(a)) for a in solution]\n")
    rows = [prompt_of(answer="x"), prompt_of(solution="y")]
    environment.check(rows)
    assert environment.score(rows, ["", ""]).rewards == (0.0, 1.0)
    assert environment.score(rows[:1], [""]).rewards == (0.0,)


@pytest.mark.parametrize("file", ["word_count.py", "word_count_program.py"])
def test_shipped_examples_score_word_counts(file):
    environment = environment_of("words", reward_function=f"{EXAMPLES / file}:reward")
    texts = ["one two three four", "one two", "", "a b c d e f g h i"]
    assert environment.score([prompt_of(num_words=4)] * 4, texts).rewards == (1.0, 0.5, 0.0, 0.0)


# names


def test_environments_are_made_once_by_name_and_check_their_own_rows():
    environments = make_environments(["last_number", "math", "last_number"], EnvConfig())
    assert list(environments) == ["last_number", "math"]
    check_prompts(environments, [prompt_of("last_number", answer=1), prompt_of("math", answer="x")])
    with pytest.raises(ValueError, match="env.last_number: row 9"):
        check_prompts(environments, [prompt_of("math", answer="x"), prompt_of("last_number", 9, answer="x")])
    environments["math"].close()


def test_unknown_environment_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"env_name='mth'.*Known: math, last_number, reasoning_gym"):
        make_environment("mth", EnvConfig())
