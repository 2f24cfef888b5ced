"""Groups that dynamic sampling holds for the next step: trained once, by the ratio to the policy that sampled them."""

import json

import pytest

from nemo_rl_lora.algorithms.surplus_groups import SURPLUS_FILE, SurplusGroup, load_surplus, save_surplus
from nemo_rl_lora.config.load import ConfigError, load_config
from nemo_rl_lora.types import Completion, Prompt

PROMPTS = [Prompt(index=i, token_ids=(1, i), text=f"t{i}", row={"a": i}, environment="math") for i in range(3)]


def sampling(run, *overrides):
    return run(
        f"env.tiny.reward_function={run.root}/rewards.py:reward_of_odd",
        "grpo.use_dynamic_sampling=true",
        "grpo.max_num_epochs=9",
        "policy.optimizer.kwargs.lr=0.01",
        *overrides,
    )


def test_surplus_groups_survive_a_file_bit_for_bit(tmp_path):
    third = 0.1 + 0.2
    completion = Completion(
        token_ids=(5, 6), logprobs=(-third, -1e-30), versions=((2, 7),), text="é\n", finish_reason="length"
    )
    surplus = [
        SurplusGroup(
            prompt=PROMPTS[2],
            completions=(completion, completion),
            rewards=(third, 0.0),
            old_logprobs=((-third, -2.0), (-3.0, -4.0)),
        )
    ]
    save_surplus(tmp_path / SURPLUS_FILE, surplus)

    assert load_surplus(tmp_path / SURPLUS_FILE, PROMPTS) == surplus
    assert load_surplus(tmp_path / "none.json", PROMPTS) == []


def test_surplus_groups_are_trained_in_the_next_step_by_the_ratio_to_the_policy_that_sampled_them(tiny_run):
    keep = ["grpo.batch_multiplier=3", "grpo.keep_surplus_groups=true", "grpo.max_num_steps=3"]
    ended = sampling(tiny_run, *keep)

    assert ended.code == 0, ended.err
    lines = tiny_run.metrics()
    assert lines[0]["num_held_groups"] > 0
    assert lines[0]["num_reused_groups"] == 0
    assert any(line["num_reused_groups"] > 0 for line in lines[1:])
    for before, line in zip([{"num_held_groups": 0}, *lines], lines, strict=False):
        assert line["num_reused_groups"] == min(before["num_held_groups"], 4)
        assert line["global_valid_seqs"] == 16
        # of what was sampled and what was held, all was trained, dropped or is held still
        sampled = 12 * line["num_gen_batches"]
        assert before["num_held_groups"] + sampled == 4 + line["num_discarded_groups"] + line["num_held_groups"]
        assert line["gen_kl_error"] < 1e-9  # the old logprobs are those of the weights that sampled
        is_old = line["num_reused_groups"] > 0
        assert (line["probs_ratio_min"] < 1 - 1e-4 or line["probs_ratio_max"] > 1 + 1e-4) == is_old
    file = tiny_run.checkpoints / "step_3" / SURPLUS_FILE
    assert len(json.loads(file.read_text())) == lines[-1]["num_held_groups"]


def test_enough_held_groups_need_no_rollout(tiny_run):
    keep = ["grpo.batch_multiplier=8", "grpo.keep_surplus_groups=true", "grpo.max_num_steps=2"]
    ended = sampling(tiny_run, *keep)

    assert ended.code == 0, ended.err
    first, second = tiny_run.metrics()
    assert first["num_held_groups"] >= 4
    assert (second["num_gen_batches"], second["num_sampled_tokens"], second["num_reused_groups"]) == (0, 0, 4)
    assert second["reward"] == second["filtered_reward"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grpo.keep_surplus_groups=true"], "there are none, since every group of a rollout is trained"),
        (
            ["grpo.keep_surplus_groups=true", "grpo.use_dynamic_sampling=true", "loss_fn.force_on_policy_ratio=true"],
            "loss_fn.force_on_policy_ratio=true leaves out the ratio",
        ),
        (
            ["grpo.keep_surplus_groups=true", "grpo.use_dynamic_sampling=true", "loss_fn.disable_ppo_ratio=true"],
            "loss_fn.disable_ppo_ratio=true leaves out the ratio",
        ),
    ],
)
def test_holding_groups_without_a_meaning_is_refused(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, "grpo")
    assert said in str(caught.value)
