"""Rollouts from a file, in place of an engine: for tests and for benchmarks of training alone.

Contract: a JSONL file, one group a line, `{"prompt_index": 3, "prompt_token_ids": [..], "completions":
[{"token_ids": [..], "logprobs": [..], "text": "..", "finish_reason": "stop"}, ..]}`. A request is served by its
prompt's index, the groups of one prompt in the order of the file; a request that the file does not answer is an
error. `sync_weights` accepts anything and reads nothing, as its receipt says (no digest, no verdict): the completions
are said to come from the version last synced.
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.generation.protocol import Ticket
from nemo_rl_lora.types import Completion, CompletionGroup, GroupRequest, SyncReceipt, WeightsRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PATH_KEY = "policy.generation.replay_path"


def write_replay(path: Path, groups: Iterable[CompletionGroup]) -> None:
    """Write groups for `ReplayGeneration`. The file is replaced."""
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            completions = [
                {
                    "token_ids": list(completion.token_ids),
                    "logprobs": list(completion.logprobs),
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                }
                for completion in group.completions
            ]
            row = {
                "prompt_index": group.prompt.index,
                "prompt_token_ids": list(group.prompt.token_ids),
                "completions": completions,
            }
            file.write(json.dumps(row) + "\n")


class ReplayGeneration:
    """Serves the groups of a file. Text that a line does not give is decoded by the tokenizer."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._rows: dict[int, deque[Mapping[str, Any]]] = defaultdict(deque)
        for row in _read_rows(path):
            self._rows[row["prompt_index"]].append(row)
        self._version = 0
        self._tickets = 0
        self._groups: dict[Ticket, tuple[GroupRequest, Mapping[str, Any]]] = {}
        logger.info("generation: replaying %d groups of %s", sum(map(len, self._rows.values())), path)

    def submit(self, request: GroupRequest) -> Ticket:
        prompt = request.prompt
        rows = self._rows[prompt.index]
        if not rows:
            raise ValueError(
                f"{_PATH_KEY}={str(self._path)!r}: holds no further group of prompt {prompt.index}. "
                "Replay with the data, seed and number of steps of the run that was recorded."
            )
        # Training and validation prompts may share an index, so the tokens decide between them.
        row = next((row for row in rows if tuple(row["prompt_token_ids"]) == tuple(prompt.token_ids)), None)
        if row is None:
            raise ValueError(
                f"{_PATH_KEY}={str(self._path)!r}: prompt {prompt.index} has other tokens than those recorded. "
                "Replay with the same data, tokenizer and template."
            )
        if len(row["completions"]) != request.num_completions:
            raise ValueError(
                f"{_PATH_KEY}={str(self._path)!r}: {len(row['completions'])} completions of prompt {prompt.index}, "
                f"and {request.num_completions} are asked for. Set grpo.num_generations_per_prompt to match."
            )
        self._tickets += 1
        rows.remove(row)
        self._groups[Ticket(self._tickets)] = (request, row)
        return Ticket(self._tickets)

    def collect(self, tickets: Sequence[Ticket]) -> list[CompletionGroup]:
        return [self._group(*self._groups.pop(ticket)) for ticket in tickets]

    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        start = time.perf_counter()
        self._version = ref.version
        return SyncReceipt(
            version=ref.version,
            mode=ref.mode,
            digest=None,
            num_tensors=len(ref.manifest),
            num_bytes=0,
            seconds=time.perf_counter() - start,
        )

    def close(self) -> None:
        self._groups.clear()

    def _group(self, request: GroupRequest, row: Mapping[str, Any]) -> CompletionGroup:
        skip = request.sampling.skip_special_tokens
        completions = tuple(
            Completion(
                token_ids=tuple(completion["token_ids"]),
                logprobs=tuple(completion["logprobs"]),
                versions=((len(completion["token_ids"]), self._version),),
                text=completion["text"]
                if "text" in completion
                else str(self._tokenizer.decode(completion["token_ids"], skip_special_tokens=skip)),
                finish_reason=completion["finish_reason"],
            )
            for completion in row["completions"]
        )
        return CompletionGroup(prompt=request.prompt, completions=completions)


def check_replay(path: Path) -> int:
    """Number of groups in a file of rollouts; ValueError where it is missing or a line of it is wrong."""
    return len(_read_rows(path))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{_PATH_KEY}={str(path)!r}: no such file. Give the JSONL file of a recorded rollout.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        problem = _problem(line, rows)
        if problem:
            raise ValueError(f"{_PATH_KEY}={str(path)!r}: line {number}: {problem}. Record the rollouts again.")
    return rows


def _problem(line: str, rows: list[dict[str, Any]]) -> str | None:
    """What is wrong with a line; a good one is appended to `rows`."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not JSON ({error})"
    if not isinstance(row, dict):
        return "is not an object"
    missing = [key for key in ("prompt_index", "prompt_token_ids", "completions") if key not in row]
    if missing:
        return f"lacks {missing}"
    for completion in row["completions"]:
        lacking = [key for key in ("token_ids", "logprobs", "finish_reason") if key not in completion]
        if lacking:
            return f"a completion lacks {lacking}"
        if len(completion["token_ids"]) != len(completion["logprobs"]):
            return f"{len(completion['token_ids'])} tokens and {len(completion['logprobs'])} logprobs"
    rows.append(row)
    return None
