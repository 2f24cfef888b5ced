import functools
import json
import types

import pytest

from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.config.load import CONFIG_DIR, read_tree

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} \n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """Splits at spaces; ids are those of the words met, so that ids can be read back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<e>", "user", "system", "assistant", ":", "What", "is", "+", "?", "Reply", "number"]
    words += [str(i) for i in range(100)]
    bpe = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<e>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>", unk_token="<e>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def smol_path():
    """The directory of SmolLM2-135M-Instruct's own tokenizer."""
    from huggingface_hub import constants

    from nemo_rl_lora.models.source import resolve_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct", weights=False).path


@pytest.fixture(scope="session")
def smol(smol_path):
    """smol(chat_template="default") -> SmolLM2's tokenizer with this template."""
    from nemo_rl_lora.models.source import load_tokenizer

    return functools.cache(lambda chat_template="default": load_tokenizer(smol_path, chat_template))


@pytest.fixture(scope="session")
def sft_template():
    """The chat template that sft.yaml sets."""
    return read_tree(CONFIG_DIR / "sft.yaml")["policy"]["tokenizer"]["chat_template"]


@pytest.fixture
def make_config():
    """make_config(train, ...) -> what the loaders read of a configuration."""

    def make(train, *, max_total=512, env_name="last_number", **data):
        data = {"train": train, "default": {"env_name": env_name}, **data}
        policy = types.SimpleNamespace(max_total_sequence_length=max_total)
        return types.SimpleNamespace(data=DataConfig.model_validate(data), policy=policy)

    return make


@pytest.fixture
def write(tmp_path):
    """write(*rows, name="rows.jsonl") -> the path of a file of these rows, one a line."""

    def write_rows(*rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write_rows
