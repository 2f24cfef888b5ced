"""An engine that is lost while rollouts run ahead: what it serves once it is started again. Engines are stand-ins that
read the files of a sync and show what these hold."""

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from nemo_rl_lora.generation.proof import Shown, columns_of, digests_of
from nemo_rl_lora.generation.protocol import GenerationFailed, generate
from nemo_rl_lora.generation.turns import SamplingStopped
from nemo_rl_lora.generation.vllm.engine import Sampled
from nemo_rl_lora.generation.vllm.generation import VllmGeneration
from nemo_rl_lora.generation.vllm.proven import EngineLost
from nemo_rl_lora.lora.files import ADAPTER_FILE
from nemo_rl_lora.policy.offer import write_ref
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_models import ALPHA, DIM, make_policy, settings_of

LONGEST_SECONDS = 30
ASKED = [request((5, 6, 7), 1, max_new_tokens=4)]


class StandIn:
    """An engine without a model, of another process: it reads files."""

    takes_files, where = True, "a stand-in"

    def __init__(self, path):
        self.base, self.held, self.version = load_file(path / "model.safetensors"), {}, None
        self.asked, self.may_answer, self.was_missed = threading.Event(), threading.Event(), threading.Event()
        self.may_answer.set()
        self.is_lost = False

    def _answer(self):
        if self.is_lost:
            self.was_missed.set()
            raise EngineLost("died")

    def generate(self, jobs):
        self.asked.set()
        assert self.may_answer.wait(LONGEST_SECONDS)
        self._answer()
        return [
            Sampled(token_ids=(5,) * 4, logprobs=(-1.0,) * 4, versions=((4, self.version),), finish_reason="length")
            for _ in jobs
        ]

    def weight_problems(self, manifest):
        self._answer()
        return []

    def receive_weights(self, source, version):
        return self._receive(source, "merged", version)

    def receive_adapter(self, directory, version):
        return self._receive(f"{directory}/{ADAPTER_FILE}", "adapter", version)

    def _receive(self, path, mode, version):
        self._answer()
        self.held, self.version = load_file(path), version
        return [digests_of(self.held, mode)]

    def release(self, path):
        pass

    def num_kept_blocks(self):
        return 0

    def probe(self, kind, names):
        self._answer()
        return [shown(self.base if kind == "base" else self.held, names)]

    def probe_adapter(self, names, ranks):
        scaled = {name: t * (ALPHA / DIM if ".lora_B." in name else 1) for name, t in self.held.items()}
        return [shown(scaled, names)]

    def rest(self):
        pass

    def close(self):
        self.is_lost = True


def shown(tensors, names):
    return {name: Shown.whole(columns_of(name, tensors[name], torch.float32)) for name in names if name in tensors}


class Served:
    """A policy, and a generation whose engines are stand-ins; `may_start` holds the next start back."""

    def __init__(self, directory, mode, in_flight="keep", max_failures=1):
        self.mode, self.directory, self.engines = mode, directory, []
        self.policy = make_policy(directory, "llama", torch.float32)
        self.is_starting, self.may_start = threading.Event(), threading.Event()
        self.may_start.set()
        settings = replace(settings_of(self.policy, mode), in_flight=in_flight)
        self.generation = VllmGeneration(self.policy.served, settings, self._start, max_failures=max_failures)
        self.is_starting.clear()

    def _start(self):
        self.is_starting.set()
        assert self.may_start.wait(LONGEST_SECONDS)
        self.engines.append(StandIn(self.policy.path))
        return self.engines[-1]

    def publish(self, version, *, as_file=False):
        """The next version; as a file in the place of the one before, as several training processes do."""
        self.policy.draw(version)
        ref = self.policy.publish(version, self.mode)
        if as_file:
            for path in self.directory.glob("version_*"):
                path.unlink()
            path = self.directory / f"version_{version}.safetensors"
            write_ref(path, ref)
            ref = replace(ref, path=path)
        return ref

    def sampling(self):
        """A rollout that runs until `may_answer` of the first engine is set."""
        self.engines[0].may_answer.clear()
        rollout = InThread(lambda: generate(self.generation, ASKED))
        assert self.engines[0].asked.wait(LONGEST_SECONDS)
        return rollout

    def lose(self):
        self.engines[0].is_lost = True
        self.engines[0].may_answer.set()


class InThread:
    """What a function returns or raises, in a thread."""

    def __init__(self, function):
        self._found = []
        self._thread = threading.Thread(target=self._run, args=(function,))
        self._thread.start()

    def _run(self, function):
        try:
            self._found.append(function())
        except BaseException as error:  # is raised where it is asked for
            self._found.append(error)

    def result(self):
        self._thread.join(LONGEST_SECONDS)
        (found,) = self._found
        if isinstance(found, BaseException):
            raise found
        return found


def versions_of(groups):
    return [completion.versions for group in groups for completion in group.completions]


@pytest.mark.parametrize(("mode", "as_file"), [("adapter", False), ("merged", False), ("merged", True)])
def test_an_engine_lost_beside_a_sync_in_flight_serves_the_new_version(tmp_path, mode, as_file):
    served = Served(tmp_path, mode)
    generation = served.generation
    generation.sync_weights(served.publish(1, as_file=as_file))
    rollout = served.sampling()
    served.may_start.clear()
    served.lose()
    assert served.is_starting.wait(LONGEST_SECONDS)
    ref = served.publish(2, as_file=as_file)
    served.engines[0].was_missed.clear()
    sync = InThread(lambda: generation.sync_weights(ref))
    assert served.engines[0].was_missed.wait(LONGEST_SECONDS)  # the sync has met the lost engine too
    served.may_start.set()

    assert (sync.result().version, sync.result().verdict) == (2, "confirmed")
    (((number, version),),) = versions_of(rollout.result())
    assert (number, version in ({2} if mode == "adapter" else {1, 2})) == (4, True)  # merged, the start goes on first
    assert generation._engines[0].version == 2
    assert len(served.engines) == 2
    assert len(list(generation._directory.glob("push-*"))) == 1
    generation.close()


@pytest.mark.parametrize("in_flight", [None, "keep"])
@pytest.mark.parametrize(("mode", "as_file"), [("adapter", False), ("merged", False), ("merged", True)])
def test_an_engine_lost_while_the_policy_moves_serves_what_was_sent(tmp_path, mode, as_file, in_flight):
    served = Served(tmp_path, mode, in_flight)
    generation = served.generation
    generation.sync_weights(served.publish(1, as_file=as_file))
    rollout = served.sampling()
    served.policy.tensors |= {name: tensor.add_(0.5) for name, tensor in served.policy.tensors.items()}
    if as_file and in_flight:
        served.publish(2, as_file=True)  # which removes the first one's file
    served.lose()
    assert versions_of(rollout.result()) == [((4, 1),)]
    assert len(served.engines) == 2
    generation.close()


@pytest.mark.parametrize(("mode", "as_file"), [("adapter", False), ("merged", False), ("merged", True)])
def test_an_engine_lost_while_nothing_is_sampled_serves_the_next_version(tmp_path, mode, as_file):
    """Whose publishing removes the file of the one before, where several processes train."""
    served = Served(tmp_path, mode, in_flight=None)
    generation = served.generation
    generation.sync_weights(served.publish(1, as_file=as_file))
    ref = served.publish(2, as_file=as_file)
    served.lose()
    assert generation.sync_weights(ref).version == 2
    assert versions_of(generate(generation, ASKED)) == [((4, 2),)]
    assert len(served.engines) == 2
    generation.close()


def test_an_engine_that_a_sync_has_started_again_first_serves_what_waits_for_it(tmp_path):
    """The sync asks the lost engine about the names of its weights, and starts another one."""
    served = Served(tmp_path, "merged")
    generation = served.generation
    generation.sync_weights(served.publish(1))
    rollout = served.sampling()
    served.engines[0].is_lost = True
    served.may_start.clear()
    sync = InThread(lambda: generation.sync_weights(served.publish(2)))
    assert served.is_starting.wait(LONGEST_SECONDS)
    served.engines[0].may_answer.set()
    served.may_start.set()
    assert sync.result().version == 2
    assert versions_of(rollout.result())[0][0][1] in (1, 2)
    assert len(served.engines) == 2
    generation.close()


def test_an_engine_whose_first_start_is_lost_is_started_again_and_too_many_end_the_run_by_name(tmp_path, monkeypatch):
    start, starts = Served._start, []

    def stillborn(served):
        starts.append(1)
        if len(starts) != 2:
            raise EngineLost("did not answer 'start' within 5 s (policy.generation.timeout_seconds=5)")
        return start(served)

    monkeypatch.setattr(Served, "_start", stillborn)
    Served(tmp_path, "adapter").generation.close()
    assert len(starts) == 2
    with pytest.raises(GenerationFailed) as failed:
        Served(tmp_path, "adapter")
    assert str(failed.value) == (
        "policy.generation.max_generation_failures=1: the engine did not answer 'start' within 5 s "
        "(policy.generation.timeout_seconds=5), 2 times in a row. Where it needs longer, raise "
        "policy.generation.timeout_seconds. Where memory is short, lower policy.generation.max_concurrent_sequences or "
        "policy.generation.vllm_cfg.gpu_memory_utilization."
    )


def test_an_engine_that_starts_again_while_it_is_closed_ends(tmp_path):
    served = Served(tmp_path, "merged")
    served.generation.sync_weights(served.publish(1))
    rollout = served.sampling()
    served.may_start.clear()
    served.lose()
    assert served.is_starting.wait(LONGEST_SECONDS)
    served.generation.close()
    served.may_start.set()
    with pytest.raises(SamplingStopped):
        rollout.result()
    assert [engine.is_lost for engine in served.engines] == [True, True]
