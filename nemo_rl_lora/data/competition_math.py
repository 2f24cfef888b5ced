"""Problems of mathematics competitions with their final answers: DeepScaleR and AIME 2024, plain and as DAPO has them.

A row: {"problem": "Find the ...", "answer": "204"}; DAPO's: {"prompt": [{"role": "user", "content": "Solve ..."}],
"reward_model": {"ground_truth": "34"}}, whose prompt has its instructions in it.
"""

from __future__ import annotations

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.data.rows import Question, Row


def competition_question(row: Row) -> Question:
    problem = row.text("problem")
    return Question(problem, {"question": problem, "answer": row.value("answer")})


def dapo_question(row: Row) -> Question:
    messages, scored = row.value("prompt"), row.value("reward_model")
    try:
        problem, answer = messages[0]["content"], scored["ground_truth"]
    except (TypeError, LookupError):
        raise row.error(
            f"has prompt={show(messages)} and reward_model={show(scored)}, and [{{content: ...}}] and "
            f"{{ground_truth: ...}} are needed"
        ) from None
    return Question(problem, {"question": problem, "answer": answer})
