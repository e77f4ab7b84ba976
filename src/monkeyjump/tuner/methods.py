"""What is known of PEFT's methods: which cannot be routed, and why, and which need a copy of their base."""

from __future__ import annotations

PROMPT = "it adds prompt tokens to the input and no adapters to the blocks, so there is nothing to route"

# PEFT type -> the reason why routing does not apply
NOT_ROUTABLE: dict[str, str] = {
    "PROMPT_TUNING": PROMPT,
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "PREFIX_TUNING": PROMPT,
    "CPT": PROMPT,
    "CARTRIDGE": PROMPT,
    "ADAPTION_PROMPT": "it replaces whole attention modules and adapts no projection",
    "LN_TUNING": "it trains the norms themselves and keeps no base output to gate against",
    "TRAINABLE_TOKENS": "it trains rows of the embedding and adapts no projection",
    "XLORA": "it is a router itself, with parameters, over whole LoRA adapters",
    "SHADOW": "its layers hand a second stream of states from block to block beside the hidden states",
    "POLY": "it is a router itself, with parameters, over LoRA modules by task",
}

# How a residual gate comes by the base layer's own output, where it is not simply caught on its way:
# these add to it in place, so a copy must be kept ...
ADDS_IN_PLACE = {"ADALORA", "C3A", "GRALORA", "TINYLORA"}
# ... and these never call their base layer (and warn of hooks on it), so it is called for the gate.
BYPASSES_BASE = {"FROD", "HRA", "SHIRA", "SUPERTUNING"}

# Starts of plain LoRA that move part of the base weights into the adapter: with a gate below one the
# model would then lose what was moved.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
