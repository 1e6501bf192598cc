"""Released weights: found in a directory or on the hub, checked, read, and put into a transformers model without a key left over."""

import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

from hyper_sd.config import FilesConfig

Tensors = dict[str, Tensor]


def find(files: FilesConfig, key: str, name: str | None = None) -> Path:
    """Where a file of the model is on this machine, by default its weights; from the hub it is fetched. ValueError naming the key."""
    name = name or files.file
    if files.path is None or name is None:
        raise ValueError(f"{key}.{'file' if files.path else 'path'} must be set: a directory or a hub id, and the name of a file in it")
    if is_directory(files, key):
        path = Path(files.path) / name
        if not path.is_file():
            raise ValueError(f"{key}.path={files.path} holds no {name}; give the directory that has it, or change {key}.file")
        return path
    try:
        return Path(hf_hub_download(files.path, name, revision=files.revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key}.path={files.path} is no directory, and {name} cannot be had from the hub at {key}.revision={files.revision}: {reason}"
        ) from error


def is_directory(files: FilesConfig, key: str) -> bool:
    """Whether the files are in a local directory. Raises ValueError for a hub id with neither a commit nor a checksum."""
    path = files.path or ""
    if Path(path).is_dir():
        return True
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(f"{key}.path={path} is no directory; give one that holds the model's files, or a hub id such as owner/name")
    if not re.fullmatch(r"[0-9a-f]{40}", files.revision or "") and files.sha256 is None:
        raise ValueError(
            f"{key}.revision={files.revision} must be the full hash of a commit for the hub id {key}.path={path}, or {key}.sha256 be set: "
            "otherwise the model could change"
        )
    return False


def check(files: FilesConfig, key: str) -> Path:
    """`find` the weights and compare their SHA-256, where it is known. Raises ValueError before anything is read as weights."""
    path = find(files, key)
    if files.sha256 is None:
        return path
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != files.sha256:
        raise ValueError(
            f"{key}.sha256={files.sha256} is not that of {path}, which has {found}; fetch the file again, or set {key}.sha256=null if it "
            "is meant to be another"
        )
    return path


def check_clip(files: FilesConfig, key: str) -> None:
    """`check` a CLIPModel's weights, and that its configuration and a tokenizer lie beside them."""
    find(files, key, "config.json")
    try:
        find(files, key, "tokenizer.json")
    except ValueError:
        find(files, key, "vocab.json")
    check(files, key)


def read(path: Path, key: str) -> Tensors:
    """The tensors of a .safetensors file, or of a pickled original: torch's restricted unpickler makes tensors and nothing else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict", content)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{key}.file: {path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{key}.file: {path} holds more than tensors; it is not the released file")
    return content


def rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """`name` after every rule (pattern, replacement), in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def load_model(cls: Any, config: Any, tensors: Mapping[str, Tensor], key: str, **options: Any) -> Any:
    """A frozen float32 model of a transformers class with exactly these tensors; ValueError if one is missing, extra or misshapen."""
    logging.disable_progress_bar()
    try:
        model, found = cls.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True, **options
        )
    except RuntimeError as error:
        raise ValueError(f"{key}.file: these weights do not fit a {cls.__name__}: {error}") from error
    finally:
        logging.enable_progress_bar()
    refuse_misfits(cls.__name__, {name: sorted(map(str, found[name])) for name in ("missing_keys", "unexpected_keys")}, key)
    return frozen(model)


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], key: str) -> Any:
    """`load_model` for a plain module."""
    try:
        found = module.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{key}.file: these weights do not fit: {error}") from error
    refuse_misfits(type(module).__name__, {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys}, key)
    return frozen(module)


def refuse_misfits(owner: str, misfits: Mapping[str, Sequence[str]], key: str) -> None:
    """Raise ValueError if there are any: transformers itself only warns, and the rest of the model would be random."""
    wrong = [f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}" for kind, names in misfits.items() if names]
    if wrong:
        raise ValueError(f"{key}.file: these are not the weights of this {owner}: {'; '.join(wrong)}")


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)
