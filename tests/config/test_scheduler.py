"""The learning-rate schedule as a function of the step, against torch's schedulers stepped one by one."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from nemo_rl_lora.config.load import CONFIG_DIR, load_config
from nemo_rl_lora.config.optimizer import SchedulerConfig, lr_factor

LR = 3e-4
PREFIX = "torch.optim.lr_scheduler."
ADAPTER = TypeAdapter(SchedulerConfig)


def torch_lrs(num_steps: int, specs: list[tuple[str, dict]], milestones: list[int]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedulers = [getattr(torch.optim.lr_scheduler, name)(optimizer, **kwargs) for name, kwargs in specs]
    scheduler = schedulers[0]
    if len(schedulers) > 1:
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones)
    lrs = []
    for _ in range(num_steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


LINEAR = ("LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 20})
CONSTANT = ("ConstantLR", {"factor": 1.0, "total_iters": 10_000_000_000})
HALF = ("ConstantLR", {"factor": 0.5, "total_iters": 7})
COSINE = ("CosineAnnealingLR", {"T_max": 60, "eta_min": 1e-5})
DECAY = ("LinearLR", {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 30})


@pytest.mark.parametrize(
    ("specs", "milestones"),
    [
        ([LINEAR, CONSTANT], [20]),
        ([LINEAR, COSINE], [20]),
        ([LINEAR, CONSTANT, DECAY], [20, 45]),
        ([LINEAR, CONSTANT], [7]),
        ([LINEAR], []),
        ([HALF], []),
        ([COSINE], []),
    ],
)
def test_list_form_equals_torch_at_every_step(specs, milestones) -> None:
    form = [{"name": PREFIX + name, "kwargs": kwargs} for name, kwargs in specs]
    scheduler = ADAPTER.validate_python([*form, {"milestones": milestones}])
    expected = torch_lrs(80, specs, milestones)
    for step, lr in enumerate(expected):
        assert math.isclose(lr_factor(scheduler, step, lr=LR) * LR, lr, rel_tol=0, abs_tol=1e-12), step
    if len(form) == 1:
        single = ADAPTER.validate_python(form[0])
        assert [lr_factor(single, step, lr=LR) for step in range(80)] == [
            lr_factor(scheduler, step, lr=LR) for step in range(80)
        ]


@pytest.mark.parametrize(
    ("short", "specs", "milestones"),
    [
        (
            {"name": "constant", "warmup_steps": 10},
            [("LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 9})],
            [],
        ),
        (
            {"name": "linear", "warmup_steps": 10, "total_steps": 50, "min_lr_ratio": 0.2},
            [
                ("LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 9}),
                ("LinearLR", {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 40}),
            ],
            [10],
        ),
        (
            {"name": "wsd", "warmup_steps": 10, "total_steps": 60, "decay_steps": 15, "min_lr_ratio": 0.1},
            [
                ("LinearLR", {"start_factor": 0.1, "end_factor": 1.0, "total_iters": 9}),
                ("ConstantLR", {"factor": 1.0, "total_iters": 10_000}),
                ("LinearLR", {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 15}),
            ],
            [10, 45],
        ),
    ],
)
def test_short_form_equals_torch_at_every_step(short, specs, milestones) -> None:
    scheduler = ADAPTER.validate_python(short)
    for step, lr in enumerate(torch_lrs(80, specs, milestones)):
        assert math.isclose(lr_factor(scheduler, step) * LR, lr, rel_tol=0, abs_tol=1e-12), step


def test_short_cosine_equals_torch_and_stays_at_its_floor() -> None:
    scheduler = ADAPTER.validate_python({"name": "cosine", "total_steps": 40, "min_lr_ratio": 0.1})
    expected = torch_lrs(41, [("CosineAnnealingLR", {"T_max": 40, "eta_min": 0.1 * LR})], [])
    for step, lr in enumerate(expected):
        assert math.isclose(lr_factor(scheduler, step) * LR, lr, rel_tol=0, abs_tol=1e-12), step
    assert lr_factor(scheduler, 1000) == pytest.approx(0.1, abs=1e-15)


def test_warm_up_never_takes_a_step_of_zero() -> None:
    scheduler = ADAPTER.validate_python({"name": "constant", "warmup_steps": 4})
    assert [lr_factor(scheduler, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_scheduler_is_constant() -> None:
    assert lr_factor(None, 0) == lr_factor(None, 10**9) == 1.0


def test_grpo_base_file_warms_up_over_fifty_steps() -> None:
    scheduler = load_config(CONFIG_DIR / "grpo_math_1B.yaml", [], "grpo").policy.scheduler
    assert lr_factor(scheduler, 0) == pytest.approx(0.1)
    assert lr_factor(scheduler, 25) == pytest.approx(0.55)
    assert lr_factor(scheduler, 50) == lr_factor(scheduler, 10_000) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "constant", "total_steps": 5},
        {"name": "linear"},
        {"name": "wsd", "total_steps": 5},
        {"name": "cosine", "total_steps": 10, "decay_steps": 5},
        {"name": "wsd", "total_steps": 10, "decay_steps": 8, "warmup_steps": 3},
        {"name": "polynomial", "total_steps": 10},
        {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {}},
    ],
)
def test_scheduler_that_does_not_fit_its_name_is_refused(wrong) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)
