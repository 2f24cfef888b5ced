"""SQuAD: {"context": "...", "question": "...", "answers": {"text": ["..."]}}. The context is the system message."""

from __future__ import annotations

from nemo_rl_lora.data.own_rows import answered
from nemo_rl_lora.data.rows import Message, Row


def squad_answer(row: Row) -> list[Message]:
    row.refuse_file("system_prompt_file", "with squad, whose context is the system message")
    answers = row.value("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise row.error(f"has answers={answers!r}, and answers.text needs a text")
    context = {"role": "system", "content": row.text("context")}
    return [context, *answered(row, row.text("question"), texts[0])]
