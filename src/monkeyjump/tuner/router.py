"""The router of one block: centers in, gates out.

It is an `nn.Module` and a PEFT `BaseTunerLayer`, so that PEFT itself saves, loads, renames,
activates, disables and deletes it with the adapters that it routes.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.routing.checks import refuse_rows
from monkeyjump.routing.context import CACHE_KEYWORDS, ForwardContext
from monkeyjump.routing.ema import CenterStatistics
from monkeyjump.routing.gates import route, top_k_mask
from monkeyjump.routing.pooling import pool
from monkeyjump.tuner.gates import GateBox
from monkeyjump.tuner.targets import matches

LATE_INITS = ("kmeans", "random_tokens")  # centers that `initialize_centers` must make first
DECISIONS = "_monkeyjump_decisions"  # attribute of a KV cache: what was decided on its prompt

# called with (router, adapter, states [B, T, d] or [B, 1, d], chosen bool [.., E], attended bool [B, T] or None)
Observer = Callable[["Router", str, Tensor, Tensor, Tensor | None], None]


class Router(nn.Module, BaseTunerLayer):
    """Gates of one block, for each of its adapters.

    Attributes:
        name: the block's path in the model.
        dim: width d of the hidden states that enter the block.
        centers: `[C, d]` float32 per adapter, persistent; all zero until they are initialized.
        learned_centers: the same as parameters, for `center_init="trainable"`.
        slots: the routed modules per adapter, by path within the block, in the order of the gates.
        pending, gathered: statistics since the last completed step, and since the last update.
        gathering: whether the training forwards of an adapter add to them.
        steps: optimizer steps completed, while gathering.
    """

    adapter_layer_names = ("learned_centers",)
    other_param_names = ("centers", "configs", "slots", "ready", "pending", "gathered", "gathering", "steps")
    active_adapters: list[str]
    inside = False  # True: decides in the block's forward, so that gradient checkpointing decides again, alike
    weight = bias = None  # BaseTunerLayer would look for them in a base layer, for ever

    def __init__(self, name: str, dim: int, context: ForwardContext, active: list[str]) -> None:
        super().__init__()
        self.name, self.dim, self.context = name, dim, context
        self.in_features = self.out_features = dim  # PEFT reads them from every tuner layer
        self.box = GateBox()
        self.centers = BufferDict({}, persistent=True)
        self.learned_centers = nn.ParameterDict()
        self.configs: dict[str, MonkeyJumpConfig] = {}
        self.slots: dict[str, tuple[str, ...]] = {}
        self.ready: dict[str, bool] = {}
        self.pending: dict[str, CenterStatistics] = {}
        self.gathered: dict[str, CenterStatistics] = {}
        self.gathering: dict[str, bool] = {}
        self.steps: dict[str, int] = {}
        self.schedule: Any = None  # the CenterUpdate that moves these centers
        self.observers: list[Observer] = []
        self.merged_adapters: list[str] = []
        self._active_adapter = active
        self.register_load_state_dict_post_hook(_note_loaded_centers)

    def add(self, adapter: str, config: MonkeyJumpConfig, slots: tuple[str, ...], device: torch.device) -> None:
        """Route `slots` of this block for `adapter`."""
        self.configs[adapter], self.slots[adapter] = config, slots
        if config.granularity != "token":
            self.context.sequence_modes = True
        if config.granularity == "task":
            self.ready[adapter] = True
            return
        count = min(config.num_centers or len(slots), len(slots))
        self.ready[adapter] = config.center_init not in LATE_INITS
        start = torch.zeros(count, self.dim)
        if self.ready[adapter]:
            # blocks must not start alike, and each alike on every run
            seed = config.center_seed + zlib.crc32(self.name.encode())
            start = torch.randn(count, self.dim, generator=torch.Generator().manual_seed(seed))
            if config.center_init != "random":
                start = F.normalize(start, dim=-1)
        if config.center_init == "trainable":
            self.learned_centers[adapter] = nn.Parameter(start.to(device), requires_grad=not config.inference_mode)
        else:
            self.centers[adapter] = start.to(device)

    def set_centers(self, adapter: str, centers: Tensor) -> None:
        """Replace the centers: `[C, d]`, kept as float32 where they are."""
        self.centers[adapter].copy_(centers)
        self.ready[adapter] = True

    def copy_centers(self, source: str, adapter: str) -> None:
        """Start an adapter with another one's centers, if it has any."""
        if source in self.centers and adapter in self.centers:
            self.centers[adapter].copy_(self.centers[source])
            self.ready[adapter] = self.ready[source]

    # ------------------------------------------------------------------ routing

    def route(self, hidden: Tensor, block_kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
        """Gates of every active adapter for the hidden states that enter the block.

        Args:
            hidden: `[B, T, d]`.
            block_kwargs: what else the block was called with; its KV cache is looked up there.

        Returns:
            float32 `[B, T, E]` (`[B, 1, E]` where whole sequences are routed) per adapter, in a mixed
            batch for its own rows; None where the adapters are disabled.
        """
        if self._disable_adapters and not self.observers:
            return None
        cache = next((c for k in CACHE_KEYWORDS if (c := block_kwargs.get(k)) is not None), None)
        names = self.context.first("adapter_names")
        routed = [a for a in (self.active_adapters if names is None else set(names)) if a in self.configs]
        gates = {adapter: self._gates(adapter, hidden, cache) for adapter in routed}
        if names is not None:  # PEFT hands each adapter its own rows only
            per_name = hidden.shape[0] // len(names)  # beams of a row stand together
            for adapter in routed:
                rows = [i for i in range(hidden.shape[0]) if names[i // per_name] == adapter]
                gates[adapter] = gates[adapter][rows]
        return gates

    def _gates(self, adapter: str, hidden: Tensor, cache: Any) -> Tensor:
        config = self.configs[adapter]
        if config.granularity == "task":
            return self._task_gates(adapter, hidden)
        self._check_ready(adapter, config)
        learning = self.training and torch.is_grad_enabled()
        if config.granularity == "token":
            return self._decide(adapter, config, hidden, None)
        frames = self.context.frames
        fresh = not frames or frames[-1].offset == 0  # a cache may be emptied and used again
        decided = None if cache is None else cache.__dict__.setdefault(DECISIONS, {})
        key = (self.name, adapter)
        if decided is not None and key in decided and not fresh:
            gates, prompt = decided[key]
            return _continued(gates, hidden, prompt, self.context.prompt_columns(hidden.shape[1]))
        gates = self._sequence_gates(adapter, config, hidden, learning)
        if decided is not None:
            decided[key] = gates, hidden.shape[1]
        return gates

    def _sequence_gates(self, adapter: str, config: MonkeyJumpConfig, hidden: Tensor, learning: bool) -> Tensor:
        """Gates `[B, 1, E]` decided on the whole sequence, or on its prompt where that is known."""
        batch, length, _ = hidden.shape
        columns = self.context.prompt_columns(length)
        attended = self.context.attended(batch, length, hidden.device)
        self._check_whole_prompt(config, attended)
        if columns is not None and columns < length:  # generating without a cache: decide as on the prompt alone
            hidden, attended = hidden[:, :columns], None if attended is None else attended[:, :columns]
        end = self.context.prompt_end(config.granularity, batch, hidden.shape[1], attended, learning)
        representation = pool(hidden, config.granularity, attended, end)
        somebody = None if attended is None else attended.any(1, keepdim=True)
        return self._decide(adapter, config, representation, somebody)

    def _decide(self, adapter: str, config: MonkeyJumpConfig, states: Tensor, counted: Tensor | None) -> Tensor:
        """Gates `[B, T or 1, E]` for `states` `[B, T or 1, d]`, which may also move the centers.

        Args:
            counted: bool `[B, 1]`, rows with any attended token, where sequences are routed.
        """
        learned = adapter in self.learned_centers
        if learned and isinstance(self.learned_centers[adapter], DTensor):
            raise ValueError(
                "center_init='trainable' cannot be trained under FSDP2: a block decides before its shards are "
                "gathered; leave the routers out of fully_shard, or use another center_init"
            )
        centers = self.learned_centers[adapter] if learned else self.centers[adapter]
        if centers.device != states.device:  # a block may have been dispatched elsewhere
            centers = centers.to(states.device)
        # a recomputation inside a backward pass is not another micro-batch
        grad = self.context.first("grad")  # a block inside a checkpointed stage (Swin) runs without
        grad = torch.is_grad_enabled() if grad is None else grad
        gathers = self.gathering.get(adapter, False) and self.training and grad
        # (compiled code has no such question: what it recomputes, it recomputes without this call)
        gathers = gathers and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)
        with torch.set_grad_enabled(learned and torch.is_grad_enabled()), _float32_region(states):
            states = states.detach()
            gates, chosen, logits = route(
                states,
                centers,
                len(self.slots[adapter]),
                config.similarity,
                config.temperature,
                config.top_k,
                config.gate_norm,
                config.jitter_noise if self.training else 0.0,
            )
            if gathers or self.observers:
                attended = counted
                if config.granularity == "token":
                    attended = self.context.attended(states.shape[0], states.shape[1], states.device)
                for observer in self.observers:
                    observer(self, adapter, states, chosen, attended)
                if gathers:
                    self._gather(adapter, states, logits, chosen, attended)
        return gates

    def _gather(self, adapter: str, states: Tensor, logits: Tensor, chosen: Tensor, attended: Tensor | None) -> None:
        """Add one micro-batch to the statistics that the next update of the centers uses."""
        config = self.configs[adapter]
        if config.ema_assignment == "topk":
            assigned = _per_center(chosen, logits.shape[-1])
        else:
            assigned = top_k_mask(logits, 1)
        if attended is not None:
            assigned = assigned & attended[..., None]
        seen = CenterStatistics.of(states.flatten(0, 1), assigned.flatten(0, 1), config.ema_space or "sphere")
        self.pending[adapter] = seen + self.pending.get(adapter)

    def _task_gates(self, adapter: str, hidden: Tensor) -> Tensor:
        ids = self.context.tasks(hidden.shape[0], hidden.device)
        if ids is None:
            raise ValueError(
                "granularity='task' needs task_ids [B] with every batch: pass task_ids=..., or wrap generate in "
                "routing_inputs(model, task_ids=...); under Trainer set remove_unused_columns=False"
            )
        slots, experts = self.slots[adapter], self.configs[adapter].task_experts
        if experts is None:
            gates = F.one_hot(ids % len(slots), len(slots)).float()
        else:
            is_task = ids.unsqueeze(1) == torch.tensor(list(experts), device=ids.device)  # [B, tasks]
            refuse_rows(
                ~is_task.any(1),
                f"task_ids holds {{task}}, which task_experts does not map: it has {sorted(experts)}",
                task=ids,
            )
            acts = [[float(matches(slot, names)) for slot in slots] for names in experts.values()]
            gates = is_task.float() @ torch.tensor(acts, device=ids.device)
        return gates.unsqueeze(1)

    # ------------------------------------------------------------------ checks

    def _check_ready(self, adapter: str, config: MonkeyJumpConfig) -> None:
        if self.ready[adapter] or self._disable_adapters:
            return
        if not torch.compiler.is_compiling() and bool(self.centers[adapter].any()):  # set tensor by tensor
            self.ready[adapter] = True
            return
        remedy = "call initialize_centers(model, data) first, or set center_init='random'"
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"center_init={config.center_init!r}: the centers of {self.name} are not there yet; {remedy}"
            )
        if self.context.first_time(f"ready {adapter}"):
            warnings.warn(f"adapter {adapter!r} routes with centers never initialized; {remedy}", stacklevel=2)

    def _check_whole_prompt(self, config: MonkeyJumpConfig, attended: Tensor | None) -> None:
        """Sequence modes decide on whole, single sequences (rule 7)."""
        frames = self.context.frames
        if frames and frames[-1].offset > 0:
            raise ValueError(
                f"granularity={config.granularity!r} decides on the prompt, but the cache already holds "
                f"{frames[-1].offset} tokens without a decision; start with an empty cache, or use granularity='token'"
            )
        self.context.refuse_packed(config.granularity, attended)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy is in nobody's training and watched by nobody."""
        running: dict[str, Any] = {name: {} for name in ("pending", "gathered", "gathering", "steps")}
        return {**self.__dict__, **running, "observers": [], "schedule": None}

    # ------------------------------------------------------------------ what PEFT asks of a tuner layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing of a router can be merged; the tuner has refused before it gets here."""

    def unmerge(self) -> None:
        """See `merge`."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Centers follow the hidden states and never take the base model's dtype."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        before = dict(self.centers.items())
        super()._apply(fn, recurse)
        for adapter, centers in before.items():  # model.to(bfloat16) may move them, not round them
            after = self.centers[adapter]
            if after.dtype != centers.dtype:
                self.centers[adapter] = centers.to(after.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{adapter}: {' '.join(slots)}" for adapter, slots in self.slots.items())


def _note_loaded_centers(router: Router, incompatible: Any) -> None:
    for adapter, centers in router.centers.items():
        if not centers.is_meta:
            router.ready[adapter] = bool(centers.any())


def _continued(gates: Tensor, hidden: Tensor, prompt: int, columns: int | None) -> Tensor:
    """The prompt's decision for the tokens that follow it.

    Args:
        prompt: how many tokens it was taken on.
        columns: how many the prompt has, where that is known.
    """
    batch, length, _ = hidden.shape
    if gates.shape[0] != batch or length > 1 or (columns is not None and prompt < columns):
        raise ValueError(
            f"the cache holds a routing decision on {prompt} tokens of {gates.shape[0]} rows, but {length} more of "
            f"{batch} rows came: whole sequences are routed on their prompt, in one piece; use granularity='token' for "
            "prefill in chunks, prompts that begin in a cache and assisted decoding"
        )
    return gates


def _per_center(chosen: Tensor, centers: int) -> Tensor:
    """Which centers a state counts for, `[..., C]`, where adapter e takes center e mod C."""
    experts = chosen.shape[-1]
    if centers == experts:
        return chosen
    own = torch.arange(experts, device=chosen.device) % centers
    return torch.stack([chosen[..., own == c].any(-1) for c in range(centers)], dim=-1)


def _float32_region(hidden: Tensor) -> torch.autocast:
    return torch.autocast(device_type=hidden.device.type, enabled=False)
