"""The base model of a run: its config alone, its skeleton without weights, or the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import demo_model
from monkeyjump.training.config import Model

DEMO = "demo"


def place_of(model: Model, say: Callable[[str], None] = lambda text: None) -> str:
    """The folder or Hub id of the model; the demo's is fetched first where it is not there yet."""
    return str(demo_model(say)) if model.path == DEMO else model.path


def model_config(model: Model, place: str) -> Any:
    """transformers' config. Needs config.json and nothing else. Raises InputError."""
    try:
        return AutoConfig.from_pretrained(_folder_of(place), revision=model.revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.path: '{place}' cannot be read: {str(error).splitlines()[0]}",
            hint="give a folder with config.json, a tokenizer and safetensors weights, or a Hub id",
        ) from error


def skeleton(model: Model, place: str) -> Any:
    """The model on the meta device: every module and shape, no weight."""
    config = model_config(model, place)
    dtype = _dtype(model, config)
    with torch.device("meta"):
        built = _auto_class(config, place).from_config(config, dtype=dtype, **_attention(model))
    return built.eval()


def load(model: Model, place: str) -> Any:
    """The model with its weights, in evaluation mode. Safetensors only: nothing is unpickled. Raises InputError."""
    config = model_config(model, place)
    dtype: Any = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    options = {"dtype": dtype, "use_safetensors": True, "revision": model.revision, **_attention(model)}
    try:
        return _auto_class(config, place).from_pretrained(place, **options).eval()
    except OSError as error:
        raise InputError(
            f"model.path: the weights of '{place}' cannot be read: {str(error).splitlines()[0]}",
            hint="it needs complete weights in safetensors format",
        ) from error


def has_weights(place: str) -> bool:
    """False for a local folder (or config.json) without weights; a Hub id is taken to have them."""
    folder = Path(_folder_of(place))
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def has_tokenizer(place: str) -> bool:
    folder = Path(_folder_of(place))
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def _folder_of(place: str) -> str:
    path = Path(place)
    return str(path.parent) if path.name == "config.json" and path.is_file() else place


def _attention(model: Model) -> dict[str, str]:
    return {} if model.attention is None else {"attn_implementation": model.attention}


def _dtype(model: Model, config: Any) -> torch.dtype:
    named = getattr(torch, model.dtype) if model.dtype != "auto" else config.dtype
    return named or torch.float32


def _auto_class(config: Any, place: str) -> Any:
    """A model that writes text, from text alone or from text and images."""
    for mapping, auto in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            return auto
    raise InputError(
        f"model.path: '{place}' is a {config.model_type}, which does not write text",
        hint="give a causal language model, or one that takes images and text",
    )
