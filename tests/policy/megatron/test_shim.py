"""Each spot of the shim fails without it: a test that no longer does says that megatron-core outgrew the spot."""

import importlib
import sys

import pytest
import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer.moe import moe_utils, router

from nemo_rl_lora.policy.megatron import shim

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
NO_CUDA = r"CUDA|NVIDIA"


class TwoRanks:
    """The first of two ranks, as a process group tells."""

    def size(self):
        return 2

    def rank(self):
        return 0


class Fields:
    """Any object with these attributes."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


def gather_columns(monkeypatch):
    monkeypatch.setattr(mappings, "dist_all_gather_func", lambda out, x, group: out.copy_(torch.cat([x, x])))
    assert mappings._gather_along_last_dim(torch.ones(3, 2), TwoRanks()).shape == (3, 4)


def gather_rows(monkeypatch):
    monkeypatch.setattr(mappings, "dist_all_gather_func", lambda out, x, group: out.copy_(torch.cat([x, x])))
    assert mappings._gather_along_first_dim(torch.ones(3, 2), TwoRanks()).shape == (6, 2)


def scatter_rows(monkeypatch):
    monkeypatch.setattr(mappings, "dist_reduce_scatter_func", lambda out, x, group: out.copy_(x[: len(out)]))
    assert mappings._reduce_scatter_along_first_dim(torch.ones(4, 2), TwoRanks()).shape == (2, 2)


def train_a_weight_under_sequence_parallelism(monkeypatch):
    class Done:
        def wait(self):
            pass

    monkeypatch.setattr(layers, "dist_reduce_scatter_func", lambda out, x, group, async_op: out.zero_() and None or Done())
    context = Fields(
        saved_tensors=(torch.ones(3, 2), torch.ones(5, 2)),
        main_grad=None,
        use_bias=False,
        grad_output_buffer=[],
        wgrad_deferral_limit=0,  # the weight's own gradient, which would be communicated, comes later
        tp_group=TwoRanks(),
        gradient_accumulation_fusion=False,
        sequence_parallel=True,
        allreduce_dgrad=False,
    )
    backward = layers.LinearWithGradAccumulationAndAsyncCommunication.backward.__wrapped__
    return backward(context, torch.ones(6, 5))


def route(monkeypatch):
    scores = Fields(weight=torch.ones(4, 2), bias=None, config=Fields(moe_router_dtype=None))
    monkeypatch.setattr(router, "router_gating_linear", lambda x, weight, bias, dtype: x @ weight.t())
    assert router.Router.gating(scores, torch.ones(3, 2)).shape == (3, 4)


def receive_from_the_stage_before(monkeypatch):
    monkeypatch.setattr(p2p_communication, "_p2p_ops", lambda **_: {})
    config = Fields(
        variable_seq_lengths=False,
        mtp_standalone=False,
        pipeline_dtype=torch.float32,
        use_ring_exchange_p2p=False,
        batch_p2p_comm=False,
    )
    stage = Fields(config=config, pp_group=TwoRanks(), next_rank=1, prev_rank=1)
    received, _, _ = p2p_communication.P2PCommunicator._communicate(
        stage, tensor_send_next=None, tensor_send_prev=None, recv_prev=True, recv_next=False, tensor_shape=(3, 1, 2)
    )
    assert received.shape == (3, 1, 2)
