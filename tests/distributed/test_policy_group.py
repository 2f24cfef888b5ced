"""A policy in two Ray actors is the policy of one process, and fails aloud."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch

from nemo_rl_lora.algorithms.batch import longest_rows
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.distributed.lost import ProcessesLost
from nemo_rl_lora.distributed.policy_group import PolicyGroup
from nemo_rl_lora.distributed.rank_process import Place
from nemo_rl_lora.policy.determinism import WORKSPACE
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from nemo_rl_lora.run.memory import from_phase
from nemo_rl_lora.tensors import tensors_digest
from tests.distributed.processes import assert_loopback_alone, own_processes
from tests.policy.dtensor.test_policy import make_policy, relative, spec
from tests.policy.megatron.twins import distance, random_adapter, set_masters
from tests.tiny_models import VOCABULARY

GRPO = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))


VARIABLE = "NRL_TEST_VARIABLE"
AUTO = {"enabled": True, "train_mb_tokens": "auto", "sequence_length_round": 8}


def two_processes(config, setup) -> PolicyGroup:
    asked = {"backend": "megatron", "deterministic": True, "megatron_cfg": MegatronConfig(env_vars={VARIABLE: "seen"})}
    return PolicyGroup(config.model_copy(update=asked), setup, ClusterConfig(gpus_per_node=2))


@pytest.fixture(scope="module")
def twins(tiny_model, tmp_path_factory):
    """One policy in this process and one in two others, with the same adapter, whose B is not zero."""
    one = make_policy(tiny_model("llama"), backend=MegatronPolicy, spec=spec())
    set_masters(one, random_adapter(one))
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    one.save(checkpoint)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    group = make_policy(tiny_model("llama"), backend=two_processes, spec=spec(), dynamic_batching=AUTO)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    group.load(checkpoint)
    yield one, group
    group.close()
    assert not ray.is_initialized()


def test_logprobs_are_those_of_one_process(twins, groups_batch):
    one, group = twins
    assert relative(group.logprobs(groups_batch), one.logprobs(groups_batch)) <= 1e-5
    assert relative(group.reference_logprobs(groups_batch), one.reference_logprobs(groups_batch)) <= 1e-5
    assert group.adapted == one.adapted


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_what_is_published_lies_in_a_file_until_the_next(twins, mode):
    one, group = twins
    expected, ref = one.publish(3, mode), group.publish(3, mode)
    assert replace(ref, path=None, tensors=None) == replace(expected, tensors=None)
    assert list(ref.tensors) == list(expected.tensors)
    assert all(torch.equal(ref.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert len(ref.tensors) == len(expected.tensors)
    if mode == "adapter":
        assert tensors_digest(ref.tensors, whole=True) == ref.digest
    group.publish(4, mode)
    assert not ref.path.exists()


def test_what_another_node_published_is_brought_to_this_one(twins, monkeypatch, tmp_path):
    one, group = twins
    monkeypatch.setattr(group, "_is_apart", True)
    monkeypatch.setattr(group, "_directory", tmp_path, raising=False)
    expected, ref = one.publish(5, "merged"), group.publish(5, "merged")
    assert ref.path.parent == tmp_path
    assert all(torch.equal(ref.tensors[name], expected.tensors[name]) for name in expected.tensors)
    group.publish(6, "adapter")
    assert [file.name for file in tmp_path.iterdir()] == ["version_6_adapter.safetensors"]


def test_a_step_and_a_checkpoint_are_those_of_one_process(twins, groups_batch, tmp_path):
    one, group = twins
    for _ in range(2):
        expected, output = one.train_step(groups_batch, GRPO), group.train_step(groups_batch, GRPO)
        assert output.loss == pytest.approx(expected.loss, abs=1e-5)
        assert output.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert output.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    group.save(tmp_path)
    resumed = make_policy(one._setup.model_path, backend=MegatronPolicy, spec=spec())
    resumed.load(tmp_path)
    weights, others = (policy._trained.canonical(lambda master: master) for policy in (resumed, one))
    assert distance(weights, others) <= 1e-4
    assert resumed._optimizer.num_steps == 2


def test_all_sockets_listen_on_the_loopback_interface(twins):
    assert_loopback_alone()  # Ray's, those of gloo and of torch's store


def test_processes_start_with_the_environment_that_was_asked_for(twins):
    ranks = [process for process in own_processes() if "RankProcess" in " ".join(process.cmdline())]
    assert [process.environ().get(VARIABLE) for process in ranks] == ["seen"] * 2


def test_numbers_that_are_not_finite_stop_every_process_and_end_none(twins, groups_batch):
    _, group = twins
    broken = replace(groups_batch, advantages=torch.full((7,), float("nan")))
    before = group.publish(0, "adapter").digest
    with pytest.raises(FloatingPointError, match="The optimizer has not moved"):
        group.train_step(broken, GRPO)
    assert group.publish(0, "adapter").digest == before


def test_a_checkpoint_that_does_not_fit_is_refused_as_by_one_process(twins, tmp_path):
    _, group = twins
    with pytest.raises(ValueError, match="adapter_config.json"):
        group.load(tmp_path)


def with_settings(inputs):
    loss, metrics = GRPO(inputs)
    is_set = torch.are_deterministic_algorithms_enabled() and WORKSPACE in os.environ
    return loss, metrics | {"is_set_min": torch.tensor(float(is_set))}


def test_every_process_is_deterministic_where_that_is_asked_for(twins, groups_batch):
    one, group = twins
    assert group.train_step(groups_batch, with_settings).metrics["is_set_min"] == 1
    assert one.train_step(groups_batch, with_settings).metrics["is_set_min"] == 0


def no_memory(inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_process_without_memory_is_named_with_its_peak(twins, groups_batch):
    _, group = twins
    with pytest.raises(torch.OutOfMemoryError) as raised, from_phase("policy_training"):
        group.train_step(groups_batch, no_memory)
    noted = vars(raised.value)
    assert noted["phase"] == "policy_training"
    assert re.fullmatch(r"\d+\.\d\d GiB of the machine's memory, in training process [01]", noted["peak_memory"])
    assert group.train_step(groups_batch, GRPO).grad_norm > 0  # both are there still


def test_a_budget_is_found_in_every_process_and_used_by_all(twins, groups_batch):
    one, group = twins
    longest = longest_rows(torch.arange(8), num_prompt_tokens=1, num_tokens=64, vocabulary=VOCABULARY)
    assert {cutting.train.max_tokens for cutting in group._cuttings} == {64}
    before = group.publish(0, "adapter").digest
    found = group.find_train_tokens(longest)
    assert (found.tokens, found.num_trials) == (4 * 64, 3)  # a process has half of the rows
    assert found.reason.startswith("all rows of a step fit at once: 64 tokens take ")
    assert {cutting.train.max_tokens for cutting in group._cuttings} == {4 * 64}
    assert group.publish(0, "adapter").digest == before
    assert group.device == one.device
    group.use_train_tokens(100)
    assert {cutting.train.max_tokens for cutting in group._cuttings} == {100}
    assert group.train_step(groups_batch, GRPO).grad_norm > 0


def test_a_process_that_ends_is_named(twins, groups_batch):  # last: it ends the group
    _, group = twins
    ray.kill(group._members.actors[1])
    with pytest.raises(ProcessesLost, match=r"training process 1 \(node 127.0.0.1\) of 2 was lost in 'logprobs_of'"):
        group.logprobs(groups_batch)


def test_every_node_sees_what_is_written_and_read(tmp_path, monkeypatch):
    """Of two nodes the other one sees what is there, but not below `hidden`."""
    seen, hidden = tmp_path / "seen", tmp_path / "hidden"
    (hidden / "step_5").mkdir(parents=True)
    group = object.__new__(PolicyGroup)
    setup = SimpleNamespace(model_path=tmp_path, base_model_name="tiny", initial_adapter=None)
    monkeypatch.setattr(group, "_setup", setup, raising=False)

    def places(_method, paths, *, starting):
        assert starting
        others = tuple(path.exists() and hidden not in path.parents for path in paths)
        return [
            Place(node_id=str(number), address=f"10.0.0.{number}", port=0, seen=found)
            for number, found in enumerate((tuple(path.exists() for path in paths), others))
        ]

    monkeypatch.setattr(group, "_all", places, raising=False)
    checkpoints = {seen: "checkpointing.checkpoint_dir='seen'"}
    assert len(group._places(checkpoints, {seen: "checkpointing.load_path='seen'"})) == 2
    for written, read in (({hidden: "logger.log_dir='hidden'"}, {}), ({}, {hidden / "step_5": "load_path='hidden'"})):
        key = "logger.log_dir" if written else "load_path"
        with pytest.raises(ConfigError, match=rf"^{key}='hidden': node 10.0.0.1 does not see .*hidden/"):
            group._places({**checkpoints, **written}, read)
    assert list(seen.iterdir()) == []
    assert list(hidden.iterdir()) == [hidden / "step_5"]
