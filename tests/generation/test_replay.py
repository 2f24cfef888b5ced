"""Rollouts served from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.replay import ReplayGeneration, write_replay
from nemo_rl_lora.types import Completion, CompletionGroup, GroupRequest
from tests.generation.engine_inputs import LetterTokenizer, ref, request


def group(asked: GroupRequest, first_token: int, text: str = "as recorded") -> CompletionGroup:
    completions = tuple(
        Completion(
            token_ids=(first_token + g, 4),
            logprobs=(-0.25, -1.5),
            versions=((2, 0),),
            text=text,
            finish_reason="length",
        )
        for g in range(asked.num_completions)
    )
    return CompletionGroup(prompt=asked.prompt, completions=completions)


def open_replay(path: Path) -> ReplayGeneration:
    return ReplayGeneration(path, LetterTokenizer())  # type: ignore[arg-type]


ONE, TWO = request((3, 4), num_completions=2), request((5, 6, 7), num_completions=2)


def test_what_was_written_is_served_by_prompt_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    recorded = [group(ONE, 10), group(TWO, 20), group(ONE, 30)]
    write_replay(path, recorded)
    assert generate(open_replay(path), [TWO, ONE, ONE]) == [recorded[1], recorded[0], recorded[2]]


def test_two_prompts_of_one_index_are_told_apart_by_their_tokens(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    validation = replace(ONE, prompt=replace(ONE.prompt, token_ids=(9,)))
    recorded = [group(ONE, 10), group(validation, 20)]
    write_replay(path, recorded)
    assert generate(open_replay(path), [validation, ONE]) == [recorded[1], recorded[0]]


def test_completions_carry_the_version_last_synced(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_replay(path, [group(ONE, 10)])
    replay = open_replay(path)
    assert replay.sync_weights(ref({}, version=7)).version == 7
    (served,) = generate(replay, [ONE])
    assert served.completions[0].versions == ((2, 7),)


def test_text_that_is_not_recorded_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(
        '{"prompt_index": 2, "prompt_token_ids": [3, 4], "completions": '
        '[{"token_ids": [10, 11], "logprobs": [0, 0], "finish_reason": "stop"}]}\n\n'
    )
    (served,) = generate(open_replay(path), [request((3, 4))])
    assert served.completions[0].text == "+,"


def test_a_request_that_the_file_does_not_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_replay(path, [group(ONE, 10)])
    replay = open_replay(path)
    with pytest.raises(ValueError, match="2 completions of prompt 2, and 1 are asked for"):
        replay.submit(request((3, 4)))
    with pytest.raises(ValueError, match="other tokens"):
        replay.submit(replace(ONE, prompt=replace(ONE.prompt, token_ids=(3, 5))))
    with pytest.raises(ValueError, match="no further group of prompt 3"):
        replay.submit(TWO)
    replay.submit(ONE)
    with pytest.raises(ValueError, match="no further group of prompt 2"):
        replay.submit(ONE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "line 1: is not JSON"),
        ("[]", "line 1: is not an object"),
        ('{"prompt_index": 1}', r"lacks \['prompt_token_ids', 'completions'\]"),
        ('{"prompt_index": 1, "prompt_token_ids": [], "completions": [{"token_ids": []}]}', "a completion lacks"),
        (
            '{"prompt_index": 1, "prompt_token_ids": [], "completions": '
            '[{"token_ids": [1], "logprobs": [], "finish_reason": "stop"}]}',
            "1 tokens and 0 logprobs",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_replay(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_replay(tmp_path / "absent.jsonl")
