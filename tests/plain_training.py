"""Training written out in plain torch, in fp64, to hold real steps against: stock transformers and PEFT give the
log-probabilities of single rows without padding, and AdamW is four lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

BETAS, EPS = (0.8, 0.9), 1e-6


@dataclass(kw_only=True)
class PlainTraining:
    """An adapter on its base. `rates` are the learning rates of the optimizer steps, one by one."""

    base: Path
    adapter: Path
    rates: Sequence[float]
    weight_decay: float
    max_grad_norm: float
    temperature: float = 1.0
    norms: list[float] = field(default_factory=list)  # of the gradients before clipping, of each step

    def __post_init__(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, self.adapter, is_trainable=True).double().eval()
        self._parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._first = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """[answer tokens] fp64"""
        ids = torch.tensor([[*prompt, *answer]])
        values = (self.model(ids).logits[0] / self.temperature).log_softmax(-1)
        return values[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]

    def reference(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            return self.logprobs(prompt, answer)

    def step(self, loss: Tensor) -> None:
        """Clipping by the norm of all gradients, then AdamW (arXiv 1711.05101, algorithm 2)."""
        gradients = dict(zip(self._parameters, torch.autograd.grad(loss, list(self._parameters.values())), strict=True))
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        rate, number = self.rates[len(self.norms)], len(self.norms) + 1
        self.norms.append(norm)
        for name, parameter in self._parameters.items():
            gradient = gradients[name] * min(1.0, self.max_grad_norm / norm)
            first, second = self._first[name], self._second[name]
            first.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient)
            second.mul_(BETAS[1]).add_((1 - BETAS[1]) * gradient.square())
            root = (second / (1 - BETAS[1] ** number)).sqrt()
            with torch.no_grad():
                parameter.mul_(1 - rate * self.weight_decay)
                parameter.sub_(rate * first / (1 - BETAS[0] ** number) / (root + EPS))

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Under the names of PEFT's files."""
        return {name.replace(".default", ""): p.detach().clone() for name, p in self._parameters.items()}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        names = {name: name.replace(".default", "") for name in self._parameters}
        return {names[name]: (self._first[name], self._second[name]) for name in names}


def assert_moved_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-3) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].double() - tensor).norm() <= bound * tensor.norm(), name
