"""Prompts with pictures or a video, through the model's own processor.

The processor writes as many placeholder tokens into the text as the model will make of the picture, and the
model puts its picture states there. A video needs the processor's video part, which needs torchvision. Where
that is missing, the frames of a LLaVA-OneVision model go one by one through its picture part, of which the
first tile is the whole picture resized: what the video part makes of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaOnevisionProcessor
from transformers.utils import is_torchvision_available

from monkeyjump.tasks.description import Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.examples import Example
from monkeyjump.tasks.prompts import IGNORED, Prompts, Tokens, Turn, plain_prompt
from monkeyjump.tasks.stacking import VIDEOS


class StillProcessor(LlavaOnevisionProcessor):
    """LLaVA-OneVision's processor without its video part, which cannot be made without torchvision."""

    def __init__(  # transformers reads the parts of a processor off this signature
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            None,
            num_image_tokens=num_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            video_token=video_token,
            vision_aspect_ratio=vision_aspect_ratio,
        )


def load_processor(name: str | Path) -> Any:
    """The processor of a vision-language model, by folder or Hub id. Raises InputError."""
    try:
        if is_torchvision_available() or AutoConfig.from_pretrained(name).model_type != "llava_onevision":
            return AutoProcessor.from_pretrained(name)
        settings, _ = LlavaOnevisionProcessor.get_processor_dict(name)
        known = ("num_image_tokens", "vision_feature_select_strategy", "chat_template", "vision_aspect_ratio")
        tokens = ("image_token", "video_token")
        return StillProcessor(
            AutoImageProcessor.from_pretrained(name, backend="pil"),
            AutoTokenizer.from_pretrained(name),
            **{key: settings[key] for key in (*known, *tokens) if settings.get(key) is not None},
        )
    except (OSError, ImportError, ValueError) as error:
        raise InputError(
            f"model: the processor of '{name}' cannot be read: {str(error).strip().splitlines()[0]}",
            hint="it needs preprocessor_config.json and a tokenizer; some processors also need torchvision",
        ) from error


@dataclass
class VisionPrompts(Prompts):
    """`Prompts` for a model with pictures; rows without any are fine too."""

    processor: Any = field(default=None, kw_only=True)

    @classmethod
    def of(cls, processor: Any, max_length: int | None = None) -> VisionPrompts:
        return cls(processor.tokenizer, max_length, processor=processor)

    @property
    def template(self) -> str | None:
        return self.processor.chat_template

    def _render(self, turns: Sequence[Turn], reply: bool = True) -> str:
        structured = [
            {"role": turn["role"], "content": [*turn.get("media", []), {"type": "text", "text": turn["content"]}]}
            for turn in turns
        ]
        return self.processor.apply_chat_template(structured, tokenize=False, add_generation_prompt=reply)

    def turns(self, task: Task, example: Example, limit: int | None = None) -> list[Turn]:
        turns = super().turns(task, example, limit)
        if task.media and example.media:
            count = len(example.media) if task.media.kind == "image" else 1
            first = next(turn for turn in turns if turn["role"] == "user")
            first["media"] = [{"type": task.media.kind}] * count
        return turns

    def pieces(self, turns: Sequence[Turn], task: Task) -> list[tuple[str, bool]]:
        if self.template:
            return super().pieces(turns, task)
        token = {"image": self.processor.image_token, "video": self.processor.video_token}
        marks = "".join(token[item["type"]] + "\n" for turn in turns for item in turn.get("media", []))
        return [(marks + plain_prompt(turns, task), False)]

    def _encoded(self, pieces: Sequence[tuple[str, bool]], example: Example) -> dict[str, Any]:
        if not example.media:
            return super()._encoded(pieces, example)
        (first, _), *rest = pieces  # all pictures are in the first user turn
        ids, tensors = self._with_media(first, list(example.media))
        after = super()._encoded(rest, example) if rest else {"input_ids": [], "labels": []}
        return {
            **tensors,
            "input_ids": ids + after["input_ids"],
            "labels": [IGNORED] * len(ids) + after["labels"],
        }

    def _with_media(self, text: str, media: list[Any]) -> tuple[Tokens, dict[str, Any]]:
        options = {"add_special_tokens": not self.template}
        if self.processor.video_token not in text:
            found = self.processor(text=[text], images=[media], return_tensors="pt", **options)
        elif "video_processor" in self.processor.get_attributes():
            found = self.processor(text=[text], videos=[media], return_tensors="pt", **options)
        else:
            frames = [self.processor.image_processor(frame, return_tensors="pt").pixel_values[0][0] for frame in media]
            video = torch.stack(frames)[None]  # [1, frames, 3, H, W]
            written = self.processor.replace_video_token({VIDEOS: video}, 0)
            found = self.processor.tokenizer(
                [text.replace(self.processor.video_token, written)], return_tensors="pt", **options
            )
            found[VIDEOS] = video
        tensors = dict(found)
        del tensors["attention_mask"]
        return tensors.pop("input_ids")[0].tolist(), tensors
