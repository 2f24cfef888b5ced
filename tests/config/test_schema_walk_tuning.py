"""As test_schema_walk_effects.py, for the keys that are SFT's and DPO's own: `sft`, `dpo` and `data`.

A key is read by the product's own code while a driver plans or trains, or every other value is refused when the
configuration is loaded, or it stands below with the reason why its values mean the same.
"""

import json

import pytest

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.config.schema import leaves
from tests.config.schema_walk import flippable_leaves
from tests.config.traced_run import Reads, traced_run
from tests.tiny_models import make_character_llama

SAME_MEANING = {
    "data.validation.seed": "seeds held-out and generated rows, and a validation set of SFT has neither",
}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}
ROWS = {
    "ResponseDataset": {"input": "ask", "output": "answer"},
    "openai_format": CHAT,
    "BinaryPreferenceDataset": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    "gsm8k_solutions": {
        "question": "ask",
        "6b_finetuning": {"is_correct": True, "solution": "good"},
        "6b_verification": {"is_correct": False, "solution": "bad"},
        "175b_finetuning": {"is_correct": False, "solution": "worse"},
        "175b_verification": {"is_correct": False, "solution": "worst"},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_character_llama(path)
    return path


@pytest.fixture(scope="module", params=["sft", "dpo"])
def walked(request, model, tmp_path_factory):
    """(algorithm, what runs on each kind of data read)."""
    algorithm, reads = request.param, Reads()
    names = (
        ("ResponseDataset", "openai_format") if algorithm == "sft" else ("BinaryPreferenceDataset", "gsm8k_solutions")
    )
    for number, name in enumerate(names):
        root = tmp_path_factory.mktemp(f"{algorithm}_{name}")
        lines = [ROWS[name] | ({"question": f"ask {i}"} if "question" in ROWS[name] else {}) for i in range(8)]
        (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        dataset = f"{{dataset_name: {name}, data_path: '{root / 'train.jsonl'}', rate: 2}}"
        overrides = [
            f"policy.model_name={model}",
            "policy.dtensor_cfg.lora_cfg.enabled=true",
            "policy.precision=float32",
            "policy.train_global_batch_size=2",
            "policy.max_total_sequence_length=128",
            f"policy.dynamic_batching.enabled={'true' if number else 'false'}",
            f"{algorithm}.max_num_steps=1",
            f"data.train=[{dataset}, {dataset}]",
            f"data.validation={{_override_: true, dataset_name: {name}, data_path: '{root}', split: train}}",
            *(["data.train.0.split_validation_size=0.3"] if number else []),
            *(
                ["dpo.loss_type=robust", "dpo.label_smoothing=0.1", "dpo.sft_loss_weight=1"]
                if algorithm == "dpo"
                else []
            ),
            f"checkpointing.checkpoint_dir={root}/results",
            f"logger.log_dir={root}/logs",
            "logger.plot.enabled=false",
        ]
        assert traced_run(reads, overrides, algorithm=algorithm) == 0
    if algorithm == "sft":
        kept = [text for text in overrides if not text.startswith(("sft.max_num", "checkpointing", "logger.log_dir"))]
        phases = "sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1}]"
        places = [f"checkpointing.checkpoint_dir={root}/phases", f"logger.log_dir={root}/logs_of_phases"]
        assert traced_run(reads, [*kept, *places, phases], algorithm=algorithm) == 0
    return algorithm, reads


def test_every_key_of_the_loop_and_the_data_is_read_or_refused(walked):
    algorithm, reads = walked
    config = load_config(None, [], algorithm)
    keys = {".".join(path) for path, _ in leaves(type(config)) if path[0] in (algorithm, "data")}
    assert f"{algorithm}.max_num_steps" in keys
    accepted = {key for key, _ in flippable_leaves(config)}
    read = {key.replace("data.train.0.", "data.train.") for key in reads.keys}
    merged_by_loading = {key for key in keys if key.startswith("data.default.")}  # test_schema_walk_effects.py
    silent = (keys & accepted) - read - merged_by_loading - SAME_MEANING.keys()
    assert not silent, f"nothing reads or refuses {', '.join(sorted(silent))}"


def test_a_pass_without_gradient_has_one_key(model):
    with pytest.raises(
        ValueError, match=r"policy.logprob_batch_size=3: SFT cuts passes without gradient by sft.val_micro"
    ):
        load_config(None, ["+policy.logprob_batch_size=3"], "sft")
