"""The `env` block: the environments that score completions, by name.

`math`, `last_number` and `reasoning_gym` are built in and always there; any other name is a reward function of one's
own. A dataset selects one by `env_name`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.errors import did_you_mean


class MathEnvConfig(Section):
    """Compare a completion's final answer with the row's answer."""

    math_verify_impl: Literal["hf_math_verify", "dapo_math_verify"] = "hf_math_verify"
    """hf_math_verify: the last mathematical expression, as mathematics (math-verify); dapo_math_verify: what follows
    the last "Answer:", as text in one spelling, in the driver's process."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Most processes that verify at the same time; never more than there are cores."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time for one completion; beyond it the reward is 0 and the metric `math_verify_timeouts` counts it."""


class LastNumberEnvConfig(Section):
    """Reward 1 where the last integer of a completion is the row's answer."""


class ReasoningGymEnvConfig(Section):
    """The score that the row's reasoning-gym task gives the completion."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Most processes that score at the same time; never more than there are cores."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Time for one completion; beyond it the reward is 0 and the metric `reasoning_gym_timeouts` counts it."""


class RewardFunctionConfig(Section):
    """A reward function of one's own: `def reward(prompt: str, completion: str, row: dict) -> float`, or one as TRL or
    verl calls it (docs/environments.md)."""

    reward_function: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_][\w.]*$")]
    """`path/to/file.py:function` or `package.module:function`."""

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that run the function, where an exit, a crash or a hang of it ends one of them and not the run; 0: it
    runs in the driver's process."""

    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Calls that run at the same time; null: 16 of an async function, else one in each process. A plain function in the
    driver's process runs in so many threads; in workers it runs one call a process."""

    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Time for one call; null: no limit. A plain function needs `num_workers` for it."""

    on_failure: Literal["error"] | Annotated[float, Field(allow_inf_nan=False)] = "error"
    """What a completion is worth on which the function raises, exits, crashes or takes too long, counted in the metrics
    `<name>_exceptions`, `<name>_exits`, `<name>_crashes` and `<name>_timeouts`. `error` ends the run."""

    @model_validator(mode="after")
    def _no_process_is_idle(self) -> RewardFunctionConfig:
        if self.concurrency is not None and self.concurrency < self.num_workers:
            raise ValueError(
                f"concurrency={self.concurrency}: must be num_workers={self.num_workers} or more, which would not all "
                f"be used. Change one of them, or leave concurrency out."
            )
        return self


class EnvConfig(Section):
    """Environments by name."""

    model_config = ConfigDict(extra="allow")  # names are the user's own; each value is a closed RewardFunctionConfig
    __pydantic_extra__: dict[str, RewardFunctionConfig] = Field(init=False)

    math: MathEnvConfig = MathEnvConfig()
    """Mathematical answers."""

    last_number: LastNumberEnvConfig = LastNumberEnvConfig()
    """Integer answers."""

    reasoning_gym: ReasoningGymEnvConfig = ReasoningGymEnvConfig()
    """Rows of the dataset of the same name."""

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, block in values.items():
            own = isinstance(block, RewardFunctionConfig) or (isinstance(block, dict) and "reward_function" in block)
            if name not in cls.model_fields and not own:
                raise ValueError(
                    f"env.{name}: is not built in and has no reward_function. "
                    f"{did_you_mean(str(name), cls.model_fields)}Built in: {', '.join(cls.model_fields)}. "
                    f"For your own set env.{name}.reward_function=FILE.py:FUNCTION."
                )
        return {name: ({} if block is None and name in cls.model_fields else block) for name, block in values.items()}

    @property
    def reward_functions(self) -> dict[str, RewardFunctionConfig]:
        """The environments of one's own, by name."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def names(self) -> tuple[str, ...]:
        """Every environment that a dataset can select."""
        return (*type(self).model_fields, *self.reward_functions)
