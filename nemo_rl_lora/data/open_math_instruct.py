"""OpenMathInstruct-2: {"problem": "...", "generated_solution": "...", "expected_answer": "\\\\frac{1}{2}"}.

`output_key` chooses what is compared (GRPO, `expected_answer`) or learned (SFT, `generated_solution`).
"""

from __future__ import annotations

from nemo_rl_lora.data.own_rows import answered
from nemo_rl_lora.data.rows import Message, Question, Row


def open_math_question(row: Row) -> Question:
    problem = row.text("problem")
    answer = row.value(row.section.output_key or "expected_answer", "output_key")
    return Question(problem, {"question": problem, "answer": answer})


def open_math_solution(row: Row) -> list[Message]:
    problem = row.text("problem")
    return answered(row, problem, row.text(row.section.output_key or "generated_solution", "output_key"))
