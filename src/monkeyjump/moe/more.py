"""MoRE: the ranks of one LoRA are the experts, and the task of a row decides how many of them act.

    e_t [d], one table [T, d] per model     p = softmax(W_g e_t + b_g) over the ranks 1..r     r_t = argmax p, from 1
    w = p[r_t] - stopgrad(p[r_t]) + 1        y = W x + s c(r_t) w B[:, :r_t] A[:r_t] drop(x)

w is 1, and its gradient trains the gate: a straight-through estimator. Rank j of A and B is an expert of rank 1
whose gate is c(r_t) w for j <= r_t and 0 else, so that rows of different tasks share a batch. The task ids of
a batch are read outside of gradient checkpoints, where they are still there, and travel into the block beside
its hidden states, as Monkey Jump's gates do.

A contrastive loss draws h, the mean over a row's prompt of what enters a block, to its own task's embedding:

    - mean log exp(cos(h, e_t) / tau) / sum_k exp(cos(h, e_k) / tau)         over rows and blocks
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Seen, Term
from monkeyjump.moe.config import LowRankExpertConfig, refuse_unread, setting
from monkeyjump.moe.layer import ExpertLayer, LowRankExperts
from monkeyjump.moe.model import MoETuner
from monkeyjump.moe.module import Companion, kaiming
from monkeyjump.moe.tasks import TaskNote, TaskRouter
from monkeyjump.suggest import check_choice
from monkeyjump.tuner.block import ROUTER, install_router, remove_router
from monkeyjump.tuner.surroundings import hidden_size, holder_of

TABLE = "expert_tasks"  # the table's name in the base model
RANK_SCALES = ("rank", "tasks")


@dataclass
class MoREConfig(LowRankExpertConfig):
    """MoRE (Zhang et al., 2025, arXiv:2505.22694): the task chooses the rank.

    Every row of a batch needs its task: pass `task_ids [B]` to the model's forward and to `generate`; under
    Trainer set `remove_unused_columns=False`. In evaluation a row without one, or with id -1, takes in each
    block the task whose embedding is nearest by cosine to the mean of its prompt.
    """

    num_experts: Any = setting(None, "Not used: the experts are the ranks, r of them.")
    top_k: int | None = setting(None, "Not used: the task chooses.")
    num_tasks: int | None = setting(None, "T, tasks; their ids are 0 to T - 1. Required without task_names.")
    task_names: list[str] | None = setting(None, "Names of the tasks by id, by which evaluation knows them.")
    rank_scale: str = setting("rank", "c: rank: r_t / r; tasks: r_t / T.")
    contrastive_weight: float = setting(0.1, "Weight of the task-contrastive loss.")
    contrastive_temperature: float = setting(0.05, "tau of the task-contrastive loss.")

    peft_name: ClassVar[str] = "MORE"

    def check(self) -> None:
        refuse_unread(self, "MoRE's experts are the ranks of one LoRA, which its tasks choose; set r and num_tasks")
        super().check()
        check_integer("r", self.r, least=1)
        self._check_names()
        check_integer("num_tasks", self.num_tasks, least=1)
        check_choice("rank_scale", self.rank_scale, RANK_SCALES)
        check_number("contrastive_weight", self.contrastive_weight, "of at least 0", lambda v: v >= 0)
        check_number("contrastive_temperature", self.contrastive_temperature, "above 0", lambda v: v > 0)

    def _check_names(self) -> None:
        names = self.task_names
        if names is None:
            return
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"task_names={names!r} is out of range: use a list of strings")
        if len(set(names)) < len(names):
            raise ValueError(f"task_names={names!r} is out of range: name each task once")
        if self.num_tasks is None:
            self.num_tasks = len(names)
        elif len(names) > self.num_tasks:
            raise ValueError(f"task_names has {len(names)} names, but num_tasks={self.num_tasks}; leave num_tasks out")

    def expert_counts(self) -> list[int]:
        return [self.r]

    @property
    def rank(self) -> int:
        return 1  # of each expert

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r

    def terms(self) -> list[Term]:
        contrast = functools.partial(_contrast, temperature=self.contrastive_temperature)
        return [Term("task_contrastive", self.contrastive_weight, contrast)]


def rank_gates(logits: Tensor, most: int) -> Tensor:
    """Gates `[T, r]` of the ranks for each task: `r_t / most * w` for the first r_t, 0 for the others.

    Args:
        logits: `[T, r]` float32.
        most: what r_t is divided by.
    """
    p = logits.softmax(-1)
    best, index = p.max(-1, keepdim=True)
    straight_through = best - best.detach() + 1
    acts = torch.arange(logits.shape[-1], device=logits.device) <= index
    return acts * straight_through * ((index + 1).to(p.dtype) / most)


def task_contrast(means: Tensor, table: Tensor, tasks: Tensor, temperature: float) -> Tensor:
    """The task-contrastive loss, a mean over rows.

    Args:
        means: `[B, d]`.
        table: `[T, d]`.
        tasks: long `[B]`.
    """
    cosine = F.normalize(means.to(table.dtype), dim=-1) @ F.normalize(table, dim=-1).T
    return F.cross_entropy(cosine / temperature, tasks)


def _contrast(seen: Seen, temperature: float) -> Any:
    """Mean over the blocks."""
    notes: list[TaskNote] = seen.notes
    table = seen.layers[0].table.mixture_tasks[seen.adapter]
    values = [task_contrast(n.means.to(table.device), table, n.tasks.to(table.device), temperature) for n in notes]
    return torch.stack(values).mean()


class RankExperts(LowRankExperts):
    """A projection whose ranks are chosen by the task of each row."""

    adapter_layer_names = (*LowRankExperts.adapter_layer_names, "mixture_router_bias")
    float32_names = (*LowRankExperts.float32_names, "mixture_router_bias")

    table: TaskTable
    router: TaskRouter

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mixture_router_bias = nn.ParameterDict()

    def _add_router(self, adapter: str, config: Any, experts: int) -> None:
        """It comes with the table, whose width it has."""

    def gates(self, adapter: str, x: Tensor) -> Tensor:
        shown = self.router.box.gates
        if shown is None or adapter not in shown:
            raise RuntimeError(
                f"{self.name} was called outside its block, so nothing says which task it is; call the block"
            )
        weight, config = self.mixture_router[adapter], self.configs[adapter]
        table = self.table.mixture_tasks[adapter].to(weight.device)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(table, weight, self.mixture_router_bias[adapter])
            most = config.r if config.rank_scale == "rank" else config.num_tasks
            gates = rank_gates(logits, most)[shown[adapter].flatten().to(weight.device)]  # [B, r]
        per_row = x.shape[:-1].numel() // len(gates)
        return gates.repeat_interleave(per_row, 0).view(*x.shape[:-1], -1)


class TaskTable(Companion):
    """The tasks' embeddings, `[T, d]` float32, one table per adapter of a model."""

    adapter_layer_names = ("mixture_router", "mixture_tasks")
    float32_names = ("mixture_tasks",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mixture_tasks = nn.ParameterDict()


class MoRETuner(MoETuner):
    """Adds the table of tasks, and to every block what reads the task of its rows."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        self._check_in_blocks(prepared)
        return prepared

    def _kind(self, config: Any, name: str) -> type[ExpertLayer]:
        return RankExperts

    def _complete(self, adapter: str, config: Any, layers: dict[str, ExpertLayer]) -> None:
        table = self._table(next(iter(layers.values())))
        if adapter not in table.configs:
            start = torch.empty(config.num_tasks, table.in_features).normal_(std=0.01 if config.init_weights else 1.0)
            table.add(adapter, config, mixture_tasks=start)
        for layer in layers.values():
            router = self._task_router(layer, table)
            layer.__dict__.update(table=table, router=router)
            weight = kaiming(config.r, table.in_features)
            layer.add(adapter, config, mixture_router=weight, mixture_router_bias=torch.zeros(config.r))

    def _table(self, first: ExpertLayer) -> TaskTable:
        model: Any = self.model
        if TABLE not in model._modules:
            width = self._width(first)
            own = (TABLE, "", first.context, self.auxiliary, width, first, list(self.active_adapters))
            setattr(model, TABLE, TaskTable(*own))
        return getattr(model, TABLE)

    def _width(self, layer: ExpertLayer) -> int:
        return hidden_size(self.model, layer.block, holder_of(self.model, layer.block), layer)

    def _task_router(self, layer: ExpertLayer, table: TaskTable) -> TaskRouter:
        block: Any = self.model.get_submodule(layer.block)
        if ROUTER not in block.__dict__:
            if (width := self._width(layer)) != table.in_features:
                raise ValueError(
                    f"{layer.block} reads hidden states of width {width}, earlier blocks {table.in_features}; MoRE has "
                    "one table of tasks as wide as they are: name layers of one width in layers_to_transform"
                )
            install_router(block, TaskRouter(layer.block, table))
        return block.__dict__[ROUTER]

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = self.model
        if not merge:
            for block in [m for m in model.modules() if ROUTER in m.__dict__]:
                remove_router(block)
            delattr(model, TABLE)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)
