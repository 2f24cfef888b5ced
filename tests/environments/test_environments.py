import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.environments.registry import check_prompts, make_environment, make_environments
from nemo_rl_lora.types import Prompt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "rewards"


def prompt_of(environment="mine", index=0, text="ask", **row):
    return Prompt(index=index, token_ids=(1,), text=text, row=row, environment=environment)


def environment_of(name, **block):
    return make_environment(name, EnvConfig.model_validate({name: block}))


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


def gym_prompt(index=0):
    from nemo_rl_lora.config.data import DatasetConfig
    from nemo_rl_lora.environments.reasoning_gym import generate_gym_rows

    section = {"dataset_name": "reasoning_gym", "task": "chain_sum", "seed": 3, "size": 4}
    rows = list(generate_gym_rows(DatasetConfig(**section), "data.train"))
    return prompt_of("reasoning_gym", index, **rows[index])


def test_reasoning_gym_scores_with_the_tasks_own_scorer():
    environment, prompt = environment_of("reasoning_gym"), gym_prompt(1)
    numbers = prompt.row["metadata"]["expression"]
    right, wrong = str(eval(numbers)), str(eval(numbers) + 1)
    texts = [right, f"I think <answer>{right}</answer>, yes", wrong, f"<answer>{wrong}</answer>"]
    environment.check([prompt])
    scores = environment.score([prompt] * 4, texts)
    assert scores.rewards == (1.0, 1.0, 0.0, 0.0)
    assert scores.metrics == {"reasoning_gym_scorer_errors": 0.0}


def test_scorer_that_fails_gives_nothing_and_is_counted(monkeypatch):
    from nemo_rl_lora.environments import reasoning_gym

    class Task:
        def score_answer(self, answer, entry):
            return float(answer)

    prompt = gym_prompt()
    monkeypatch.setattr(reasoning_gym, "make_task", lambda *args: Task())
    environment = environment_of("reasoning_gym")
    scores = environment.score([prompt] * 3, ["0.25", "no number", "nan"])
    assert scores.rewards == (0.25, 0.0, 0.0)
    assert scores.metrics == {"reasoning_gym_scorer_errors": 2.0}


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
    assert scores.metrics == {"math_verify_timeouts": 0.0}


def test_endless_verification_costs_its_time_and_is_counted_while_others_score(math_environment):
    prompts = [prompt_of(answer="7")] * 4
    math_environment.score(prompts, ["7"] * 4)  # started
    start = time.monotonic()
    scores = math_environment.score(prompts, ["7", "\\boxed{(10^{10^{9}}) \\mod 11}", "8", "7"])
    assert scores.rewards == (1.0, 0.0, 0.0, 1.0)
    assert scores.metrics == {"math_verify_timeouts": 1.0}
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
    for worker in math_environment._workers:
        if worker._process is not None:
            os.kill(worker._process.pid, 9)
            worker._process.wait()
    assert math_environment.score([prompt_of(answer="7")] * 4, ["7"] * 4).rewards == (1.0,) * 4


def test_math_row_without_an_answer_is_named(math_environment):
    for row in ({}, {"answer": "  "}):
        with pytest.raises(ValueError, match="env.math: row 3 has answer="):
            math_environment.check([prompt_of(index=3, **row)])


def test_verification_process_imports_no_torch():
    program = (
        "import sys; from nemo_rl_lora.environments.math_worker import verify; verify('1', '1');"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


# reward functions of one's own


def own(tmp_path, source, reference="reward"):
    (tmp_path / "mine.py").write_text(source)
    return environment_of("mine", reward_function=f"{tmp_path / 'mine.py'}:{reference}")


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
        ("return float('nan')", "returned nan for row 7 and the completion 'text'"),
        ("return None", "returned None for row 7"),
        ("return row['absent']", r"raised KeyError \('absent'\) for row 7"),
    ],
)
def test_reward_that_is_no_number_and_function_that_raises_name_the_row(tmp_path, body, message):
    environment = own(tmp_path, f"def reward(prompt, completion, row):\n    {body}\n")
    with pytest.raises(ValueError, match=message):
        environment.score([prompt_of(index=7)], ["text"])


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


def test_shipped_example_scores_word_counts():
    environment = environment_of("words", reward_function=f"{EXAMPLES / 'word_count.py'}:reward")
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
