"""Which modules are adapted, which blocks they belong to, which of them are routed.

slot     a targeted module of a block, named by its path within the block ("self_attn.q_proj")
routed   it is an expert: its adapter acts on the tokens that the block's router sends to it
shared   its adapter acts on every token of a routed block; keys and values of cross-attention always
         are, because they read other tokens than the block's
plain    it lies outside any routed block: an ordinary PEFT adapter
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.suggest import did_you_mean
from monkeyjump.tuner.architectures import DEFAULT_SHARED, DEFAULT_TARGETS, language_tower, reads_other_tokens, within
from monkeyjump.tuner.blocks import hook_of
from monkeyjump.tuner.reach import check_reach


@dataclass(frozen=True)
class BlockPlan:
    """What an adapter does in one block.

    Attributes:
        name: path of the block in the model.
        index: number of the block in its list.
        routed, shared: slots by path within the block; `routed` in the order of the gates.
    """

    name: str
    index: int
    routed: tuple[str, ...]
    shared: tuple[str, ...]


def matches(name: str, wanted: Sequence[str] | str | None) -> bool:
    """Whether a module path is meant by `wanted`: suffixes at a dot, or one regex for the whole path."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in wanted)


def default_targets(model: nn.Module) -> set[str] | str:
    """Projections to adapt where the user names none: names, or a regex for the language tower alone.

    Raises:
        ValueError: no known set of names occurs; the message lists the model's linear modules.
    """
    names = _linear_names(model)
    tower = language_tower(model)
    inside = names if tower is None else [name for name in names if name.startswith(tower + ".")]
    for row in DEFAULT_TARGETS:
        if all(any(matches(name, [target]) for name in inside) for target in row):
            return set(row) if tower is None else within(tower, row)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    raise ValueError(
        f"target_modules=None, and there is no default for this architecture; name some of: {', '.join(leaves)}"
    )


def targeted_modules(tuner: Any, config: PeftConfig) -> list[str]:
    """Paths of the modules that a PEFT tuner will adapt, in definition order."""
    named = _maybe_include_all_linear_layers(copy.copy(config), tuner.model)
    paths = [name for name, _ in tuner.model.named_modules() if name]
    wanted = [name for name in paths if tuner._check_target_module_exists(named, name)]
    return [name for name in wanted if not inside_adapter(tuner.model, name)]


def check_targets(model: nn.Module, config: Any, targeted: Iterable[str]) -> None:
    """Refuse names that match nothing, which PEFT lets pass as long as another one matches, and silent adapters.

    Args:
        targeted: paths of all modules that will be adapted.

    Raises:
        ValueError: naming the field, the name and its near misses, or why an adapter would be silent.
    """
    check_reach(model, targeted, training=not config.inference_mode)
    names = [n for n, m in model.named_modules() if n and not inside_adapter(model, n)]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND and not any(matches(n, targets) for n in names):
            raise ValueError(
                f"target_modules={targets!r} as a regex matches no module; it must match whole paths, such as "
                f"{_linear_names(model)[0]!r}"
            )
        return
    for target in targets or ():
        if not any(matches(name, [target]) for name in names):
            if (found := next((n for n, _ in model.named_parameters() if matches(n, [target])), None)) is not None:
                raise ValueError(
                    f"target_modules names {target!r}, but {found} is a parameter and no module (a mixture of experts "
                    "keeps its experts in one), so no token can be routed to an adapter on it; leave it out, or name "
                    "it in target_parameters for an adapter without routing"
                )
            raise ValueError(_no_match("target_modules", target, _linear_names(model)))


def block_of(model: nn.Module, module_name: str) -> str | None:
    """Path of the block around a module, or None where it lies in no block.

    A block is the nearest instance of a registered class (`register_block`), else the nearest
    gradient-checkpointing layer of transformers, else the outermost element of a `ModuleList`.
    """
    parents = _parents(model, module_name)
    for name, parent in reversed(parents):
        if hook_of(type(parent)) is not None:
            return name
    for name, parent in reversed(parents):
        if isinstance(parent, GradientCheckpointingLayer):
            return name
    for (_, container), (name, _) in pairwise(parents):
        if isinstance(container, nn.ModuleList):
            return name
    return None


def plan_blocks(model: nn.Module, config: MonkeyJumpConfig, adapted: Iterable[str]) -> list[BlockPlan]:
    """Split the adapted modules into blocks, and each block into routed and shared slots.

    Args:
        model: the base model.
        config: its `shared_modules`, `expert_order`, `layers_to_route`.
        adapted: paths of the adapted modules, in definition order.

    Raises:
        ValueError: nothing is routed, or a name in `shared_modules`, `expert_order` or
            `task_experts` is no slot.
    """
    members: dict[str, list[str]] = defaultdict(list)
    adapted = list(adapted)
    for name in adapted:
        if (block := block_of(model, name)) is not None:
            members[block].append(name.removeprefix(block + "."))
    if adapted and not members:
        raise ValueError(
            f"no module is routed: {adapted[0]} lies in no block (a ModuleList's element, or a gradient-checkpointing "
            "layer); target modules inside the model's blocks, or say which class is one with register_block(YourBlock)"
        )
    slots = sorted({slot for inside in members.values() for slot in inside})
    shared = DEFAULT_SHARED if config.shared_modules is None else config.shared_modules
    _check_names("shared_modules", config.shared_modules, slots, "targeted")
    _check_names("expert_order", config.expert_order, slots, "targeted")
    _check_layers(config.layers_to_route, sorted({block_index(block) for block in members}))
    plans = []
    for block, inside in members.items():
        index = block_index(block)
        if not _is_routed_layer(index, config.layers_to_route):
            continue
        candidates = [slot for slot in inside if not reads_other_tokens(slot)]
        routed = [slot for slot in candidates if not matches(slot, shared)]
        if not routed and config.shared_modules is None:
            routed = candidates  # sharing by default never takes the last expert
        if routed:
            always = tuple(slot for slot in inside if slot not in routed)
            for task, names in (config.task_experts or {}).items():
                _check_names(f"task_experts[{task}]", names, routed, "routed")
            plans.append(BlockPlan(block, index, tuple(_ordered(routed, config.expert_order)), always))
    if not plans:
        raise ValueError(
            f"no module is routed: target_modules={_listed(config.target_modules)} leaves nothing beside "
            f"shared_modules={_listed(config.shared_modules)} in layers_to_route={config.layers_to_route}; target "
            "more modules inside the model's blocks, or share fewer"
        )
    return plans


def _ordered(routed: list[str], order: Sequence[str] | str | None) -> list[str]:
    """Slots in `expert_order`; those that it does not name follow in definition order."""
    if not order:
        return routed
    rank = {slot: i for slot in routed for i, name in reversed(list(enumerate(order))) if matches(slot, [name])}
    return sorted(routed, key=lambda slot: rank.get(slot, len(order)))


def _is_routed_layer(index: int, layers: Sequence[int] | int | None) -> bool:
    return layers is None or index in ([layers] if isinstance(layers, int) else layers)


def _check_names(field: str, wanted: Sequence[str] | str | None, slots: Sequence[str], kind: str) -> None:
    """Every name, or the regex, must mean at least one of `slots`, which are modules of a `kind`."""
    if isinstance(wanted, str):
        if wanted and not any(matches(slot, wanted) for slot in slots):
            raise ValueError(
                f"{field}={wanted!r}, as a regex for the whole path within a block, matches none of "
                f"{', '.join(slots)}; write a list for names: [{wanted!r}]"
            )
        return
    for name in wanted or ():
        if not any(matches(slot, [name]) for slot in slots):
            raise ValueError(f"{_no_match(field, name, slots)}; only {kind} modules can be named there")


def _check_layers(layers: Sequence[int] | int | None, indices: list[int]) -> None:
    for layer in [] if layers is None else [layers] if isinstance(layers, int) else layers:
        if layer not in indices:
            raise ValueError(f"layers_to_route names {layer!r}; the blocks with adapters are {indices}")


def _no_match(field: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    leaves = sorted({n.rpartition(".")[2] for n in names})
    return f"{field} names {name!r}, which matches nothing: {did_you_mean(name, leaves)}there are {', '.join(leaves)}"


def _linear_names(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, Conv1D, BaseTunerLayer)
    return [n for n, m in model.named_modules() if n and isinstance(m, kinds) and not inside_adapter(model, n)]


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a path leads into an adapted layer."""
    return any(isinstance(parent, BaseTunerLayer) for _, parent in _parents(model, name)[:-1])


def _parents(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules from the model's child down to the named one, with their paths."""
    found, module, path = [], model, ""
    for part in name.split("."):
        module, path = getattr(module, part), f"{path}.{part}" if path else part
        found.append((path, module))
    return found


def block_index(block: str) -> int:
    """The block's number: the last integer of its path, 0 where there is none."""
    return next((int(part) for part in reversed(block.split(".")) if part.isdigit()), 0)


def _listed(names: object) -> object:
    return sorted(names) if isinstance(names, (set, tuple, list)) else names
