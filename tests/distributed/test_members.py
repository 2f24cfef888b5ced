"""Processes that fail, die or hang: each ends in one clear exception, and ends the others."""

import os
import time

import pytest
import ray
from ray.exceptions import RayError

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.distributed import members as members_module
from nemo_rl_lora.distributed.lost import ProcessesLost
from nemo_rl_lora.distributed.members import Members
from nemo_rl_lora.distributed.ray_runtime import running_ray


class Process:
    """Does as it is told."""

    def behave(self, how: str) -> str:
        if how == "hang":
            time.sleep(600)
        if how == "die":
            os._exit(1)
        if how == "fail":
            raise FloatingPointError("its own error")
        if how == "lose":
            raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
        return how


@pytest.fixture(scope="module", autouse=True)
def runtime():
    with running_ray(2):
        yield


@pytest.fixture
def members(monkeypatch):
    monkeypatch.setattr("nemo_rl_lora.distributed.members._GRACE_SECONDS", 2)
    actor = ray.remote(num_cpus=0)(Process)
    made = Members(
        cluster=ClusterConfig(gpus_per_node=2, step_timeout_seconds=3.0, start_timeout_seconds=60.0),
        actors=[actor.remote() for _ in range(2)],
        addresses=["10.0.0.1", "10.0.0.2"],
    )
    behave(made, "well", "well", starting=True)
    yield made
    made.end()


def behave(members, *ways, **more):
    return members.results("behave", [a.behave.remote(w) for a, w in zip(members.actors, ways, strict=True)], **more)


def all_ended(members) -> bool:
    return all(_dies(actor) for actor in members.actors)


def _dies(actor, seconds: float = 10) -> bool:
    """Whether an actor is gone within these seconds: Ray ends it after `ray.kill` has returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ray.get(actor.behave.remote("well"), timeout=seconds)
        except ray.exceptions.RayActorError:
            return True
        time.sleep(0.05)
    return False


def test_results_come_in_the_order_of_the_ranks(members):
    assert behave(members, "first", "second") == ["first", "second"]


def test_an_error_of_a_process_is_raised_and_ends_none_where_all_answer(members):
    with pytest.raises(FloatingPointError, match="its own error"):
        behave(members, "fail", "well")
    assert behave(members, "well", "well") == ["well"] * 2


def test_an_error_ends_those_that_wait_for_the_process(members):
    with pytest.raises(FloatingPointError, match="its own error"):
        behave(members, "fail", "hang")
    assert all_ended(members)


def test_a_process_that_hangs_is_named_with_the_limit(members):
    wrong = (
        r"cluster.step_timeout_seconds=3: training process 1 \(node 10.0.0.2\) of 2 did not end 'behave' in this time"
    )
    with pytest.raises(ProcessesLost, match=wrong):
        behave(members, "well", "hang")
    assert all_ended(members)


def test_a_process_that_dies_comes_before_those_that_lost_it(members):
    with pytest.raises(ProcessesLost, match=r"^training process 1 \(node 10.0.0.2\) of 2 was lost in 'behave'"):
        behave(members, "lose", "die")
    assert all_ended(members)


def test_an_error_of_its_own_comes_before_a_broken_connection(members):
    with pytest.raises(FloatingPointError, match="its own error"):
        behave(members, "lose", "fail")


def test_a_broken_connection_is_a_lost_process(members):
    with pytest.raises(ProcessesLost, match=r"training process 0 \(node 10.0.0.1\) of 2 lost another one in 'behave'"):
        behave(members, "lose", "hang")
    assert all_ended(members)


def test_what_ray_says_at_length_is_its_first_sentences():
    said = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RankProcess\n\tactor_id: 5c1b\n"
        "\x1b[36mThe actor is dead because its node has died.\x1b[0m Node Id: 77. " + "the raylet's log line. \n" * 30
    )
    text = members_module._first_words(RayError(said))
    assert text.startswith("The actor died unexpectedly before finishing this task. The actor is dead because its node")
    assert len(text) <= 300
    assert text.endswith("line.")
    assert not {"\x1b", "\n", "\t"} & {*text}
    assert members_module._first_words(RayError("It is gone.")) == "It is gone."
