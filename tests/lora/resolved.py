"""What an adapter changes in a model."""

import torch

from nemo_rl_lora.lora.targets import LinearModule, resolve_targets


def resolved(model, spec):
    """The modules of the model that the adapter changes."""
    linears = [
        LinearModule(name=name, in_features=m.in_features, out_features=m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    return resolve_targets(spec, linears, tied_head=False, model_label="tiny", config_key="lora")
