"""DAPO's comparison of final answers: `env.math.math_verify_impl=dapo_math_verify`."""

import pytest

from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.environments.registry import make_environment
from tests.environments.own_rewards import prompt_of

DAPO = EnvConfig.model_validate({"math": {"math_verify_impl": "dapo_math_verify"}})


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        (34, "So it is 34.\n\nAnswer: 34", 1.0),
        ("34", "answer :  $34$", 1.0),
        ("34", "ANSWER: x = 34", 1.0),
        ("1,000", "Answer: 1000 dollars", 1.0),
        (r"\frac{1}{2}", r"Answer: $\frac12$", 1.0),
        (r"\sqrt{3}", r"Answer: \boxed{\sqrt3}", 1.0),
        (r"90", r"Answer: $90^\circ$", 1.0),
        ("red", r"Answer: \text{red}", 1.0),
        ("5", "Answer: 4\nNo. Answer: 5", 1.0),
        ("4", "Answer: 4\nNo. Answer: 5", 0.0),
        ("34", "34", 0.0),
        ("34", r"\boxed{34}", 0.0),
        ("0.5", r"Answer: \frac{1}{2}", 0.0),
        ("34", "Answer: 34\n" + "." * 300, 0.0),
        ("34", "", 0.0),
        ("[INVALID]", "no answer", 0.0),
    ],
)
def test_the_last_answer_is_compared_in_one_spelling(answer, text, reward):
    assert make_environment("math", DAPO).score([prompt_of("math", answer=answer)], [text]).rewards == (reward,)


def test_a_row_without_an_answer_is_named():
    environment = make_environment("math", DAPO)
    environment.check([prompt_of("math", answer=0)])
    for row in ({}, {"answer": " "}, {"answer": None}):
        with pytest.raises(ValueError, match="env.math: row 4 has answer="):
            environment.check([prompt_of("math", index=4, **row)])
