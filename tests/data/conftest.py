import types

import pytest

from nemo_rl_lora.config.data import DataConfig

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


@pytest.fixture
def make_config():
    """make_config(train, ...) -> what load_prompt_sets reads of a configuration."""

    def make(train, *, max_total=512, env_name="last_number", **data):
        data = {"train": train, "default": {"env_name": env_name}, **data}
        policy = types.SimpleNamespace(max_total_sequence_length=max_total)
        return types.SimpleNamespace(data=DataConfig.model_validate(data), policy=policy)

    return make
