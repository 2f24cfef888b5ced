"""Rows of one's own: a question with its answer, a chat, two answers of which one is better.

Named datasets whose rows have one of these forms use the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.data.rows import Message, Pair, Question, Row


def own_question(row: Row) -> Question:
    """A row: {"input": "2 + 2?", "output": "4"}, under the names that input_key and output_key give."""
    return _compared(row, _own_input(row))


def _compared(row: Row, question: str) -> Question:
    if row.section.output_key is None:
        return Question(question, row.values)
    return Question(question, {**row.values, "answer": row.value(row.section.output_key, "output_key")})


def own_answer(row: Row) -> list[Message]:
    """The same row, to be learned."""
    return answered(row, _own_input(row), row.text(row.section.output_key or "output", "output_key"))


def _own_input(row: Row) -> str:
    key = row.section.input_key
    other = {"input": "instruction", "instruction": "input"}.get(key)
    if other is not None and row.values.get(other):
        raise ValueError(
            f"{row.format.key}.input_key={key!r}: {row.place} has {other!r}, too, which would not be read. Set "
            f"{row.format.key}.dataset_name=alpaca, which asks the instruction and then the input, or rename the key "
            f"that is not to be asked."
        )
    return row.text(key, "input_key")


def verl_question(row: Row) -> Question:
    """verl's row: {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": {"ground_truth": "4"}}; what is
    expected is the row's `answer`, too."""
    name = row.section.prompt_key
    if isinstance(row.values.get(name), str):
        question = row.text(name, "prompt_key")
    else:
        messages = row.messages(name, "prompt_key")
        if len(messages) != 1 or messages[0]["role"] != "user" or not isinstance(messages[0]["content"], str):
            raise row.error(
                f"has {name}={show(messages)}, and one message of the user with a text is needed", "prompt_key"
            )
        question = messages[0]["content"]
    scored = row.values.get("reward_model")
    expected = scored.get("ground_truth") if isinstance(scored, Mapping) else None
    return Question(question, row.values if expected is None else {**row.values, "answer": expected})


def alpaca_question(row: Row) -> Question:
    """A row: {"instruction": "Add.", "input": "2 and 2", "output": "4"}; the input may be empty or absent."""
    return _compared(row, _alpaca_input(row))


def alpaca_answer(row: Row) -> list[Message]:
    """The same row, to be learned."""
    return answered(row, _alpaca_input(row), row.text(row.section.output_key or "output", "output_key"))


def _alpaca_input(row: Row) -> str:
    instruction = row.text("instruction")
    return f"{instruction}\n\n{row.text('input')}" if str(row.values.get("input") or "").strip() else instruction


def answered(row: Row, question: str, answer: str) -> list[Message]:
    """The conversation of a question and its answer."""
    return [row.format.user(question), {"role": "assistant", "content": answer}]


def chat(row: Row) -> list[Message]:
    """A row: {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}."""
    row.refuse_file("prompt_file", f"with dataset_name={row.section.dataset_name!r}, whose rows are whole chats")
    return row.messages(row.section.chat_key, "chat_key")


def ranked_pair(row: Row) -> list[Pair]:
    """A row: {"context": [messages], "completions": [{"rank": 0, "completion": [message]}, {"rank": 1, ...}]}."""
    completions = row.value("completions")
    is_list = isinstance(completions, list) and all(isinstance(item, dict) for item in completions)
    if not is_list or len(completions) != 2:
        raise row.error(
            f"has completions={show(completions)}, and a list of two is needed, each with rank and completion"
        )
    items = [replace(row, values=item) for item in completions]
    ranks = [item.value("rank") for item in items]
    if not all(isinstance(rank, int | float) for rank in ranks) or ranks[0] == ranks[1]:
        raise row.error(f"has the ranks {ranks!r}, and two different numbers are needed")
    better, worse = sorted(items, key=lambda item: item.values["rank"])
    prompt = asked(row, "context")
    return [pair(row, prompt, answer(better, prompt, "completion"), answer(worse, prompt, "completion"))]


def chosen_pair(row: Row) -> list[Pair]:
    """A row: {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, under names that the dataset's keys give."""
    section = row.section
    prompt = asked(row, section.prompt_key, "prompt_key")
    chosen = answer(row, prompt, section.chosen_key, "chosen_key")
    return [pair(row, prompt, chosen, answer(row, prompt, section.rejected_key, "rejected_key"))]


def asked(row: Row, name: str, key: str = "data_path") -> list[Message]:
    """The messages of a prompt that is a text or messages, before a system prompt."""
    if isinstance(row.values.get(name), str):
        return [row.format.user(row.text(name, key))]
    row.refuse_file("prompt_file", f"where prompts are messages, as in {row.place}")
    messages = row.messages(name, key)
    if messages[-1]["role"] not in ("user", "tool"):
        raise row.error(
            f"has a prompt that ends with a turn of the {messages[-1]['role']}, and the user's is needed", key
        )
    return messages


def answer(row: Row, prompt: Sequence[Message], name: str, key: str = "data_path") -> Message:
    """The answer that stands under `name`: a text, one message, or the whole chat, which then begins as the prompt."""
    if isinstance(row.values.get(name), str):
        return {"role": "assistant", "content": row.text(name, key)}
    *before, found = row.messages(name, key)
    if found["role"] != "assistant":
        raise row.error(f"has {name} that ends with a turn of the {found['role']}, and the assistant's is needed", key)
    texts = [
        [(message["role"], message["content"], message.get("tool_calls")) for message in chat]
        for chat in (before, prompt)
    ]
    if before and texts[0] != texts[1]:
        raise row.error(f"has {name} with another prompt than the pair's", key)
    return found


def pair(row: Row, prompt: list[Message], chosen: Message, rejected: Message, part: str | None = None) -> Pair:
    """Two answers, with the prompt's texts as their cluster."""
    cluster = "\n".join(message["content"] or "" for message in prompt)
    return Pair(
        row=row, prompt=row.format.with_system(prompt), chosen=chosen, rejected=rejected, cluster=cluster, part=part
    )
