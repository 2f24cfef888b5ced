"""What models are asked in an evaluation: the prompts, the environments that score, and how completions are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.config.evaluation import AskedConfig
from nemo_rl_lora.config.generation import EngineConfig
from nemo_rl_lora.data.prompts import load_prompts
from nemo_rl_lora.data.row_sets import RunConfig
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.environments.registry import check_prompts, make_environments
from nemo_rl_lora.evaluation.ask import RolloutParams
from nemo_rl_lora.types import Prompt, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every model is asked."""

    prompts: Sequence[Prompt]  # [P]
    environments: Mapping[str, Environment]
    params: RolloutParams
    num_prompts_at_once: int

    @property
    def num_completions(self) -> int:
        """Of each prompt: G."""
        return self.params.num_completions

    @property
    def longest_prompt(self) -> int:
        """In tokens."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    def describe(self) -> str:
        """Prompts, completions, sampling and environments, for a plan."""
        sampling = self.params.sampling
        how = "greedy" if sampling.temperature == 0 else f"at temperature {sampling.temperature:g}"
        return (
            f"{len(self.prompts)} prompts, {self.num_completions} completion(s) each, {how}, of at most "
            f"{sampling.max_new_tokens} tokens; scored by {', '.join(self.environments)}"
        )

    def close(self) -> None:
        """End the environments."""
        for environment in self.environments.values():
            environment.close()


def load_task(
    section: DatasetConfig,
    key: str,
    tokenizer: Any,
    *,
    config: RunConfig,
    asked: AskedConfig,
    engine: EngineConfig,
    sampling: SamplingParams,
) -> Task:
    """The dataset at `key`, every row checked. ValueError names the first thing that is wrong."""
    prompts = load_prompts(section, tokenizer, config=config, key=key)
    environments = make_environments(prompts.environment_names, config.env)
    check_prompts(environments, prompts.unencoded())
    params = RolloutParams(
        num_completions=asked.num_tests_per_prompt,
        sampling=sampling,
        max_sequence_length=config.policy.max_total_sequence_length,
        seed=asked.seed,
        purpose="evaluation",
    )
    return Task(
        prompts=prompts[: asked.max_num_prompts],
        environments=environments,
        params=params,
        # twice what is decoded at once: rows that end early make room for others
        num_prompts_at_once=max(1, 2 * engine.max_concurrent_sequences // asked.num_tests_per_prompt),
    )
