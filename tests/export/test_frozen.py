"""A model's weights in another dtype: what lies beside them."""

import json
import shutil

from nemo_rl_lora.export.frozen import write_frozen
from tests.export.exports import tensors_of


def test_what_is_frozen_has_the_dtype_and_names_no_code(tiny_llama, tmp_path):
    source, target = shutil.copytree(tiny_llama, tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    before = {}
    for name in ("config.json", "tokenizer_config.json"):
        before[name] = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(before[name] | {"auto_map": {"AutoConfig": "mine.Config"}}))

    write_frozen(source, source, target, "bfloat16")

    written = {name: json.loads((target / name).read_text()) for name in before}
    assert written == before | {"config.json": before["config.json"] | {"dtype": "bfloat16"}}
    assert {str(tensor.dtype) for tensor in tensors_of(target).values()} == {"torch.bfloat16"}
