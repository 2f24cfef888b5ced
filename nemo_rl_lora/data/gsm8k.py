"""GSM8K, grade-school problems in words, and solutions that models wrote to them.

A row: {"question": "Ann has 3 apples ...", "answer": "She has <<3+4=7>>7.\\n#### 7"}. The environments `math` and
`last_number` compare with what follows `####`, without thousands separators; SFT learns the whole solution.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.data.own_rows import answered, pair
from nemo_rl_lora.data.rows import Message, Pair, Question, Row

_SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def gsm8k_question(row: Row) -> Question:
    asked, solution = row.text("question"), row.text("answer")
    _, mark, final = solution.rpartition("####")
    if not mark:
        raise row.error("has no '####' before its final answer")
    return Question(asked, {"question": asked, "solution": solution, "answer": final.strip().replace(",", "")})


def gsm8k_solution(row: Row) -> list[Message]:
    return answered(row, row.text("question"), row.text("answer"))


def marked_solutions(row: Row) -> list[Pair]:
    """Correct with incorrect solutions of a question, in the order in which the row has them.

    A row: {"question": "...", "6b_finetuning": {"is_correct": false, "solution": "..."}, ... of each solver}.
    """
    prompt = [row.format.user(row.text("question"))]
    answers: dict[bool, list[tuple[str, Message]]] = {True: [], False: []}
    solutions = {solver: row.value(solver) for solver in _SOLVERS}
    for solver in sorted(solutions, key=list(row.values).index):
        found = solutions[solver]
        if not isinstance(found, dict) or not isinstance(found.get("is_correct"), bool):
            raise row.error(f"has {solver}={show(found)}, and is_correct (true or false) and solution are needed")
        text = replace(row, values=found, place=f"{solver} in {row.place}").text("solution")
        answers[found["is_correct"]].append((solver.partition("_")[0], {"role": "assistant", "content": text}))
    pairs = [
        pair(row, prompt, chosen, rejected, part="same_model" if model == other else "other_model")
        for (model, chosen), (other, rejected) in product(answers[True], answers[False])
        if row.section.pairs != "same_model" or model == other
    ]
    return pairs[:1] if row.section.pairs == "one" else pairs
