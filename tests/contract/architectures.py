"""Every architecture that is proven: a tiny random model, a batch, and what must be routed by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from monkeyjump import MonkeyJumpConfig
from monkeyjump.tuner.model import routers
from tiny import SHAPE, VOCAB, bert, llama, position_dependent, qwen2, tokens, trainable

IMAGE_TOKEN, VIDEO_TOKEN = 60, 61
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SHAPE, **SPECIAL, "num_key_value_heads": 2}
SEQ2SEQ = {
    "d_model": 32,
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    **SPECIAL,
}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}


@dataclass(frozen=True)
class Architecture:
    """One proven architecture.

    Attributes:
        name: as `monkeyjump methods --routed` prints it.
        build: makes the tiny base model, the same every time.
        batch: makes a batch with labels where the model takes them; rows of several lengths.
        routed, shared: what the default targets come to in the last block.
        config: what the config needs beyond defaults.
        padded, generates: whether there are masks, and `generate`.
        encoder_decoder: whether labels become the tokens of a decoder.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    routed: tuple[str, ...]
    shared: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    padded: bool = True
    generates: bool = True
    encoder_decoder: bool = False


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


# ---------------------------------------------------------------------- batches


def text(lengths: tuple[int, ...] = (8, 5, 6)) -> dict[str, Tensor]:
    """Rows padded on the right with a real token's id: only the mask says that it is padding."""
    ids = tokens(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def classes() -> dict[str, Tensor]:
    return {**text(), "labels": torch.tensor([0, 1, 2])}


def source_and_target() -> dict[str, Tensor]:
    return {**text(), "labels": tokens(3, 6, seed=9)}


def sound() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "labels": tokens(2, 6)}


def images(size: int, labels: bool = True) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))
    return {"pixel_values": pixels, **({"labels": torch.tensor([0, 2])} if labels else {})}


def image_and_video() -> dict[str, Tensor]:
    """Two rows, each with an image (two patches of 8 x 8) and a video of three frames before its text."""
    generator = torch.Generator().manual_seed(4)
    own = text((7, 5))
    places = torch.tensor([IMAGE_TOKEN] * 10 + [VIDEO_TOKEN] * 4).expand(2, -1)
    return {
        "input_ids": torch.cat([places, own["input_ids"].clamp(max=IMAGE_TOKEN - 1)], 1),
        "attention_mask": torch.cat([torch.ones_like(places), own["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(places, -100), own["labels"].clamp(max=IMAGE_TOKEN - 1)], 1),
        "pixel_values": torch.randn(2, 2, 3, 8, 8, generator=generator),
        "image_sizes": torch.tensor([[8, 8], [8, 8]]),
        "pixel_values_videos": torch.randn(2, 3, 3, 8, 8, generator=generator),
    }


# ---------------------------------------------------------------------- models


def gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=layers))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    )


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SHAPE, **SPECIAL))


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT))


def opt() -> nn.Module:
    shape = {k: v for k, v in SHAPE.items() if k != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**shape, **SPECIAL, ffn_dim=48, word_embed_proj_dim=32))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=2))


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=VOCAB, **SEQ2SEQ, max_position_embeddings=64))


def whisper() -> nn.Module:
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(vocab_size=VOCAB, **SEQ2SEQ, **lengths))


def falcon() -> nn.Module:
    shape = {k: SHAPE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return hf.FalconForCausalLM(hf.FalconConfig(**shape, **SPECIAL))


def deberta_v2() -> nn.Module:
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SHAPE))


def distilbert() -> nn.Module:
    return hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0)
    )


def modernbert() -> nn.Module:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SHAPE, **SPECIAL, cls_token_id=1, sep_token_id=2))


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0, **SPECIAL)
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, image_size=12, num_labels=3))


def clip_vision() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, image_size=12))


def swin() -> nn.Module:
    # 12 x 12 patches in windows of 5: padding to 15 x 15, every second layer shifted; then 6 x 6
    config = hf.SwinConfig(
        image_size=24, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=5, num_labels=3
    )
    return hf.SwinForImageClassification(config)


def llava_onevision() -> nn.Module:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, image_size=8, vision_use_head=False),
            text_config=hf.Qwen2Config(**TEXT),
            image_token_id=IMAGE_TOKEN,
            video_token_id=VIDEO_TOKEN,
            image_grid_pinpoints=[[8, 8], [8, 16]],
        )
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
KVQ = (QKV[1], QKV[2], QKV[0])  # in the order in which the block defines them
LLAMA = {"routed": QKV, "shared": ("self_attn.o_proj", "mlp.gate_proj")}
BART = {
    "routed": (*KVQ, "encoder_attn.q_proj"),
    "shared": ("self_attn.out_proj", *(f"encoder_attn.{p}_proj" for p in ("k", "v", "out"))),
}
VIT = {"routed": tuple(f"attention.{p}_proj" for p in "qkv"), "shared": ("attention.o_proj",)}
NO_TEXT = {"padded": False, "generates": False}

ARCHITECTURES = (
    Architecture("Llama", llama, text, **LLAMA),
    Architecture("Qwen 2", qwen2, text, **LLAMA),
    Architecture("Gemma 3", seeded(gemma3), text, **LLAMA),
    Architecture("Mixtral (attention)", seeded(mixtral), text, QKV, ("self_attn.o_proj",)),
    Architecture("GPT-2", seeded(gpt2), text, ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"), ("attn.c_proj",)),
    Architecture(
        "GPT-NeoX",
        seeded(gpt_neox),
        text,
        ("attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("attention.dense",),
    ),
    Architecture(
        "Phi-3",
        seeded(phi3),
        text,
        ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        ("self_attn.o_proj",),
    ),
    Architecture("OPT", seeded(opt), text, KVQ, ("self_attn.out_proj",)),
    Architecture(
        "Falcon",
        seeded(falcon),
        text,
        ("self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("self_attention.dense",),
    ),
    Architecture(
        "DeBERTa-v2",
        seeded(deberta_v2),
        text,
        tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
        ("attention.output.dense",),
        generates=False,
    ),
    Architecture(
        "DistilBERT",
        seeded(distilbert),
        text,
        tuple(f"attention.{p}_lin" for p in "qkv"),
        ("attention.out_lin",),
        generates=False,
    ),
    Architecture(
        "ModernBERT", seeded(modernbert), text, ("attn.Wqkv", "mlp.Wi", "mlp.Wo"), ("attn.Wo",), generates=False
    ),
    Architecture(
        "BERT",
        bert,
        classes,
        tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
        ("attention.output.dense",),
        {"task_type": "SEQ_CLS"},
        generates=False,
    ),
    Architecture(
        "T5",
        seeded(t5),
        source_and_target,
        (*(f"layer.0.SelfAttention.{p}" for p in "qkv"), "layer.1.EncDecAttention.q"),
        ("layer.0.SelfAttention.o", *(f"layer.1.EncDecAttention.{p}" for p in "kvo")),
        encoder_decoder=True,
    ),
    Architecture("BART", seeded(bart), source_and_target, **BART, encoder_decoder=True),
    Architecture("Whisper", seeded(whisper), sound, **BART, **NO_TEXT, encoder_decoder=True),
    Architecture("Mamba", seeded(mamba), text, ("mixer.in_proj", "mixer.x_proj"), ()),
    Architecture("ViT", seeded(vit), lambda: images(12), **VIT, **NO_TEXT),
    Architecture(
        "CLIP vision", seeded(clip_vision), lambda: images(12, labels=False), KVQ, ("self_attn.out_proj",), **NO_TEXT
    ),
    Architecture("Swin", seeded(swin), lambda: images(24), **VIT, **NO_TEXT),
    Architecture("LLaVA-OneVision (language model)", seeded(llava_onevision), image_and_video, **LLAMA),
    Architecture(
        "LLaVA-OneVision (vision tower)",
        seeded(llava_onevision),
        image_and_video,
        KVQ,
        ("self_attn.out_proj",),
        {"target_modules": r".*vision_tower.*\.(q_proj|k_proj|v_proj|out_proj)"},
        padded=False,
    ),
)
BY_NAME = {a.name: a for a in ARCHITECTURES}


def each(condition: Callable[[Architecture], bool] = lambda a: True) -> Any:
    """Parametrizes a test over the architectures; passing it is part of the proof."""
    return pytest.mark.parametrize(
        "architecture",
        [
            pytest.param(a, id=a.name.replace(" ", "_"), marks=pytest.mark.proves("architecture", a.name))
            for a in ARCHITECTURES
            if condition(a)
        ],
    )


def untouched(architecture: Architecture, **routing: Any) -> PeftModel:
    """Routed with default targets, the adapters at their start."""
    torch.manual_seed(1)
    settings = {"center_init": "random", **architecture.config, **routing}
    return get_peft_model(architecture.build(), MonkeyJumpConfig(**settings))


def routed(architecture: Architecture, **routing: Any) -> PeftModel:
    """Routed with default targets, and adapters that do something; no two elements are alike."""
    model = untouched(architecture, **{"lora_dropout": 0.0, "temperature": 0.3, **routing})
    position_dependent(trainable(model).values())
    position_dependent(router.centers["default"] for router in routers(model))
    return model.eval()


def row(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row of a batch, without its padding."""
    length = int(batch["attention_mask"][index].sum())
    own = {name: value[index : index + 1] for name, value in batch.items()}
    masked = ("input_ids", "attention_mask")
    return {name: value[:, :length] if name in masked else value for name, value in own.items() if name != "labels"}


def output_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch)
    return result.logits if "logits" in result else result.last_hidden_state


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result = model(**batch)
    return result.loss if "labels" in batch else result.pooler_output.square().mean()
