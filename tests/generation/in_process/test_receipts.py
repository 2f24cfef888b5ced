"""Faults inside the engine, while it reports the right version: each ends the run, and is named."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.generation.in_process.decoder import CausalDecoder
from nemo_rl_lora.generation.in_process.fallback import PlainDecoder
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.offer import OfferedTensors
from nemo_rl_lora.types import WeightsRef
from tests.generation.engine_inputs import LetterTokenizer, adapted_modules, adapter_tensors, ref
from tests.tiny_models import sampling_model

DECODERS = {"fast": CausalDecoder, "plain": PlainDecoder}
MODES = ("merged", "adapter")


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(engine, "unsupported_reason", lambda model: "a test asks for it")
    return DECODERS[request.param]


def set_differently(monkeypatch, decoder, mode, changed) -> None:
    """From version 1 on, what a decoder is given is `changed(decoder, mapping)`."""
    verb = "set_weights" if mode == "merged" else "set_adapters"
    usual, calls = getattr(decoder, verb), []

    def wrong(self, given):
        calls.append(given)
        num_before = 2 if decoder is PlainDecoder and mode == "merged" else 1  # one of them as it is made
        usual(self, given if len(calls) <= num_before else changed(self, given))

    monkeypatch.setattr(decoder, verb, wrong)


def refused(tiny_run, mode, *overrides) -> str:
    """What a run says that used one rollout and no other."""
    ended = tiny_run(f"policy.generation.lora_sync={mode}", "grpo.max_num_steps=3", *overrides)
    assert ended.code == 1, ended.err
    assert "No rollout was used." in ended.err
    assert "Traceback" not in ended.err
    assert [line["step"] for line in tiny_run.metrics()] == [1]
    return ended.err


@pytest.mark.parametrize("mode", MODES)
def test_half_of_the_modules_left_as_they_were(tiny_run, monkeypatch, decoder, mode):
    set_differently(monkeypatch, decoder, mode, lambda _, given: dict(list(given.items())[::2]))

    said = refused(tiny_run, mode)
    assert "weights of version 1: the engine's kernels show something else in" in said
    assert "is as the version before had it" in said  # which was the base: B was zero


@pytest.mark.parametrize("mode", MODES)
def test_the_base_served_in_the_place_of_a_version(tiny_run, monkeypatch, decoder, mode):
    set_differently(monkeypatch, decoder, mode, lambda _, given: {})

    said = refused(tiny_run, mode)
    assert "is as the version before had it" in said  # which was the base: B was zero


@pytest.mark.parametrize("mode", MODES)
def test_an_update_of_another_size(tiny_run, monkeypatch, decoder, mode):
    def doubled(self, given):
        if mode == "adapter":
            return {name: replace(adapter, scale=2 * adapter.scale) for name, adapter in given.items()}
        return {name: tensor + (tensor - self.shared[name]) for name, tensor in given.items()}

    set_differently(monkeypatch, decoder, mode, doubled)

    assert "is with an update 2.00 times the one sent" in refused(tiny_run, mode)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_the_version_before(tiny_run, monkeypatch, decoder, mode, precision):
    copied, copies = engine.InProcessGeneration._copied, []

    def stale(self, tensor, dtype):
        copies.append(copied(self, tensor, dtype))
        num_tensors = len(self._expected[mode])
        return copies[-1 - num_tensors] if len(copies) > num_tensors else copies[-1]

    monkeypatch.setattr(engine.InProcessGeneration, "_copied", stale)

    said = refused(tiny_run, mode, f"policy.precision={precision}", "policy.optimizer.kwargs.lr=0.01")
    assert "is as the version before had it" in said


def test_an_adapter_left_beside_merged_weights(tiny_run, monkeypatch, decoder):
    def left(self, adapters):
        weight = self.held("model.layers.0.mlp.up_proj.weight")
        a, b = torch.ones(4, weight.shape[1]), torch.ones(weight.shape[0], 4)
        set_adapters(self, {"model.layers.0.mlp.up_proj": AdapterTensors(a=a, b=b, scale=1.0)} if calls else adapters)
        calls.append(adapters)

    set_adapters, calls = decoder.set_adapters, []
    monkeypatch.setattr(decoder, "set_adapters", left)

    said = refused(tiny_run, "merged")
    assert "in 1 of" in said
    assert "layers.0.mlp.up_proj.lora_B.weight is changed, and no update of it was sent" in said


@pytest.mark.parametrize("mode", MODES)
def test_one_number_where_no_product_looks(tiny_run, monkeypatch, decoder, mode):
    """The bytes show it: of a merged weight, in that one of eight syncs in which they are unpacked."""
    monkeypatch.setattr("nemo_rl_lora.generation.in_process.inspection.UNPACKED_EVERY", 1)
    name = "model.layers.1.mlp.down_proj"

    def changed(self, given):
        key = f"{name}.weight" if mode == "merged" else name
        tensor = given[key] if mode == "merged" else given[key].a
        other = tensor.clone()
        other[-1, -1] += 1e-3
        other[-1, 0] += 1e-3
        return {**given, key: other if mode == "merged" else replace(given[key], a=other)}

    set_differently(monkeypatch, decoder, mode, changed)
    monkeypatch.setattr("nemo_rl_lora.generation.proof.PROBE_COLUMNS", 1)

    assert "received other bytes in 1 of" in refused(tiny_run, mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_reads_other_weights_than_those_offered(tiny_run, monkeypatch, mode):
    """Its own checks agree with what it read, so the digest of the receipt decides."""
    first: dict[str, torch.Tensor] = {}

    class Elsewhere(engine.InProcessGeneration):
        def sync_weights(self, ref: WeightsRef):
            if not first:
                first.update({info.name: ref.tensors[info.name].clone() for info in ref.manifest})
            offered = OfferedTensors({name: partial(first.__getitem__, name) for name in first}, ref.mode)
            for info in ref.manifest:
                ref.tensors[info.name]
            return super().sync_weights(replace(ref, tensors=offered, handed=offered.handed))

    monkeypatch.setattr(engine, "InProcessGeneration", Elsewhere)

    assert f"policy.generation.lora_sync='{mode}': the engine confirmed version 1 (" in refused(tiny_run, mode)


def test_a_sync_that_nobody_read_is_no_sync(tiny_run, monkeypatch):
    class Idle(engine.InProcessGeneration):
        def sync_weights(self, ref):
            if ref.version == 0:
                self.receipt = super().sync_weights(ref)
            self._version = ref.version
            return replace(self.receipt, version=ref.version)

    monkeypatch.setattr(engine, "InProcessGeneration", Idle)

    assert "the engine confirmed version 1 (" in refused(tiny_run, "merged")


@pytest.mark.parametrize("mode", MODES)
def test_products_confirm_a_version_that_is_not_the_base(tiny_run, decoder, mode):
    assert tiny_run(f"policy.generation.lora_sync={mode}", "grpo.max_num_steps=3").code == 0

    assert [line["sync_confirmed"] for line in tiny_run.metrics()] == [0.0, 1.0, 1.0]  # at first B is zero


SCALES = (1.5, 4 / 3, 1 / 3, 3.05, 16 / 8**0.5, 100 / 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_scale_is_served_in_any_precision(decoder, dtype):
    """Also one that the precision does not have: the decoder rounds the product that it scales."""
    model = sampling_model("llama").to(dtype)
    for scale in SCALES:
        adapted = [replace(module, scale=scale) for module in adapted_modules(model)]
        served = engine.InProcessGeneration(
            model,
            tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
            spec=LoraSpec(dim=4, alpha=6),
            adapted=adapted,
            compute_dtype=dtype,
            max_concurrent_sequences=4,
        )
        receipts = [served.sync_weights(ref(adapter_tensors(model, version), "adapter", version)) for version in (1, 2)]
        assert [receipt.verdict for receipt in receipts] == ["confirmed"] * 2, scale


def test_rslora_in_bfloat16_is_served(tiny_run):
    overrides = ("lora_cfg.dim=8", "lora_cfg.use_rslora=true")
    ended = tiny_run(
        *(f"policy.dtensor_cfg.{override}" for override in overrides),
        "policy.precision=bfloat16",
        "policy.generation.lora_sync=adapter",
        "grpo.max_num_steps=3",
    )
    assert ended.code == 0, ended.err
    assert [line["sync_confirmed"] for line in tiny_run.metrics()] == [0.0, 1.0, 1.0]
