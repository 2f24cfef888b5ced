"""`max_num_tokens`: a run ends at the first step that reaches it, wherever it is resumed on the way."""

import json
import re

import pytest

from tests.driver import TinyRun, adapter, same

LONG = {
    "sft": ("sft.max_num_steps=50", "sft.max_num_epochs=50"),
    "dpo": ("dpo.max_num_steps=50", "dpo.max_num_epochs=50"),
    "grpo": ("grpo.max_num_steps=50", "grpo.max_num_epochs=50"),
}


@pytest.fixture(params=LONG)
def tiny(request, tiny_llama, tmp_path):
    return TinyRun(root=tmp_path, model=tiny_llama, algorithm=request.param)


def tokens_of(tiny, experiment=1):
    return [line["total_num_tokens"] for line in tiny.metrics(experiment=experiment)]


def test_a_run_ends_at_the_first_step_that_reaches_it(tiny):
    loop = tiny.algorithm
    free = tiny(*LONG[loop], f"{loop}.max_num_steps=4", "checkpointing.enabled=false")
    assert free.code == 0, free.err
    tokens = tokens_of(tiny)
    budget = int(sum(tokens[:3]))  # step 3 has them exactly
    settings = [*LONG[loop], f"{loop}.max_num_tokens={budget}", f"{loop}.val_at_end=true"]
    ended = tiny(*settings)
    assert ended.code == 0, ended.err
    assert tokens_of(tiny, 2) == tokens[:3]
    assert tiny.steps()[-1] == "step_3"
    assert [line["step"] for line in tiny.metrics("validation", 2)] == [3]
    again = tiny(*settings)
    assert again.code == 0
    assert f"For more steps raise {loop}.max_num_steps and {loop}.max_num_tokens" in again.out
    more = tiny(*LONG[loop], f"{loop}.max_num_tokens={budget + 1}")
    assert more.code == 0, more.err
    assert tokens_of(tiny, 3) == tokens[3:]
    assert tiny.steps()[-1] == "step_4"


def test_a_run_that_is_resumed_on_the_way_ends_where_the_other_does(tiny_sft, tmp_path):
    settings = [*LONG["sft"], "sft.max_num_tokens=200"]
    assert tiny_sft(*settings, f"checkpointing.checkpoint_dir={tmp_path}/whole").code == 0
    assert tiny_sft(*settings, "sft.max_num_steps=2").code == 0
    assert tiny_sft(*settings).code == 0
    (end,) = {path.name for path in (tmp_path / "whole").glob("step_*")} - {"step_2"}
    steps = tmp_path / "whole" / end, tiny_sft.checkpoints / end
    assert same(*map(adapter, steps))
    counters = [json.loads((step / "training_info.json").read_text())["counters"]["num_tokens"] for step in steps]
    assert counters[0] == counters[1] >= 200


def test_the_plan_says_when_it_is_reached(tiny):
    loop, tokens = tiny.algorithm, 8000 if tiny.algorithm == "grpo" else 2000
    settings = [*LONG[loop], f"{loop}.max_num_tokens={tokens}"]
    planned = tiny(*settings, "--plan")
    assert planned.code == 0, planned.out
    said = " ".join(planned.out.split())
    pattern = (
        rf"{loop}.max_num_tokens={tokens} is reached at (?:about step (\d+)|a step from (\d+) to (\d+)), of 50 at most"
    )
    about, earliest, latest = re.search(pattern, said).groups()
    assert tiny(*settings, "checkpointing.enabled=false").code == 0
    num_steps = len(tokens_of(tiny))
    if loop == "grpo":
        assert int(earliest) <= num_steps <= int(latest)
    else:
        assert abs(int(about) - num_steps) <= 1


def test_the_plan_says_when_it_is_not_reached(tiny):
    loop = tiny.algorithm
    planned = tiny(*LONG[loop], f"{loop}.max_num_tokens=1000000000", f"{loop}.max_num_steps=3", "--plan")
    said = " ".join(planned.out.split())
    about = re.search(
        rf"{loop}.max_num_tokens=1000000000 is not reached: the run ends at step 3 \({loop}.max_num_steps or "
        rf"{loop}.max_num_epochs\), with about (\d+)(?: to (\d+))? tokens",
        said,
    )
    assert about is not None, said
    least, most = int(about[1]), int(about[2] or about[1])
    assert (least < most) == (loop == "grpo")
    between = tiny(*LONG[loop], f"{loop}.max_num_tokens={(least + most) // 2}", f"{loop}.max_num_steps=3", "--plan")
    said = " ".join(between.out.split())
    assert ("at the earliest, if at all, of 3 at most" if loop == "grpo" else "at about step 3, of 3 at most") in said


def test_nonsense_is_refused(tiny_sft):
    assert "sft.max_num_tokens=0: " in tiny_sft("sft.max_num_tokens=0").err
