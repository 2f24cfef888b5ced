"""Weights and adapters between Hugging Face and megatron-core: exact both ways, for every family and layout."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.names import hf_names
from nemo_rl_lora.policy.attention import AttentionPlan
from nemo_rl_lora.policy.megatron.convert import (
    check_checkpoint,
    fuse,
    hf_tensors,
    join_adapter,
    layout_of,
    megatron_tensors,
    megatron_weights,
    open_checkpoint,
    owners,
    separate,
    shard_adapter,
    share,
    unshare,
)
from nemo_rl_lora.policy.megatron.families import read_family
from nemo_rl_lora.policy.microbatches import Microbatch, Segment
from tests.tiny_models import LLAMA3, save_random_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": lambda **k: LlamaConfig(**SIZES, rope_parameters=LLAMA3, **k),
    "mistral": lambda **k: MistralConfig(**SIZES, sliding_window=None, **k),
    "qwen2": lambda **k: Qwen2Config(**SIZES, **k),
    "qwen3": lambda **k: Qwen3Config(**SIZES, head_dim=16, **k),
    "qwen3_moe": lambda **k: Qwen3MoeConfig(  # both routers
        **SIZES, **EXPERTS, mlp_only_layers=[1], norm_topk_prob=k["tie_word_embeddings"], **k
    ),
}
MODELS = [(name, tied) for name in CONFIGS for tied in (True, False)]
LAYOUTS = [  # TP, PP, EP, layers of the first stage
    (1, 1, 1, None),
    (2, 1, 1, None),
    (1, 2, 1, None),
    (1, 2, 1, 1),
    (1, 1, 2, None),
    (2, 2, 1, None),
    (2, 2, 2, 3),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(family, tied) -> the directory of a random model that transformers saved."""
    made = {}

    def save(name, tied):
        if (name, tied) not in made:
            directory = tmp_path_factory.mktemp(f"{name}_{tied}")
            made[name, tied] = save_random_model(CONFIGS[name](tie_word_embeddings=tied), directory, moved=0.2)
        return made[name, tied]

    return save


def family_of(name, tied=True):
    return read_family(CONFIGS[name](tie_word_embeddings=tied), name, 128)


def megatron_of(layout):
    tp, pp, ep, first = layout
    return MegatronConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        num_layers_in_first_pipeline_stage=first,
        sequence_parallel=tp > 1,
    )


def layouts_of(family, layout):
    """One entry a rank; expert-parallel ranks lie across tensor-parallel ones, as many as are needed for both."""
    tp, pp, ep, _ = layout
    cfg = megatron_of(layout)
    return [
        layout_of(family, cfg, tp_rank=rank % tp, pp_rank=pp_rank, ep_rank=rank % ep)
        for pp_rank, rank in itertools.product(range(pp), range(max(tp, ep)))
    ]


def possible(family, layout):
    return family.experts is not None or layout[2] == 1


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_there_and_back_is_bit_exact_and_complete_for_every_layout(saved, name, tied):
    directory, family = saved(name, tied), family_of(name, tied)
    original = load_file(directory / "model.safetensors")
    for layout in (layout for layout in LAYOUTS if possible(family, layout)):
        layouts = layouts_of(family, layout)
        with open_checkpoint(directory) as checkpoint:
            ranks = [dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts]
        asked = set()

        def read(rank, local_name, shape, ranks=ranks, asked=asked):
            asked.add((rank, local_name))
            assert tuple(ranks[rank][local_name].shape) == shape, (local_name, shape)
            return ranks[rank][local_name]

        back = list(hf_tensors(family, layouts, read))
        assert len(back) == len(original)
        for tensor_name, tensor in back:
            assert torch.equal(tensor, original[tensor_name]), (layout, tensor_name)
        for rank, own in enumerate(layouts):  # what was not asked for is a replica of what was
            for local in {local for local in ranks[rank] if (rank, local) not in asked}:
                full = own.global_name(local)
                if tied:
                    full = full.replace("output_layer", "embedding.word_embeddings")
                replicas = [
                    ranks[other][layouts[other].local_name(full)]
                    for other in owners(full, layouts)
                    if (other, layouts[other].local_name(full)) in asked
                ]
                assert any(torch.equal(ranks[rank][local], replica) for replica in replicas), (layout, full)


def test_experts_may_be_split_over_tensor_parallel_ranks_of_their_own(saved):
    directory, family = saved("qwen3_moe", False), family_of("qwen3_moe", False)
    cfg = MegatronConfig(expert_tensor_parallel_size=2, expert_model_parallel_size=2)  # TP 1
    layouts = [
        layout_of(family, cfg, tp_rank=0, pp_rank=0, ep_rank=rank // 2, expert_tp_rank=rank % 2) for rank in range(4)
    ]
    with open_checkpoint(directory) as checkpoint:
        ranks = [dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts]
    fc1 = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    assert [tuple(rank[fc1].shape) for rank in ranks] == [(24, 32)] * 4
    back = dict(hf_tensors(family, layouts, lambda rank, name, shape: ranks[rank][name]))
    original = load_file(directory / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
def test_shards_are_cut_as_megatron_core_cuts_them(saved, name):
    directory, family = saved(name, False), family_of(name, False)
    with open_checkpoint(directory) as checkpoint:
        (whole,) = [
            dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts_of(family, (1, 1, 1, None))
        ]
        halves = [
            dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts_of(family, (2, 1, 1, None))
        ]
    for local, tensor in whole.items():
        parts = [half[local] for half in halves]
        if "local_experts" in local or "norm" in local or "router" in local:
            assert all(torch.equal(part, tensor) for part in parts), local
        elif "linear_fc1" in local:
            gate, up = tensor.chunk(2)
            for rank in (0, 1):
                assert torch.equal(parts[rank], torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])), local
        else:
            assert torch.equal(torch.cat(parts, dim=1 if "proj" in local or "fc2" in local else 0), tensor), local


def test_rows_of_qkv_are_groups_of_query_heads_then_key_then_value():
    family = family_of("qwen2")  # 8 heads in 4 groups, 4 rows each
    q, k, v = (torch.full((rows,), base) for rows, base in ((32, 0.0), (16, 100.0), (16, 200.0)))
    q, k, v = (t + torch.arange(len(t)) // 4 for t in (q, k, v))
    heads = fuse("decoder.layers.0.self_attention.linear_qkv.bias", [q, k, v], family)[::4].tolist()
    assert heads == [0, 1, 100, 200, 2, 3, 101, 201, 4, 5, 102, 202, 6, 7, 103, 203]
    back = separate("decoder.layers.0.self_attention.linear_qkv", torch.tensor(heads).repeat_interleave(4), family)
    assert [part[::4].tolist() for part in back] == [t[::4].tolist() for t in (q, k, v)]


def test_a_rank_reads_only_its_own_rows_and_columns(saved):
    directory, family = saved("qwen3_moe", True), family_of("qwen3_moe")
    own = layouts_of(family, (2, 2, 2, None))[3]  # the second of each
    num_read = {}

    class Counted:
        def __init__(self, tensor_name, source):
            self.tensor_name, self.source = tensor_name, source

        def __getitem__(self, index):
            part = self.source[index]
            num_read[self.tensor_name] = part.numel()
            return part

    with open_checkpoint(directory) as checkpoint:
        held = dict(megatron_tensors(family, own, lambda name: Counted(name, checkpoint[name])))
    assert sum(num_read.values()) == sum(tensor.numel() for tensor in held.values())
    assert not any(".layers.0." in name or ".layers.1." in name for name in num_read)
    assert {name.split(".")[5] for name in num_read if ".experts." in name} == {"2", "3"}


def test_a_tied_head_of_a_last_stage_is_a_copy_that_is_not_exported(saved):
    family = family_of("llama")
    names = {pp: [weight.name for weight in megatron_weights(family, pp)] for pp in (1, 2)}
    assert "output_layer.weight" not in names[1]
    assert names[2] == [*names[1], "output_layer.weight"]
    layouts = layouts_of(family, (1, 2, 1, None))
    with open_checkpoint(saved("llama", True)) as checkpoint:
        ranks = [dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts]
    assert torch.equal(ranks[1]["output_layer.weight"], ranks[0]["embedding.word_embeddings.weight"])
    ranks[1]["output_layer.weight"] = torch.zeros(0)
    exported = dict(hf_tensors(family, layouts, lambda rank, name, shape: ranks[rank][name]))
    assert "lm_head.weight" not in exported
    assert exported["model.embed_tokens.weight"].numel() == 64 * 32


def test_names_are_global_and_numbered_anew_on_each_rank():
    family = family_of("qwen3_moe")
    layout = layouts_of(family, (1, 2, 2, 1))[3]
    name = "decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.weight"
    local = "decoder.layers.2.mlp.experts.local_experts.0.linear_fc1.weight"
    assert layout.local_name(name) == local
    assert layout.global_name(local) == name
    assert layout.holds(name)
    assert not layout.holds(name.replace("experts.2", "experts.1"))
    assert not layout.holds("decoder.layers.0.self_attention.linear_qkv")
    assert layout.holds("output_layer")
    assert not layout.holds("embedding.word_embeddings.weight")


def test_only_what_is_wanted_is_asked_for(saved):
    family = family_of("llama")
    layouts = layouts_of(family, (2, 1, 1, None))
    with open_checkpoint(saved("llama", True)) as checkpoint:
        ranks = [dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts]
        wanted = {"model.layers.2.self_attn.k_proj.weight", "model.norm.weight"}
        asked = []

        def read(rank, name, shape):
            asked.append((rank, name))
            return ranks[rank][name]

        found = dict(hf_tensors(family, layouts, read, only=wanted))
    assert set(found) == wanted
    qkv = "decoder.layers.2.self_attention.linear_qkv.weight"
    assert asked == [(0, qkv), (1, qkv), (0, "decoder.final_layernorm.weight")]


def test_a_rank_that_only_sends_may_answer_with_meta_tensors():
    family = family_of("qwen3_moe", tied=False)
    layouts = layouts_of(family, (2, 2, 2, None))
    found = hf_tensors(family, layouts, lambda rank, name, shape: torch.empty(shape, device="meta"))
    expected = {n: s for weight in megatron_weights(family, 1) for n, s in weight.sources.items()}
    assert {name: tuple(tensor.shape) for name, tensor in found} == expected


def test_what_one_rank_holds_whole_is_not_copied_but_q_k_and_v(saved):
    family = family_of("llama")
    layouts = layouts_of(family, (1, 1, 1, None))
    with open_checkpoint(saved("llama", True)) as checkpoint:
        (held,) = [dict(megatron_tensors(family, own, checkpoint.__getitem__)) for own in layouts]
    memory = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    for name, tensor in hf_tensors(family, layouts, lambda _rank, name, _shape: held[name]):
        is_shared = tensor.untyped_storage().data_ptr() in memory
        assert is_shared is not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")), name


def test_owners_leave_replicas_out():
    family = family_of("qwen3_moe")
    layouts = layouts_of(family, (2, 1, 1, None)) * 2  # two data-parallel replicas
    assert owners("decoder.layers.0.self_attention.linear_qkv", layouts) == [0, 1]
    assert owners("decoder.layers.0.input_layernorm.weight", layouts) == [0]
    assert owners("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2", layouts) == [0]
    assert owners("embedding.word_embeddings.weight", layouts[2:]) == [0, 1]


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_megatron_cores_model_takes_every_tensor_and_computes_as_transformers(saved, name, tied):
    from nemo_rl_lora.policy.megatron.groups import join_processes, own_layout
    from nemo_rl_lora.policy.megatron.layers import build_model, flat_run, transformer_config

    directory, family = saved(name, tied), family_of(name, tied)
    join_processes(MegatronConfig())
    layout = own_layout(family, MegatronConfig())
    assert layout == layouts_of(family, (1, 1, 1, None))[0]
    model = build_model(family, layout, transformer_config(family, MegatronConfig(), torch.float32))
    with open_checkpoint(directory) as checkpoint, torch.no_grad():
        check_checkpoint(family, {n: tuple(s.get_shape()) for n, s in checkpoint.items()}, name)
        converted = dict(megatron_tensors(family, layout, checkpoint.__getitem__))
        parameters = dict(model.named_parameters())
        assert converted.keys() == parameters.keys()
        for local, parameter in parameters.items():
            assert parameter.shape == converted[local].shape
            parameter.copy_(converted[local])
        lengths = (50, 31)
        token_ids = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
        micro = flat_microbatch([token_ids[row, :length] for row, length in enumerate(lengths)])
        attention = AttentionPlan(micro.segments, torch.device("cpu"))
        run = flat_run(micro.position_ids, attention, torch.tensor(family.inverse_frequencies), torch.float32)
        hidden = model(micro.token_ids[None], micro.position_ids[None], None, packed_seq_params=run)[:, 0]
        logits = (hidden @ model.head_weight.T).split(lengths)
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for row, length in enumerate(lengths):
            expected = reference(token_ids[row : row + 1, :length]).logits[0]
            assert (logits[row] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow  # test_parallel.py has a case of each layout, in processes of its own
def test_every_rank_of_megatron_core_holds_what_is_listed_for_it():
    script = Path(__file__).with_name("parameters_of_ranks.py")
    command = [sys.executable, "-m", f"tests.policy.megatron.{script.stem}"]
    output = subprocess.run(command, cwd=script.parents[3], capture_output=True, text=True, check=True).stdout
    checked = 0
    for case in json.loads(output):
        family = family_of(case["family"], case["tied"])
        for own, rank in zip(layouts_of(family, case["layout"]), case["ranks"], strict=True):
            listed = {
                own.local_name(weight.name): list(weight.local_shape(own))
                for weight in megatron_weights(family, own.pp)
                if own.holds(weight.name)
            }
            assert (repr(own), listed) == (rank["layout"], rank["shapes"]), case["family"]
            checked += 1
    assert checked == 39


def flat_microbatch(rows):
    """Whole sequences one after the other, each seeing itself alone."""
    starts = [sum(len(row) for row in rows[:index]) for index in range(len(rows))]
    nothing = torch.empty(0, dtype=torch.int64)
    return Microbatch(
        rows=torch.arange(len(rows)),
        token_ids=torch.cat(rows),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]),
        segments=tuple(
            Segment(start=start, length=len(row), parent=None) for start, row in zip(starts, rows, strict=True)
        ),
        predictor=nothing,
        loss_row=nothing,
        loss_column=nothing,
        target=nothing,
        num_padding_tokens=0,
    )


MODULES = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]


def factors(family, module, dim=4):
    """Random full A and B of each Hugging Face module of a layer, and its base weight."""
    weight = next(w for w in megatron_weights(family, 1) if w.name == f"{module}.weight")
    generator = torch.Generator().manual_seed(len(module))
    shapes = [weight.sources[f"{part}.weight"] for part in hf_names(module)]
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [draw(dim, i) for _, i in shapes], [draw(o, dim) for o, _ in shapes], [draw(o, i) for o, i in shapes]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("part", MODULES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_adapter_shards_update_a_rank_as_the_merged_weight_would(name, part, tp):
    family, module = family_of(name), f"decoder.layers.3.{part}"
    a, b, w = factors(family, module)
    merged = [weight + 0.5 * y @ x for weight, x, y in zip(w, a, b, strict=True)]
    layouts = layouts_of(family, (tp, 1, 1, None))
    whole = dict(zip((f"{m}.weight" for m in hf_names(module)), range(len(w)), strict=True))
    for own in layouts:
        base, expected = (
            next(
                tensor
                for name_, tensor in megatron_tensors(
                    family, own, lambda n, tensors=tensors: tensors[whole[n]] if n in whole else torch.zeros(256, 256)
                )
                if name_ == f"{module}.weight"
            )
            for tensors in (w, merged)
        )
        if part.endswith(("proj", "fc2")):  # A by inputs; B whole once its shards are gathered
            updates = [b[0] @ shard_adapter(module, "A", a[0], own)]
        else:  # A whole once its shards are gathered; B by outputs
            updates = [shard_adapter(module, "B", y, own) @ x for x, y in zip(a, b, strict=True)]
        assert torch.allclose(base + 0.5 * fuse(module, updates, family), expected, atol=1e-5)


@pytest.mark.parametrize("part", MODULES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_adapter_shards_join_to_what_was_sharded(part, tp):
    family, module = family_of("qwen3"), f"decoder.layers.3.{part}"
    a, b, _ = factors(family, module)
    layouts = layouts_of(family, (tp, 1, 1, None))
    for side, tensors in (("A", a), ("B", b)):
        for tensor in tensors:
            shards = [shard_adapter(module, side, tensor, own) for own in layouts]
            assert shards[0].numel() * tp == tensor.numel()
            if side == "B":  # by its outputs, whatever the base
                assert torch.equal(torch.cat(shards), tensor)
            assert torch.equal(join_adapter(module, side, shards), tensor)


@pytest.mark.parametrize("part", ["self_attention.linear_qkv", "mlp.linear_fc1"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_shared_adapter_becomes_canonical_and_back_exactly(part, tp):
    family, module = family_of("qwen3"), f"decoder.layers.0.{part}"
    a, b, w = factors(family, module)
    layouts = layouts_of(family, (tp, 1, 1, None))
    shared_b = [share(module, "B", [shard_adapter(module, "B", y, own) for y in b], family) for own in layouts]
    pieces = zip(*(unshare(module, "B", shard, family) for shard in shared_b), strict=True)
    for original, shards in zip(b, pieces, strict=True):
        assert torch.equal(join_adapter(module, "B", shards), original)
    copies = unshare(module, "A", a[0], family)
    assert len(copies) == len(hf_names(module))
    assert all(torch.equal(copy, a[0]) for copy in copies)
    assert len({copy.data_ptr() for copy in copies}) == len(copies)
    assert torch.equal(share(module, "A", copies, family), a[0])
    whole_b = share(module, "B", b, family)
    assert torch.allclose(whole_b @ a[0], fuse(module, [y @ a[0] for y in b], family))


def test_modules_with_an_a_each_have_no_shared_form():
    family, module = family_of("llama"), "decoder.layers.0.mlp.linear_fc1"
    a, _, _ = factors(family, module)
    with pytest.raises(ValueError) as error:
        share(module, "A", a, family)
    assert str(error.value) == (
        "adapter of decoder.layers.0.mlp.linear_fc1: has an A for each of gate_proj, up_proj, and they differ, so they "
        "cannot become one shared A. Name those modules in the targets in place of the fused layer."
    )


def test_a_checkpoint_in_several_files_reads_like_one(saved, tmp_path):
    directory = saved("qwen3_moe", False)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "consolidated.safetensors").write_bytes(b"other weights in a format of their own")
    original = load_file(directory / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(original)
        assert all(torch.equal(checkpoint[name][:], tensor) for name, tensor in original.items())


def test_a_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError) as error, open_checkpoint(tmp_path):
        pass
    assert str(error.value) == (
        f"policy.model_name={str(tmp_path)!r}: holds no model.safetensors, and the Megatron backend reads safetensors "
        f"alone. Save the model again with save_pretrained of transformers."
    )
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="holds no model-00002-of-00002.safetensors"), open_checkpoint(tmp_path):
        pass


def test_a_checkpoint_must_be_that_of_its_config():
    family = family_of("qwen2")
    good = {name: shape for weight in megatron_weights(family, 1) for name, shape in weight.sources.items()}
    check_checkpoint(family, good, "a/model")
    check_checkpoint(
        family,
        {**good, "lm_head.weight": (64, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)},
        "a/model",
    )
    bad = {**good, "model.norm.weight": (31,), "model.extra.weight": (1,)}
    del bad["model.layers.0.self_attn.q_proj.bias"]
    with pytest.raises(ValueError) as error:
        check_checkpoint(family, bad, "a/model")
    assert str(error.value) == (
        "policy.model_name='a/model': its tensors are not those of the Qwen2ForCausalLM that its config.json describes "
        "(1 missing: model.layers.0.self_attn.q_proj.bias; 1 unexpected: model.extra.weight; 1 of another shape: "
        "model.norm.weight (31,) instead of (32,)). Use files that belong together, as transformers' save_pretrained "
        "writes."
    )
    untied = family_of("qwen2", tied=False)
    with pytest.raises(ValueError, match=r"\(1 missing: lm_head.weight\)"):
        check_checkpoint(untied, good, "a/model")
