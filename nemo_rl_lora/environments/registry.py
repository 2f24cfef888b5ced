"""From a name in the configuration to an environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.types import Prompt


def make_environment(name: str, config: EnvConfig) -> Environment:
    """The environment that `env.<name>` describes. Raises ValueError for a name that is not there."""
    if name == "math" and config.math.math_verify_impl == "dapo_math_verify":
        from nemo_rl_lora.environments.answer_line import AnswerLineEnvironment

        return AnswerLineEnvironment()
    if name == "math":
        from nemo_rl_lora.environments.math import MathEnvironment

        return MathEnvironment(config.math.num_workers, config.math.timeout_seconds)
    if name == "last_number":
        from nemo_rl_lora.environments.last_number import LastNumberEnvironment

        return LastNumberEnvironment()
    if name == "reasoning_gym":
        from nemo_rl_lora.environments.reasoning_gym import ReasoningGymEnvironment

        return ReasoningGymEnvironment(config.reasoning_gym.num_workers, config.reasoning_gym.timeout_seconds)
    if name in config.reward_functions:
        from nemo_rl_lora.environments.reward_function import RewardFunctionEnvironment

        return RewardFunctionEnvironment(name, config.reward_functions[name])
    raise ValueError(
        f"env_name={name!r}: there is no such environment. Known: {', '.join(config.names)}. For your own set "
        f"env.{name}.reward_function=FILE.py:FUNCTION."
    )


def make_environments(names: Iterable[str], config: EnvConfig) -> dict[str, Environment]:
    """One environment for each name."""
    return {name: make_environment(name, config) for name in dict.fromkeys(names)}


def code_digests(environments: Mapping[str, Environment]) -> dict[str, str]:
    """Of the user's code that scores, by the key that names it."""
    digests = {f"env.{name}": environment.code_digest() for name, environment in environments.items()}
    return {key: digest for key, digest in digests.items() if digest is not None}


def check_prompts(environments: Mapping[str, Environment], prompts: Iterable[Prompt]) -> None:
    """Let each prompt's environment check its row. Raises ValueError for the first that cannot be scored."""
    for name, some in groupby(prompts, key=lambda prompt: prompt.environment):
        environments[name].check(some)
