"""What single architectures need beyond the contract: cross-attention, experts, towers, silent modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from architectures import BY_NAME, VISION, image_and_video, loss_of, mamba, output_of, routed, source_and_target, text
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from monkeyjump import MonkeyJumpConfig, describe_routing, record_routing
from monkeyjump.tuner.gates import gate_of
from monkeyjump.tuner.model import routers
from tiny import gates, trainable

T5, MIXTRAL, LLAVA, SWIN = (
    BY_NAME[name] for name in ("T5", "Mixtral (attention)", "LLaVA-OneVision (language model)", "Swin")
)
BOTH_TOWERS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# ---------------------------------------------------------------------- T5


@pytest.mark.proves("architecture", "T5")
@pytest.mark.parametrize("shared", [[], ["q"], None])
def test_cross_attention_keys_and_values_are_shared_whatever_is_asked(shared: list[str] | None) -> None:
    model = routed(T5, shared_modules=shared)
    for block in describe_routing(model).blocks:
        assert not {"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"} & set(block.routed)
    cross = model.get_submodule("base_model.model.decoder.block.1.layer.1.EncDecAttention")
    assert gate_of(cross.k, "default") is gate_of(cross.v, "default") is None
    x = torch.randn(1, 3, 32)  # called outside the block: a routed layer would refuse
    a, b = cross.k.lora_A["default"].weight, cross.k.lora_B["default"].weight
    torch.testing.assert_close(cross.k(x), cross.k.base_layer(x) + cross.k.scaling["default"] * (x @ a.T @ b.T))


@pytest.mark.proves("architecture", "T5")
def test_decoder_and_encoder_route_their_own_tokens() -> None:
    model, batch = routed(T5), source_and_target()
    with record_routing(model) as record:
        model(**batch)
    attended = int(batch["attention_mask"].sum())
    assert {n: c for n, c in record.tokens.items() if n.startswith("encoder")} == {
        "encoder.block.0": attended,
        "encoder.block.1": attended,
    }
    assert {c for n, c in record.tokens.items() if n.startswith("decoder")} == {batch["labels"].numel()}


# ---------------------------------------------------------------------- Mixtral


@pytest.mark.proves("architecture", "Mixtral (attention)")
def test_it_is_said_that_experts_in_parameters_get_nothing(caplog: pytest.LogCaptureFixture) -> None:
    routed(MIXTRAL)
    said = [m for m in messages(caplog) if "experts of this model are parameters" in m]
    assert said
    assert "model.layers.0.mlp.experts.gate_up_proj" in said[0]
    caplog.clear()
    routed(BY_NAME["Llama"])
    routed(BY_NAME["Mamba"])  # its convolution has three axes, too
    assert not [m for m in messages(caplog) if "experts" in m]


@pytest.mark.proves("architecture", "Mixtral (attention)")
def test_naming_a_parameter_of_experts_says_what_it_is() -> None:
    with pytest.raises(
        ValueError, match=r"target_modules names 'gate_up_proj'.*layers\.0.*is a parameter and no module"
    ):
        routed(MIXTRAL, target_modules=["q_proj", "gate_up_proj"])


@pytest.mark.proves("architecture", "Mixtral (attention)")
def test_adapters_on_expert_parameters_stay_unrouted(tmp_path: Path) -> None:
    own = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    model, batch = routed(MIXTRAL, **own), text()
    assert all(block.routed == ("self_attn.q_proj", "self_attn.v_proj") for block in describe_routing(model).blocks)
    plain = get_peft_model(MIXTRAL.build(), LoraConfig(r=8, **own))
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(plain).items()}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MIXTRAL.build(), tmp_path).eval()
    assert torch.equal(output_of(loaded, batch), output_of(model, batch))
    loss_of(model.train(), batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())


# ---------------------------------------------------------------------- fused projections


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Phi-3"])
def test_fused_projections_are_one_slot_and_it_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    routed(BY_NAME[name])
    said = [m for m in messages(caplog) if "fused projections are one slot" in m]
    assert len(said) == 1
    assert BY_NAME[name].routed[0] in said[0]


# ---------------------------------------------------------------------- LLaVA-OneVision


@pytest.mark.proves("architecture", "LLaVA-OneVision (language model)")
def test_vision_tower_stays_as_it_is_by_default() -> None:
    model = routed(LLAVA)
    assert {r.name.rpartition(".layers.")[0] for r in routers(model)} == {"model.language_model"}
    assert not [n for n in trainable(model) if "vision_tower" in n]


@pytest.mark.proves("architecture", "LLaVA-OneVision (language model)")
def test_names_that_reach_the_vision_tower_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    model = routed(LLAVA, target_modules=BOTH_TOWERS)
    said = [m for m in messages(caplog) if "reaches beyond the language model model.language_model" in m]
    assert len(said) == 1
    assert "model.language_model: model.vision_tower.encoder; exclude_modules" in said[0]
    kept = routed(LLAVA, target_modules=BOTH_TOWERS, exclude_modules=r".*vision_tower.*")
    assert {r.name.rpartition(".layers.")[0] for r in routers(kept)} == {"model.language_model"}
    loss_of(model.train(), image_and_video()).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())


@pytest.mark.proves("architecture", "LLaVA-OneVision (vision tower)")
def test_each_frame_of_a_video_is_a_row_of_the_vision_tower() -> None:
    model = routed(LLAVA, target_modules=BOTH_TOWERS, top_k=2)
    found = gates(model, **image_and_video())
    # images: 2 rows of 2 patches of 2 x 2 tokens; then the videos' 2 x 3 frames; then the text's 2 rows
    assert [tuple(m.shape) for m in found] == [(4, 4, 3)] * 2 + [(6, 4, 3)] * 2 + [(2, 21, 3)] * 2


@pytest.mark.proves("architecture", "LLaVA-OneVision (vision tower)")
def test_changing_one_frame_changes_the_gates_of_that_frame_only() -> None:
    model, batch = routed(LLAVA, target_modules=BOTH_TOWERS, top_k=2), image_and_video()
    before = gates(model, **batch)[2]
    batch["pixel_values_videos"][1, 2] += 1.0
    after = gates(model, **batch)[2]
    changed = (before - after).abs().amax((1, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True]


# ---------------------------------------------------------------------- modules whose adapter would be silent


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["in_proj", "dt_proj"], r"mixer\.dt_proj and 1 more: MambaMixer reads dt_proj\.weight directly"),
        (["in_proj", "conv1d"], r"mixer\.conv1d and 1 more: MambaMixer reads conv1d\.weight directly"),
        (["in_proj", "out_proj"], r"mixer\.out_proj and 1 more: the fused kernel of MambaMixer reads out_proj\.weight"),
        ("all-linear", r"dt_proj.*exclude_modules=\['dt_proj'\]"),
    ],
)
def test_mamba_modules_without_a_gradient_are_refused(targets: list[str] | str, reason: str) -> None:
    model = mamba()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, MonkeyJumpConfig(target_modules=targets))
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.proves("architecture", "Mamba")
def test_excluding_what_is_silent_leaves_the_rest_of_mamba() -> None:
    model = routed(BY_NAME["Mamba"], target_modules="all-linear", exclude_modules=["dt_proj", "out_proj"])
    assert describe_routing(model).blocks[0].routed == ("mixer.in_proj", "mixer.x_proj")


@pytest.mark.proves("architecture", "Mamba")
def test_mamba_with_its_fused_kernel_trains_in_proj_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    routed(BY_NAME["Mamba"]).save_pretrained(tmp_path)
    find = importlib.util.find_spec
    kernel = {"mamba_ssm": object()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: kernel.get(name) or find(name, *rest))
    with pytest.raises(ValueError, match=r"mamba_ssm is installed, and its fused kernel reads x_proj\.weight"):
        routed(BY_NAME["Mamba"], target_modules=["in_proj", "x_proj"])
    assert describe_routing(routed(BY_NAME["Mamba"])).blocks[0].routed == ("mixer.in_proj",)
    loaded = PeftModel.from_pretrained(
        BY_NAME["Mamba"].build(), tmp_path
    )  # inference calls x_proj with the kernel, too
    assert describe_routing(loaded).blocks[0].routed == ("mixer.in_proj", "mixer.x_proj")


@pytest.mark.proves("architecture", "Mamba")
def test_plain_lora_on_dt_proj_indeed_gets_no_gradient() -> None:
    model = get_peft_model(mamba(), LoraConfig(target_modules=["in_proj", "dt_proj"], init_lora_weights=False))
    loss_of(model, text()).backward()
    assert {n.split(".")[-4] for n, p in trainable(model).items() if p.grad is None} == {"dt_proj"}


def test_projection_inside_torchs_attention_is_refused_or_left_out() -> None:
    shape = {**VISION, "num_hidden_layers": 1, "image_size": 8}
    silent = r"head\.attention\.out_proj: MultiheadAttention reads out_proj\.weight directly"
    with pytest.raises(ValueError, match=silent):
        get_peft_model(
            SiglipVisionModel(SiglipVisionConfig(**shape)),
            MonkeyJumpConfig(center_init="random", target_modules=["q_proj", "out_proj"]),
        )
    model = get_peft_model(SiglipVisionModel(SiglipVisionConfig(**shape)), MonkeyJumpConfig(center_init="random"))
    assert describe_routing(model).blocks[0].shared == ("self_attn.out_proj",)
    assert describe_routing(model).plain == ()


# ---------------------------------------------------------------------- Swin


@pytest.mark.proves("architecture", "Swin")
def test_swin_windows_keep_tokens_and_gates_together() -> None:
    """The gates go through the same steps as the tokens: a token's gate meets that token's own projection."""
    model = routed(SWIN, top_k=2)
    for router in routers(model):
        block = model.get_submodule(f"base_model.model.{router.name}")
        side = 12 if block.input_resolution[0] == 12 else 6
        tokens_of = torch.arange(side * side, dtype=torch.float32).view(1, -1, 1)
        arranged = block.jump_hook.rearrange["attention"](block, tokens_of, {"input_dimensions": (side, side)})
        seen: list[Tensor] = []
        handle = block.attention.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        norm, block.layernorm_before = block.layernorm_before, nn.Identity()
        try:
            block(tokens_of.expand(1, -1, router.dim).contiguous(), (side, side))
        finally:
            handle.remove()
            block.layernorm_before = norm
        assert torch.equal(arranged[..., 0], seen[0][..., 0])
