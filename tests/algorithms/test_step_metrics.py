"""What a step reports of its microbatches, and of its optimizer steps."""

from nemo_rl_lora.algorithms.algorithm import mean_outputs
from nemo_rl_lora.policy.step import add_metrics
from nemo_rl_lora.types import StepOutput


def test_shares_of_microbatches_add_up_but_for_extremes():
    totals: dict[str, float] = {}
    for share in ((1.0, 2.0, 2.0), (2.0, 1.0, 3.0), (4.0, 1.5, 2.5)):
        add_metrics(totals, dict(zip(("kl", "ratio_min", "ratio_max"), share, strict=True)))
    assert totals == {"kl": 7.0, "ratio_min": 1.0, "ratio_max": 3.0}


def test_metrics_of_optimizer_steps_are_means_but_for_extremes_and_the_learning_rate():
    outputs = [
        StepOutput(
            loss=loss,
            grad_norm=2 * loss,
            lr=3 * loss,
            metrics={"kl": loss, "ratio_min": loss, "ratio_max": loss},
            num_forward_tokens=10,
            num_padding_tokens=int(loss),
            num_loss_tokens=5,
            num_attention_scores=55,
        )
        for loss in (3.0, 1.0, 2.0)
    ]
    assert mean_outputs(outputs) == {
        "kl": 2.0,
        "ratio_min": 1.0,
        "ratio_max": 3.0,
        "loss": 2.0,
        "grad_norm": 4.0,
        "lr": 6.0,
        "num_forward_tokens": 30.0,
        "padding_share": 0.2,
    }
