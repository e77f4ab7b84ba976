"""The mixtures of adapters that Monkey Jump is compared with: experts behind learned routers.

from monkeyjump.moe import MoELoRAConfig

model = get_peft_model(base_model, MoELoRAConfig(num_experts=4, top_k=2, r=2, target_modules=["q_proj", "v_proj"]))
Trainer(model, args, train_dataset=data).train()     # its auxiliary losses are part of the model's own loss

What each method is, and how sure the definition is: docs/baselines.md. Importing this registers them with PEFT.

config.py     one dataclass per method: its fields, and which auxiliary losses it adds
routing.py    softmax, top-k, renormalization; which tokens an expert's features are sampled from
layer.py      a projection with its experts and its router, in the [B, T, N r] form
model.py      the PEFT tuner, one for all methods
losses.py     load balance, contrast, orthogonality as functions
auxiliary.py  how such losses reach the model's own loss
ranks.py      AdaLoRA's rank schedule over all experts; schedule.py drives it
"""

from monkeyjump.moe.config import (
    AdaLoraMixtureConfig,
    ExpertConfig,
    HydraLoRAConfig,
    LoraFAMixtureConfig,
    LoraMixtureConfig,
    LowRankExpertConfig,
    MoEConfig,
    MoELoRAConfig,
    MoLAConfig,
    PropulsionMixtureConfig,
)
from monkeyjump.moe.model import MoETuner, register_method
from monkeyjump.moe.schedule import RankUpdate

for config in (
    MoELoRAConfig,
    HydraLoRAConfig,
    MoLAConfig,
    LoraMixtureConfig,
    LoraFAMixtureConfig,
    AdaLoraMixtureConfig,
    PropulsionMixtureConfig,
):
    register_method(config)

__all__ = [
    "ExpertConfig",
    "HydraLoRAConfig",
    "LowRankExpertConfig",
    "MoEConfig",
    "MoELoRAConfig",
    "MoETuner",
    "MoLAConfig",
    "RankUpdate",
    "register_method",
]
