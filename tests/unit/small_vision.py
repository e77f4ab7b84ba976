"""A LLaVA-OneVision of random weights with its processor, on disk as on the Hub, for pictures of 28 x 28."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from small_inputs import tokenizer
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil

GRID = [[28, 28], [28, 56], [56, 28], [56, 56]]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} "
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}> {% endif %}{% endfor %} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


def write_processor(folder: Path, template: str | None = TEMPLATE) -> Path:
    words = tokenizer(None)
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    words.save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=GRID).save_pretrained(folder)
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    config(words).save_pretrained(folder)
    return folder


def config(words) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words) + 8,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
    )


def vision_model(words) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config(words))
