"""The run's engine, and which weights of the policy it serves: a sync, and the proof that it arrived.

Contract: whoever samples asks `sync` first. A receipt has to name the version, and the digest of what every engine
holds has to be that of what the policy handed out.
"""

from __future__ import annotations

from pathlib import Path

from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.generation.sync_mode import SyncChoice
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.tensors import combined_digest
from nemo_rl_lora.types import EngineReceipt, SyncReceipt, WeightsRef


class ServedPolicy:
    """An engine that samples from the policy that is trained."""

    def __init__(self, policy: Policy, generation: Generation, choice: SyncChoice) -> None:
        """`choice`: what a sync moves."""
        self.generation = generation
        self._policy, self._choice = policy, choice
        self._receipt: SyncReceipt | None = None  # of the weights that the engine serves

    def receipt_of(self, step: int) -> SyncReceipt | None:
        """The receipt of the weights after `step` complete steps; None where the engine serves others."""
        return self._receipt if self._receipt is not None and self._receipt.version == step else None

    def sync(self, step: int) -> SyncReceipt:
        """Give the engine the weights of this step, unless it already has them; its receipt, of version `step`."""
        if (current := self.receipt_of(step)) is not None:
            return current
        ref = self._offered(step)
        receipt = self.generation.sync_weights(ref)
        handed = combined_digest({info.name: ref.handed.get(info.name, "not read") for info in ref.manifest})
        for each in (receipt, *receipt.engines):
            if each.version != ref.version or each.digest not in (handed, None):
                which = f"engine {each.index}" if isinstance(each, EngineReceipt) else "the engine"
                raise RuntimeError(
                    f"policy.generation.lora_sync={ref.mode!r}: {which} confirmed version {each.version} "
                    f"({(each.digest or '')[:12]}), but version {ref.version} ({handed[:12]}) was sent. "
                    "No rollout was used."
                )
        self._receipt = receipt
        return receipt

    def _offered(self, step: int) -> WeightsRef:
        """The weights of this step, in the form that is chosen for this run."""
        policy, choice = self._policy, self._choice
        if choice.is_open:
            adapter = policy.publish(step, "adapter").tensors
            assert adapter is not None, "a policy offers tensors to this process"
            choice.see(step, adapter)
        return policy.publish(step, choice.mode)

    def save(self, directory: Path) -> None:
        """Write what was decided of the form into a step's directory, once it is."""
        self._choice.save(directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        self._choice.load(directory)
