"""The rows that both sides of an SFT or DPO benchmark train on, in file order, from GSM8K's own files.

SFT: the first rows of train.jsonl, question and answer. DPO: the questions of example_model_solutions.jsonl that have
a right and a wrong solution, the first of each; a pair with a side of more than MAX_TOKENS is left out. Token ids are
those of the model's chat template; the answer has the end of its turn and what the template writes after it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from work import DEFAULT_MODEL

Task = Literal["sft", "dpo"]
MAX_TOKENS = 512
BATCH_ROWS: dict[Task, int] = {"sft": 16, "dpo": 8}  # pairs in DPO
BETA = 0.1
LR = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with one answer (SFT) or a right and a wrong one (DPO)."""

    question: str
    answers: tuple[str, ...]


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both sides have."""
    parser.add_argument("--task", choices=("sft", "dpo"), required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory with GSM8K's files")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a directory or a Hugging Face name")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps; the first one warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights"
    )


def work_rows(task: Task, data: Path, num_steps: int, tokenizer: Any) -> list[Answered]:
    """The rows of so many steps."""
    wanted = num_steps * BATCH_ROWS[task]
    rows = []
    for row in _sft_rows(data) if task == "sft" else _dpo_rows(data):
        if task == "sft" or all(
            sum(map(len, split_ids(tokenizer, row.question, a))) <= MAX_TOKENS for a in row.answers
        ):
            rows.append(row)
        if len(rows) == wanted:
            return rows
    raise ValueError(f"--steps={num_steps}: {data} has {len(rows)} rows, and {wanted} are needed.")


def split_ids(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt with the assistant's header, and of the answer with the end of its turn."""

    def ids(messages: list[dict[str, str]], header: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=header, return_dict=True)["input_ids"]

    asked = [{"role": "user", "content": question}]
    prompt = ids(asked, True)
    whole = ids([*asked, {"role": "assistant", "content": answer}], False)
    assert whole[: len(prompt)] == prompt, "the prompt's tokens are no prefix of the conversation's"
    return prompt, whole[len(prompt) :]


def _sft_rows(data: Path) -> Iterator[Answered]:
    for row in _objects(data / "train.jsonl"):
        yield Answered(question=row["question"], answers=(row["answer"],))


def _dpo_rows(data: Path) -> Iterator[Answered]:
    for row in _objects(data / "example_model_solutions.jsonl"):
        solutions = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
        right = [solution["solution"] for solution in solutions if solution["is_correct"]]
        wrong = [solution["solution"] for solution in solutions if not solution["is_correct"]]
        if right and wrong:
            yield Answered(question=row["question"], answers=(right[0], wrong[0]))


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def step_result(step_seconds: list[float], step_tokens: list[int], losses: list[float]) -> dict[str, Any]:
    """The fields that compare.py reads: tokens (prompts and answers, no padding) of the steps after the first."""
    timed = slice(1, None) if len(step_seconds) > 1 else slice(None)
    return {
        "tokens_per_s": round(sum(step_tokens[timed]) / sum(step_seconds[timed]), 1),
        "step_s_median": round(sorted(step_seconds[timed])[len(step_seconds[timed]) // 2], 3),
        "step_s": [round(seconds, 3) for seconds in step_seconds],
        "trained_tokens_per_step": sum(step_tokens[timed]) / len(step_tokens[timed]),
        "step_tokens": step_tokens,
        "loss": [round(loss, 5) for loss in losses],
    }
