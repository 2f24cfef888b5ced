"""What wrong loss settings of DPO say, word for word."""

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, load_config

WRONG = {
    "dpo.label_smoothing=0.5": "dpo.label_smoothing=0.5: must be less than 0.5. "
    "Correct the value (the schema's default is 0.0).",
    "dpo.label_smoothing=-0.1": "dpo.label_smoothing=-0.1: must be at least 0.0. "
    "Correct the value (the schema's default is 0.0).",
    "dpo.label_smoothing=nan": "dpo.label_smoothing=nan: must be less than 0.5. "
    "Correct the value (the schema's default is 0.0).",
    "dpo.loss_type=ipo dpo.label_smoothing=0.1": "dpo.label_smoothing=0.1: dpo.loss_type='ipo' has no label "
    "smoothing. Set dpo.label_smoothing=0, or train with dpo.loss_type sigmoid or robust.",
    "dpo.loss_type=hinge dpo.label_smoothing=0.2": "dpo.label_smoothing=0.2: dpo.loss_type='hinge' has no label "
    "smoothing. Set dpo.label_smoothing=0, or train with dpo.loss_type sigmoid or robust.",
    "dpo.loss_type=robust": "dpo.loss_type='robust': needs the probability of a wrong mark, and dpo.label_smoothing "
    "is 0. Set dpo.label_smoothing between 0 and 0.5, for example to 0.1, or dpo.loss_type=sigmoid.",
    "dpo.preference_loss_weight=0 dpo.sft_loss_weight=1 dpo.label_smoothing=0.1": "dpo.label_smoothing=0.1: the SFT "
    "loss alone has no label smoothing. Set dpo.label_smoothing=0, or train with dpo.loss_type sigmoid or robust.",
    "dpo.preference_loss_weight=0 dpo.sft_loss_weight=1 dpo.loss_type=ipo": "dpo.loss_type='ipo': "
    "dpo.preference_loss_weight is 0, so no loss of a pair is computed. Leave dpo.loss_type out, or set the weight "
    "above 0.",
    "dpo.preference_loss_weight=0": "dpo.preference_loss_weight=0: dpo.sft_loss_weight is 0 as well, so there is "
    "no loss. Set one of the two above 0.",
    "dpo.reference_policy_kl_penalty=0": "dpo.reference_policy_kl_penalty=0: must be greater than 0.0. "
    "Correct the value (the schema's default is 0.05).",
    "dpo.loss_type=sigmod": "dpo.loss_type='sigmod': must be one of 'sigmoid', 'ipo', 'hinge' or 'robust'. "
    "Did you mean 'sigmoid'?",
    "dpo.sft_loss_weight=-1": "dpo.sft_loss_weight=-1: must be at least 0.0. "
    "Correct the value (the schema's default is 0.0).",
    "dpo.los_type=ipo": "dpo.los_type='ipo': unknown key. Did you mean 'loss_type'? Keys of dpo: label_smoothing, "
    "loss_type, max_num_epochs, max_num_steps, max_num_tokens, preference_average_log_probs, preference_loss_weight, "
    "reference_policy_kl_penalty, seed, sft_average_log_probs, sft_loss_weight, val_at_end, val_at_start, "
    "val_batches, val_global_batch_size, val_micro_batch_size, val_period.",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_wrong_setting_says(overrides: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(CONFIG_DIR / "dpo.yaml", overrides.split(), "dpo")
    assert str(raised.value) == WRONG[overrides]


@pytest.mark.parametrize(
    "overrides",
    [
        "dpo.loss_type=robust dpo.label_smoothing=0.1",
        "dpo.label_smoothing=0.49",
        "dpo.loss_type=ipo",
        "dpo.preference_loss_weight=0 dpo.sft_loss_weight=1",
    ],
)
def test_sound_combination_loads(overrides: str) -> None:
    load_config(CONFIG_DIR / "dpo.yaml", overrides.split(), "dpo")
