"""MoA: a block's different adapters are its experts, weighed by one sigmoid router.

The config, and the tuner that puts the pieces into the blocks; the pieces are in moa_block.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Term
from monkeyjump.moe.config import LowRankExpertConfig, refuse_unread, setting
from monkeyjump.moe.feed_forward import NETWORKS
from monkeyjump.moe.layer import ExpertLayer, SingleLoRA
from monkeyjump.moe.moa_block import BlockAdapters
from monkeyjump.moe.model import MoETuner
from monkeyjump.suggest import check_choice
from monkeyjump.tuner.architectures import reads_other_tokens
from monkeyjump.tuner.block import ROUTER, RoutedBlock, box_of, install_router, remove_router
from monkeyjump.tuner.gates import Gate
from monkeyjump.tuner.surroundings import hidden_size, holder_of
from monkeyjump.tuner.targets import matches

CHOICES = {"variant": ("soft", "sparse"), "router": ("swiglu", "linear"), "threshold": ("learned", "fixed")}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class MoAConfig(LowRankExpertConfig):
    """MoA (Cao et al., 2025, arXiv:2506.05928): heterogeneous adapters behind one sigmoid router per block.

    A LoRA on each target, a parallel adapter on the feed-forward network and, in the soft variant, a prompt
    adapter in the attention. `parallel_size=0, prompt_length=0` leaves LoRA alone ("moa_lora").
    """

    num_experts: Any = setting(None, "Not used: the experts are the adapters of a block.")
    top_k: int | None = setting(None, "Not used: every adapter has a weight of its own.")
    lora_alpha: float = setting(8, "alpha: updates are multiplied by alpha / r.")
    variant: str = setting("soft", "soft: all adapters act, weighed; sparse: those above a threshold.")
    router: str = setting("swiglu", "swiglu or linear.")
    router_expansion: int = setting(4, "Hidden width of the SwiGLU router, per adapter.")
    parallel_size: int = setting(16, "Bottleneck of the parallel adapter; 0: none.")
    prompt_length: int | None = setting(None, "Vectors of the prompt adapter; None: 10 in soft, 0 in sparse.")
    max_threshold: float = setting(0.5, "Gmax, above which the sparse variant's threshold does not rise.")
    threshold: str = setting(
        "learned", "learned: weight max(w - G, 0), which trains G; fixed: w where it is at least Gmax / 2."
    )
    feed_forward_modules: list[str] | str | None = setting(
        None, "Modules that are feed-forward networks, by name or regex. None: those that are called so."
    )

    peft_name: ClassVar[str] = "MOA"

    def check(self) -> None:
        refuse_unread(self, "MoA's experts are the adapters of a block, each with a weight of its own; leave it out")
        super().check()
        for name, options in CHOICES.items():
            check_choice(name, getattr(self, name), options)
        if self.prompt_length is None:
            self.prompt_length = 10 if self.variant == "soft" else 0
        for name, least in (("router_expansion", 1), ("parallel_size", 0), ("prompt_length", 0)):
            check_integer(name, getattr(self, name), least)
        if self.variant == "sparse" and self.prompt_length:
            raise ValueError(
                f"prompt_length={self.prompt_length} is set, but variant='sparse' has no prompt adapter; leave it out"
            )
        check_number("max_threshold", self.max_threshold, "in (0, 1]", lambda v: 0 < v <= 1)

    def expert_counts(self) -> list[int]:
        return [1]

    def terms(self) -> list[Term]:
        return []


class WeighedLoRA(SingleLoRA):
    """A LoRA adapter whose weight its block decides."""

    other_param_names = (*SingleLoRA.other_param_names, "places")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.places: dict[str, Gate] = {}

    def gates(self, adapter: str, x: Tensor) -> Tensor:
        return self.places[adapter](x)


class MoATuner(MoETuner):
    """Gives every block its router and its further adapters."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        for block, names in self._check_in_blocks(prepared).items():
            for name in names:
                if reads_other_tokens(name):
                    raise ValueError(
                        f"target_modules reaches {name}, which reads other tokens than its block, whose router weighs "
                        "the block's own; set exclude_modules"
                    )
            self._network(prepared, block)
            self._attention(prepared, block)
        return prepared

    def _kind(self, config: Any, name: str) -> type[ExpertLayer]:
        return WeighedLoRA

    def _network(self, config: Any, block: str) -> str | None:
        """Path within a block of its feed-forward network, where there is a parallel adapter.

        Raises:
            ValueError: there is not exactly one.
        """
        if not config.parallel_size:
            return None
        wanted = NETWORKS if config.feed_forward_modules is None else config.feed_forward_modules
        inside = [name for name, _ in self.model.get_submodule(block).named_modules() if name]
        found = [name for name in inside if matches(f"{block}.{name}", wanted)]
        if len(found) != 1:
            raise ValueError(
                f"parallel_size={config.parallel_size} needs one feed-forward network in every block, but {block} has "
                f"{', '.join(found) or 'none by its name'}; name it in feed_forward_modules, or set parallel_size=0"
            )
        return found[0]

    def _attention(self, config: Any, block: str) -> tuple[str, Any] | None:
        """Path within a block of its attention, and the attention, where there is a prompt adapter.

        Raises:
            ValueError: there is not exactly one whose queries, keys and values can be had.
        """
        if not config.prompt_length:
            return None
        modules = self.model.get_submodule(block).named_modules()
        found = [(name, module) for name, module in modules if name and _is_plain_attention(module)]
        if len(found) != 1:
            raise ValueError(
                f"prompt_length={config.prompt_length} needs one attention with q_proj, k_proj, v_proj, o_proj, a "
                f"head_dim and no norms of queries and keys in every block, but {block} has {len(found)}; set "
                "prompt_length=0"
            )
        return found[0]

    def _complete(self, adapter: str, config: Any, layers: dict[str, ExpertLayer]) -> None:
        members: dict[str, list[ExpertLayer]] = {}
        for layer in layers.values():
            members.setdefault(layer.block, []).append(layer)
        for path, inside in members.items():
            block: Any = self.model.get_submodule(path)
            router = self._adapters_of(path, block, inside[0])
            network, attention = self._network(config, path), self._attention(config, path)
            router.start(adapter, config, len(inside), network, attention)
            for number, layer in enumerate(inside):
                slot = layer.name.removeprefix(path + ".")
                layer.places[adapter] = Gate(box_of(block, slot), adapter, number, layer.name)
            if network is not None:
                _hook_network(router, block.get_submodule(network))
            if attention is not None:
                router.__dict__["attention"] = attention[1]
        _rehook_attentions(self.model)

    def _adapters_of(self, path: str, block: Any, first: ExpertLayer) -> BlockAdapters:
        if not isinstance(block, RoutedBlock):
            dim = hidden_size(self.model, path, holder_of(self.model, path), first)
            own = (path, path, first.context, self.auxiliary, dim, first, list(self.active_adapters))
            router = BlockAdapters(*own)
            router.__dict__["module"] = block
            install_router(block, router)
        return getattr(block, ROUTER)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if not merge:
            _remove_hooks(self.model)
            for block in [m for m in self.model.modules() if isinstance(m, RoutedBlock)]:
                remove_router(block)  # type: ignore[arg-type]
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def _is_plain_attention(module: Any) -> bool:
    children = dict(module.named_children())
    normed = any(name.endswith("norm") for name in children)
    return (
        all(name in children for name in ATTENTION) and not normed and isinstance(module.__dict__.get("head_dim"), int)
    )


# ---------------------------------------------------------------------- hooks


def _hook_network(router: BlockAdapters, network: nn.Module) -> None:
    if not any(_is_ours(hook) for hook in network._forward_hooks.values()):
        network.register_forward_hook(router.add_parallel, with_kwargs=True)


def _rehook_attentions(model: nn.Module) -> None:
    """Put the hooks of the prompt adapters where the projections are now: a later adapter may have wrapped them."""
    _remove_hooks(model, ("keep_queries", "add_prompt"))
    for router in [m for m in model.modules() if isinstance(m, BlockAdapters)]:
        if (attention := router.__dict__.get("attention")) is not None:
            attention.q_proj.register_forward_hook(router.keep_queries)
            attention.o_proj.register_forward_pre_hook(router.add_prompt)


def _remove_hooks(model: nn.Module, names: tuple[str, ...] = ("add_parallel", "keep_queries", "add_prompt")) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if _is_ours(hook) and hook.__name__ in names]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), BlockAdapters)
