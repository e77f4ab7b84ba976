"""`attach_masks` and `LearnedMasks`: gates on a model, one budget over all of them, an exact export.

The expected sparsity is the mean over all gates of the probability to be closed; the regularizer is
`sparsity_weight * |expected - target|` for the whole model, so that layers compete: with one target per layer the
masks could not rank layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from monkeyjump.allocation.parametrization import own_class
from monkeyjump.mamba.channel_group import ChannelGroup, unit_rows
from monkeyjump.mamba.channel_importance import gated
from monkeyjump.mamba.channels import GATE, channel_groups, state_groups
from monkeyjump.mamba.masks.config import MaskConfig
from monkeyjump.mamba.masks.gates import Gate, GatedElements, GatedRows, logistic_noise, open_probability
from monkeyjump.mamba.selection import select_kept

STATE_GATE = "state_gate"
DECIDED = 40.0  # size of a logit that neither noise (at most 16) nor what momentum is left can turn
SEED_STRIDE = 1_000_003  # more than any run has steps: seeds of different runs do not meet
Weights = list[tuple[nn.Module, str]]


def attach_masks(model: nn.Module, config: MaskConfig, scores: Mapping[str, Tensor] | None = None) -> LearnedMasks:
    """Put gates on `model`; its other parameters stay as they are, trainable or not.

    `scores`: importance per unit (`channel_importance`) that the gates start from. Attach masks after adapters that are
    parametrizations: a gate then closes the adapted weight.

    Raises `ValueError` if a weight is wrapped by a PEFT layer, which a gate could not close, or has gates already.
    """
    groups = channel_groups(model, config.mlps)
    if config.kind == "channel" and config.states:
        groups |= state_groups(model)
    targets = {
        (group.name, *place): group.block.get_submodule(place[0])
        for group in groups.values()
        for place in (gated(group) if config.kind == "channel" else _projections(group))
    }
    for (block, owner, _), module in targets.items():
        _refuse_covered(f"{block}.{owner}", module)
    gates, weights = _element_gates(targets, config) if config.kind == "element" else _unit_gates(groups, config)
    masks = LearnedMasks(config, groups, gates, weights)
    if scores is not None:
        masks.start_from(scores)
    masks.hook = model.register_forward_pre_hook(masks.refresh)
    return masks


class LearnedMasks:
    """The gates of one model. `attach_masks` makes it.

    In a plain loop: `advance(step, total)` before every step's first forward, `loss + penalty()` as the loss.
    In a Trainer: the callback `MaskUpdate`. In evaluation the model computes with exactly what is kept at present.
    """

    def __init__(
        self, config: MaskConfig, groups: dict[str, ChannelGroup], gates: dict[str, Gate], weights: Weights
    ) -> None:
        self.config, self.groups, self.gates, self._weights = config, groups, gates, weights
        self.temperature, self.target = config.masking_tau, 0.0
        with torch.no_grad():
            for gate in gates.values():
                gate.logits.fill_(config.initial_logit)
        self.hook: RemovableHandle | None = None
        self._decided: tuple[float, ...] | None = None
        self.advance(0, 1)

    def start_from(self, scores: Mapping[str, Tensor]) -> None:
        """Spread the gates around their first logit by the rank of their score in the whole model.

        Raises `ValueError` if a group has no scores, or as many as it has not units.
        """
        for name, gate in self.gates.items():
            if name not in scores or scores[name].shape != gate.logits.shape:
                raise ValueError(f"scores has no {tuple(gate.logits.shape)} scores for {name}")
        together = torch.cat([scores[name].flatten().cpu() for name in self.gates])
        rank = together.argsort(stable=True).argsort(stable=True) / max(len(together) - 1, 1)
        pieces = (rank * 2 - 1).split([gate.logits.numel() for gate in self.gates.values()])
        with torch.no_grad():
            for gate, piece in zip(self.gates.values(), pieces):
                start = self.config.initial_logit + self.config.logit_spread * piece
                gate.logits.copy_(start.view(gate.logits.shape))

    def advance(self, step: int, total: int) -> None:
        """Temperature, target and noise of step `step` (from 0) of `total`: the same on every rank and when resumed."""
        progress = step / max(total - 1, 1)
        self.temperature, self.target = self.config.temperature(progress), self.config.target(progress)
        generator = torch.Generator().manual_seed(self.config.seed * SEED_STRIDE + step)
        for gate in self.gates.values():
            gate.noise.copy_(logistic_noise(tuple(gate.logits.shape), generator))
            gate.temperature.fill_(self.temperature)
        if progress >= self.config.fix_after and total > 1 and not self.fixed:
            self.fix()

    @property
    def fixed(self) -> bool:
        """Whether the choice has been made: all logits say so."""
        return all(bool((gate.logits.abs() > DECIDED / 2).all()) for gate in self.gates.values())

    def fix(self) -> None:
        """Make the choice of `target_sparsity` and write it into the logits: gates are 0 or 1 from now on and learn no
        more, the regularizer is what rounding the count leaves. A checkpoint keeps it, as it keeps logits."""
        self.decide(self.config.target_sparsity)
        with torch.no_grad():
            for gate in self.gates.values():
                gate.learned.copy_(gate.logits)
                gate.logits.copy_(torch.where(gate.kept, DECIDED, -DECIDED))

    def expected_sparsity(self) -> Tensor:
        """Mean probability of a gate to be closed; differentiable, a scalar."""
        closed = [
            1 - open_probability(gate.logits.float(), self.config.relaxation, self.temperature)
            for gate in self.gates.values()
        ]
        return torch.cat([share.flatten() for share in closed]).mean()

    def penalty(self) -> Tensor:
        """`sparsity_weight * |expected sparsity - target|`, to be added to the loss."""
        return self.config.sparsity_weight * (self.expected_sparsity() - self.target).abs()

    def kept(self, sparsity: float | None = None) -> dict[str, Tensor]:
        """Units that stay, ascending `int64` per group: the highest logits, exactly as many as `sparsity` leaves.

        `sparsity` defaults to `target_sparsity`; for another one the learned logits are ranked again, also after the
        choice. Raises `ValueError` for element masks, which remove no unit.
        """
        if self.config.kind == "element":
            raise ValueError("kind='element' removes no channel: bake the mask with remove(bake=True)")
        wanted = self.config.target_sparsity if sparsity is None else sparsity
        chosen = {name: gate.logits for name, gate in self.gates.items()}
        logits = chosen if wanted == self.config.target_sparsity else self.ranking()
        return select_kept(self.groups, logits, wanted, block=self.config.block)

    def ranking(self) -> dict[str, Tensor]:
        """The learned logits by gate: after `fix` those that the choice was made by."""
        return {name: gate.learned if gate.learned.any() else gate.logits for name, gate in self.gates.items()}

    def decide(self, sparsity: float) -> None:
        """Set what evaluation keeps: exactly `round((1 - sparsity) * gates)` gates, those with the highest logits."""
        if self.config.kind == "channel":
            for name, units in self.kept(sparsity).items():
                self.gates[name].kept.fill_(False)[units.to(self.gates[name].kept.device)] = True
            return
        logits = torch.cat([gate.logits.detach().flatten() for gate in self.gates.values()])
        order = logits.argsort(descending=True, stable=True)
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept[order[: round((1 - sparsity) * len(logits))]] = True
        for gate, piece in zip(self.gates.values(), kept.split([g.logits.numel() for g in self.gates.values()])):
            gate.kept.copy_(piece.view(gate.kept.shape))

    def refresh(self, model: nn.Module, *inputs: Any) -> None:
        """Before a forward in evaluation: decide anew if logits or target have changed since."""
        state = (self.target, *(float(gate.logits._version) for gate in self.gates.values()))
        if not model.training and state != self._decided:
            self.decide(self.target)
            self._decided = state

    def sparsity_by_gate(self) -> dict[str, float]:
        """Share of the gates of every block (weight) that is more likely closed than open."""
        return {name: (gate.logits < 0).float().mean().item() for name, gate in self.gates.items()}

    def parameter_groups(self, model: nn.Module, gate_lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer: the model's trainable parameters, and the gates with `gate_lr` and without decay.

        Adam moves a parameter by about its learning rate per step, and a gate has several units to go.
        """
        gates = [gate.logits for gate in self.gates.values()]
        taken = {id(logits) for logits in gates}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": others}, {"params": gates, "lr": gate_lr, "weight_decay": 0.0}]

    def remove(self, bake: bool = False) -> None:
        """Take the gates off. `bake` leaves zeros where `target_sparsity` closes gates, else the weights as they were.

        Raises `ValueError` if something was put over a gate, or with `bake` also under it.
        """
        for module, name in self._weights:
            chain = module.parametrizations[name]  # type: ignore[index]
            if not isinstance(chain[-1], GatedRows | GatedElements):
                raise ValueError(
                    f"{type(chain[-1]).__name__} lies over a gate, which then closes nothing: attach masks last"
                )
            if bake and len(chain) > 1:
                raise ValueError(f"{type(chain[0]).__name__} lies under a gate: merge the adapter, then bake")
        if bake:
            self.decide(self.config.target_sparsity)
        if self.hook is not None:
            self.hook.remove()
        for gate in self.gates.values():
            gate.eval()
        for module, name in self._weights:
            _uncover(module, name, bake)
        for group in self.groups.values():
            for gate_name in {GATE, STATE_GATE} & dict(group.block.named_children()).keys():
                delattr(group.block, gate_name)


def _uncover(module: Any, name: str, bake: bool) -> None:
    own_class(module)
    if len(module.parametrizations[name]) == 1:
        parametrize.remove_parametrizations(module, name, leave_parametrized=bake)
    else:
        del module.parametrizations[name][-1]


def _unit_gates(groups: Mapping[str, ChannelGroup], config: MaskConfig) -> tuple[dict[str, Gate], Weights]:
    gates: dict[str, Gate] = {}
    weights: Weights = []
    for name, group in groups.items():
        device = next(group.block.parameters()).device
        gate = Gate((group.units,), config.relaxation, config.straight_through, device).train(group.block.training)
        group.block.add_module(STATE_GATE if group.kind == "state" else GATE, gate)
        gates[name] = gate
        for owner, field in gated(group):
            module = group.block.get_submodule(owner)
            rows = unit_rows(group, owner, field, len(getattr(module, field)))
            parametrize.register_parametrization(module, field, GatedRows(gate, rows))
            weights.append((module, field))
    return gates, weights


def _element_gates(
    targets: Mapping[tuple[str, str, str], nn.Module], config: MaskConfig
) -> tuple[dict[str, Gate], Weights]:
    gates: dict[str, Gate] = {}
    weights: Weights = []
    for (block, owner, field), module in targets.items():
        weight = getattr(module, field)
        shape = tuple(weight.shape)
        gate = Gate(shape, config.relaxation, config.straight_through, weight.device).train(module.training)
        gates[f"{block}.{owner}.{field}"] = gate
        parametrize.register_parametrization(module, field, GatedElements(gate))
        weights.append((module, field))
    return gates, weights


def _projections(group: ChannelGroup) -> Iterator[tuple[str, str]]:
    """The weights of the block's linear maps and convolution."""
    for owner in dict.fromkeys(place.owner for place in group.places):
        if owner and isinstance(group.block.get_submodule(owner), nn.Linear | nn.Conv1d):
            yield owner, "weight"


def _refuse_covered(where: str, module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer):
        raise ValueError(
            f"{where} is wrapped by {type(module).__name__}, whose output a gate on the weight does not close: "
            f"merge the adapter first, or leave this module out of its targets"
        )
    if any(isinstance(inner, GatedRows | GatedElements) for inner in module.modules()):
        raise ValueError(f"{where} has gates already: remove them first")
