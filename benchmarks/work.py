"""The work that both sides of a GRPO benchmark do: sums to ask, how answers are scored, and the run's shape.

Row i of the questions is the same for every side, run and seed, and step s asks rows 8 s .. 8 s + 7, in order. Reward
1.0 where the last integer of a completion is the sum, otherwise 0.0. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_DIM, LORA_ALPHA = 16, 32
NUM_PROMPTS = NUM_COMPLETIONS = 8

_INTEGER = re.compile(r"-?\d+")
_LEAD_IN = (
    "Here is one more easy question for you about two small numbers . Read it with care , take all the time that you "
    "want , and then write down what you think is the right answer to it . It is not hard at all , so do not worry ."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much a run does. `prompt_tokens` None: the questions as they are."""

    name: str
    max_new_tokens: int
    max_total_tokens: int
    prompt_tokens: int | None
    forced_length: bool  # nothing ends a completion before max_new_tokens
    num_steps: int = 5
    seed: int = 0
    lr: float = 0.0


WORKS = {
    "short": Work(name="short", max_new_tokens=32, max_total_tokens=128, prompt_tokens=None, forced_length=False),
    "long": Work(name="long", max_new_tokens=256, max_total_tokens=384, prompt_tokens=64, forced_length=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    text: str
    answer: int


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both sides have."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a directory or a Hugging Face name")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps; the first one warms up")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and of sampling")
    parser.add_argument("--threads", type=int, default=2)


def add_choice_of_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work",
        choices=sorted(WORKS),
        default="short",
        help="short: the questions, at most 32 new tokens; long: prompts of 64 tokens, exactly 256 new tokens",
    )


def work_of(arguments: argparse.Namespace, *, lr: float = 0.0) -> Work:
    """The work that a command line asks for. At lr 0 the policy never moves, so all steps cost the same."""
    name = getattr(arguments, "work", "short")
    return replace(WORKS[name], num_steps=arguments.steps, seed=arguments.seed, lr=lr)


def questions(work: Work, num_tokens: Callable[[str], int]) -> list[Question]:
    """All the run asks, in order. `num_tokens` is the length of a question's prompt, chat template included."""
    made = []
    for a, b in _sums(work.num_steps * NUM_PROMPTS):
        text = f"What is {a} + {b}? Reply with the number only."
        made.append(Question(text=_lengthened(text, work.prompt_tokens, num_tokens), answer=a + b))
    return made


def reward(completion: str, answer: int) -> float:
    found = _INTEGER.findall(completion)
    return float(bool(found) and found[-1] == str(answer))


def prompt_length(tokenizer: Any, text: str) -> int:
    """Tokens of a question as the chat template puts it."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def write_rows(path: Path, asked: Sequence[Question]) -> None:
    """The questions as JSONL: `input` and `answer`."""
    lines = [json.dumps({"input": question.text, "answer": question.answer}) for question in asked]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def link_endless_model(model: Path, directory: Path) -> None:
    """Fill `directory` with links to the files of a model, but with no end-of-sequence token named anywhere."""
    rewritten = {"config.json", "generation_config.json", "tokenizer_config.json"}
    for file in model.iterdir():
        if file.name in rewritten:
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings |= {key: None for key in ("eos_token_id", "eos_token") if key in settings}
            (directory / file.name).write_text(json.dumps(settings), encoding="utf-8")
        elif file.is_file():
            (directory / file.name).symlink_to(file.resolve())


def _sums(count: int) -> Iterator[tuple[int, int]]:
    rng = random.Random(0)
    for _ in range(count):
        yield rng.randint(1, 9), rng.randint(1, 9)


def _lengthened(text: str, prompt_tokens: int | None, num_tokens: Callable[[str], int]) -> str:
    """The question after as many words of a lead-in as bring its prompt to this many tokens."""
    if prompt_tokens is None:
        return text
    words, longer = _LEAD_IN.split(), text
    for count in range(1, len(words) + 1):
        if num_tokens(longer) >= prompt_tokens:
            return longer
        longer = " ".join([*words[:count], text])
    raise ValueError(f"prompt_tokens={prompt_tokens}: the lead-in is too short for this tokenizer. Lengthen it.")
