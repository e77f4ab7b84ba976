"""The table on the paper's model: LLaVA-OneVision-Qwen2-0.5B, q, k, v, o of 24 blocks, r 2, N 4; MoRE: 6 tasks."""

from __future__ import annotations

from monkeyjump.methods.formula import Block
from monkeyjump.methods.row import Method

ATTENTION = {"q_proj": (896, 896), "k_proj": (896, 128), "v_proj": (896, 128), "o_proj": (896, 896)}
LLAVA_ONEVISION = (Block(896, ATTENTION),) * 24
VALUES = {"r": 2, "N": 4, "T": 6, "H": 14}


def on_the_papers_model(row: Method) -> int:
    """Trainable parameters."""
    return row.count(LLAVA_ONEVISION, VALUES, experts_of(row, len(LLAVA_ONEVISION)))


def experts_of(row: Method, layers: int) -> list[int]:
    """N of each block; MoLA's own, 2-4-6-8."""
    return [row.config().experts_at(layer, layers) for layer in range(layers)] if row.base == "mola" else []


UNREPRODUCIBLE = (
    "MixLoRA, 364K in Figure 2: by the original's definition (mixlora) 270,336, because q, k, v and o hold no "
    "feed-forward expert; with experts there all the same (mixlora-attn) 1,425,408. Alike blocks give multiples of "
    "3,072, so 362,496 or 365,568: neither is 364K",
    "MoELoRA-FA, 902K in Figure 2: by our definition (moe-lora-fa) 737,280. Alike blocks give 900,096 or 903,168; "
    "902,144 is what remains of MoELoRA's 1,425,408 where 292 of its 384 matrices A are frozen and 92 are not",
)
