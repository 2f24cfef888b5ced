"""The fp32 masters that a policy trains, and AdamW over them: what both backends do alike after the backward pass.

Contract: a step is refused before anything moves where the loss or the gradient is not finite; learning rate and
weight decay follow from the step alone; moments go out and come in as fp32 tensors beside their master. This module
knows no names, no files and no other process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nemo_rl_lora.config.optimizer_settings import AdamSettings
from nemo_rl_lora.run.memory import while_weights_move


class MasterAdam(torch.optim.AdamW):
    """AdamW over masters, with its schedules. `num_steps` is what a checkpoint stores beside the moments."""

    def __init__(self, masters: Sequence[nn.Parameter], settings: AdamSettings) -> None:
        super().__init__(
            [{"params": list(masters)}],  # a group may be empty: a pipeline stage without an adapter
            lr=settings.lr_at(0),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay_at(0),
            foreach=settings.foreach,
            fused=_runs_fused(masters, settings),
        )
        self._masters = list(masters)
        self._settings = settings
        self.num_steps = 0

    def move(self, loss: float, norm: Tensor, lr: float | None = None) -> tuple[float, float]:
        """One step from the masters' gradients: the gradient's norm before clipping, and the learning rate.

        `norm` is their L2 norm over all processes; `lr` None: what the schedule says of the step that this one is,
        which is right where a step of the run is one of the optimizer. FloatingPointError
        before the optimizer moves.
        """
        read = float(norm)
        if not (math.isfinite(loss) and math.isfinite(read)):
            raise FloatingPointError(
                f"policy.train_step: loss {loss} and gradient norm {read} of optimizer step {self.num_steps} "
                "are not finite. The optimizer has not moved: lower policy.optimizer.kwargs.lr, or look at the batch."
            )
        if self._settings.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._masters, self._settings.max_grad_norm, norm)
        lr = self._settings.lr_at(self.num_steps) if lr is None else lr
        for group in self.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._settings.weight_decay_at(self.num_steps)
        with while_weights_move():
            self.step()
        self.num_steps += 1
        return read, lr

    def moments_of(self, master: nn.Parameter) -> tuple[Tensor, Tensor]:
        """(exp_avg, exp_avg_sq): zeros before the first step."""
        state = self.state.get(master)
        if not state:
            return torch.zeros_like(master, dtype=torch.float32), torch.zeros_like(master, dtype=torch.float32)
        return state["exp_avg"], state["exp_avg_sq"]

    def set_moments(self, master: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Copies of these, as they are after `num_steps` steps."""
        on = master.device if self.defaults["fused"] else None  # a fused kernel reads it on the device
        self.state[master] = {
            "step": torch.tensor(float(self.num_steps), device=on),
            "exp_avg": first.to(master.device, master.dtype, copy=True),
            "exp_avg_sq": second.to(master.device, master.dtype, copy=True),
        }


def _runs_fused(masters: Sequence[nn.Parameter], settings: AdamSettings) -> bool | None:
    """One kernel for all masters where they are on a GPU, unless the settings say how: a loop has 14 for each."""
    if settings.fused is not None or settings.foreach:
        return settings.fused
    return True if masters and all(master.is_cuda for master in masters) else None
