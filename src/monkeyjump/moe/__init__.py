"""The mixtures of adapters that Monkey Jump is compared with: experts behind learned routers.

from monkeyjump.moe import MoELoRAConfig

model = get_peft_model(base_model, MoELoRAConfig(num_experts=4, top_k=2, r=2, target_modules=["q_proj", "v_proj"]))
Trainer(model, args, train_dataset=data).train()     # its auxiliary losses are part of the model's own loss

What each method is, and how sure the definition is: docs/baselines.md. Importing this registers them with PEFT.

config.py       what the configs of all methods share: fields, checks, files
projections.py  MoELoRA, HydraLoRA, MoLA
any_base.py     MoEConfig, for experts of any of four kinds
routing.py      softmax, top-k, renormalization; which tokens an expert's features are sampled from
layer.py        a projection with its experts and its router, in the [B, T, N r] form
model.py        the PEFT tuner, one for all methods
losses.py       load balance, contrast, orthogonality as functions
auxiliary.py    how such losses reach the model's own loss
ranks.py        AdaLoRA's rank schedule over all experts; schedule.py drives it
module.py       what holds the parameters of an adapter, in a layer or beside a module of the model
mixlora.py      experts that are whole feed-forward networks (feed_forward.py)
more.py         ranks chosen by the task of each row (tasks.py)
moa.py          LoRA, parallel and prompt adapters behind one router per block (moa_block.py)
"""

from monkeyjump.moe.any_base import (
    AdaLoraMixtureConfig,
    LoraFAMixtureConfig,
    LoraMixtureConfig,
    MoEConfig,
    PropulsionMixtureConfig,
)
from monkeyjump.moe.config import ExpertConfig, LowRankExpertConfig
from monkeyjump.moe.mixlora import MixLoRAAttentionConfig, MixLoRAConfig, MixLoRATuner
from monkeyjump.moe.moa import MoAConfig, MoATuner
from monkeyjump.moe.model import MoETuner, register_method
from monkeyjump.moe.more import MoREConfig, MoRETuner
from monkeyjump.moe.projections import HydraLoRAConfig, MoELoRAConfig, MoLAConfig
from monkeyjump.moe.schedule import RankUpdate
from monkeyjump.tuner.wrappers import TOLD

for config in (
    MoELoRAConfig,
    HydraLoRAConfig,
    MoLAConfig,
    LoraMixtureConfig,
    LoraFAMixtureConfig,
    AdaLoraMixtureConfig,
    PropulsionMixtureConfig,
    MixLoRAAttentionConfig,
):
    register_method(config)
register_method(MixLoRAConfig, MixLoRATuner)
register_method(MoREConfig, MoRETuner)
register_method(MoAConfig, MoATuner)
TOLD.append(MoREConfig)

__all__ = [
    "ExpertConfig",
    "HydraLoRAConfig",
    "LowRankExpertConfig",
    "MixLoRAAttentionConfig",
    "MixLoRAConfig",
    "MoAConfig",
    "MoEConfig",
    "MoELoRAConfig",
    "MoETuner",
    "MoLAConfig",
    "MoREConfig",
    "RankUpdate",
    "register_method",
]
