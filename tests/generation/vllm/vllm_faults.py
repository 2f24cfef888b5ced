"""An engine that can be told to go wrong inside, while everything that it reports stays right.

Each fault is what an integration of vLLM can do silently: see `FAULTS` of test_proof.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nemo_rl_lora.generation.proof import probed_columns
from nemo_rl_lora.generation.vllm.engine import VllmEngine
from nemo_rl_lora.generation.vllm.worker import ADAPTER_ID, WorkerExtension

NEXT: dict[str, Any] = {"fault": None, "before": [], "loaded": []}
_load, _receive, _refresh = (
    WorkerExtension._load,
    WorkerExtension.receive_weights,
    WorkerExtension._refresh_tied_head,
)


def load(worker, tensors):
    """Digests are taken of what is received, before anything goes wrong here."""
    fault, before = NEXT["fault"], NEXT["loaded"]
    NEXT["before"] = before
    tensors = NEXT["loaded"] = [(name, tensor.clone()) for name, tensor in tensors]
    if fault == "dropped":
        return
    if fault == "stale":
        tensors = before
    if fault in ("twice", "alpha"):
        base = load_file(Path(worker.vllm_config.model_config.model) / "model.safetensors")
        factor = 2.0 if fault == "twice" else 0.25
        tensors = [(n, (base[n] + factor * (t.float() - base[n])).to(t.dtype)) for n, t in tensors]
    if fault == "projection":
        tensors = [(name, tensor) for name, tensor in tensors if "k_proj" not in name]
    _load(worker, tensors)


def receive_weights(worker, source):
    if NEXT["fault"] == "shape":
        source = {n: t[:-32] if "v_proj.weight" in n else t for n, t in source.items()}
    if NEXT["fault"] == "bytes":
        source = one_element_changed(source)
    return _receive(worker, source)


def one_element_changed(tensors):
    """One number of one tensor, where no probe looks."""
    name = next(name for name in tensors if "1.mlp.down_proj" in name)
    changed = tensors[name].clone()
    changed[0, (probed_columns(name, changed.shape[1])[-1] + 2) % changed.shape[1]] += 1
    return {**tensors, name: changed}


def refresh_tied_head(worker):
    """Left out, the head goes on with the embeddings of before: by itself where this CPU packs them, as here elsewhere
    (a CPU without AVX-512 multiplies by the embeddings themselves)."""
    if NEXT["fault"] != "tied head":
        _refresh(worker)
        return
    old = dict(NEXT["before"])["model.embed_tokens.weight"]
    worker._tied_head().cpu_linear = lambda x, weight, bias: F.linear(x, old, bias)


def lose_projection(worker):
    """The k of every fused layer, of the adapter that is loaded."""
    for module in worker.model_runner.get_model().modules():
        if len(getattr(module, "lora_b_stacked", ())) == 3:
            module.lora_b_stacked[1].zero_()


def restart(worker):
    """What a restart of the engine leaves: the model's own files."""
    worker.model_runner.reload_weights()
    if worker.vllm_config.lora_config is not None:
        worker.model_runner.lora_manager.remove_all_adapters()


class FaultyEngine(VllmEngine):
    """The engine's half of the faults, and the switch of both halves."""

    def __init__(self, settings):
        super().__init__(settings)
        WorkerExtension._load = load
        WorkerExtension.receive_weights = receive_weights
        WorkerExtension._refresh_tied_head = refresh_tied_head

    def close(self):
        WorkerExtension._load, WorkerExtension.receive_weights = _load, _receive
        WorkerExtension._refresh_tied_head = _refresh
        super().close()

    def set_fault(self, fault):
        NEXT["fault"] = fault

    def restart(self):
        self._llm.collective_rpc(restart)
        self._adapter_path = None
        self._llm.reset_prefix_cache()

    def receive_adapter(self, directory, version):
        fault, before = NEXT["fault"], Path(directory).with_name("before")
        if fault == "bytes":
            file = Path(directory) / "adapter_model.safetensors"
            save_file(one_element_changed(load_file(file)), file)
        if fault == "dropped":
            self._begin(version)
            return self._call("receive_adapter", directory)
        if fault == "stale":
            received = self._call("receive_adapter", directory)
            super().receive_adapter(str(before), version)
            return received
        if fault in ("twice", "alpha"):
            file = Path(directory) / "adapter_config.json"
            config = json.loads(file.read_text())
            file.write_text(
                json.dumps(config | {"lora_alpha": config["lora_alpha"] * (2 if fault == "twice" else 0.25)})
            )
        received = super().receive_adapter(directory, version)
        if fault == "projection":
            self._llm.collective_rpc(lose_projection)
        shutil.copytree(directory, before, dirs_exist_ok=True)
        return received

    def _empty_prefix_cache(self, pool):
        if NEXT["fault"] != "prefix":
            super()._empty_prefix_cache(pool)


def receive_alone(worker, tensors):
    for _ in tensors:
        pass


def leave_behind(worker):
    """From now on this worker's process loads nothing that it receives."""
    WorkerExtension._load = receive_alone
    worker.model_runner.add_lora = lambda lora_request: True


def go_on_loading(worker):
    WorkerExtension._load = _load
    del worker.model_runner.add_lora


def replace_amid_requests(worker, directory):
    """At the third forward pass from now on another adapter takes the place of the one that is served."""
    from vllm.lora.request import LoRARequest

    runner, passes = worker.model_runner, []
    execute = runner.execute_model

    def execute_model(*arguments, **named):
        passes.append(None)
        if len(passes) == 3:
            worker.add_lora(LoRARequest("policy", ADAPTER_ID, directory, load_inplace=True))
            del runner.execute_model
        return execute(*arguments, **named)

    runner.execute_model = execute_model


def hold_back(worker, rank, projection, before=()):
    """From now on one rank keeps what it has of one projection, which `before` holds where weights are merged; no
    projection: of none, again."""
    if worker.rank != rank or projection is None:
        WorkerExtension._load = _load
        vars(worker.model_runner).pop("add_lora", None)
        return
    add_lora = type(worker.model_runner).add_lora.__get__(worker.model_runner)

    def without(worker, tensors):
        _load(worker, [(name, before[name] if projection in name else tensor) for name, tensor in tensors])

    def restoring(request):
        held = {}
        for name, module in worker.model_runner.get_model().named_modules():
            parts = worker.model_runner.get_model().packed_modules_mapping.get(name.rpartition(".")[2], [projection])
            if hasattr(module, "lora_b_stacked") and (projection in parts) and (len(parts) > 1 or projection in name):
                both = module.lora_a_stacked, module.lora_b_stacked
                part = parts.index(projection)
                held |= {id(stacked[part]): (stacked[part], stacked[part].clone()) for stacked in both}
        added = add_lora(request)
        for stacked, before in held.values():
            stacked.copy_(before)
        return added

    WorkerExtension._load = without
    worker.model_runner.add_lora = restoring
