"""How auxiliary losses reach the model's own loss, whoever trains it.

Two hooks on the base model, outside any gradient checkpoint: the first opens a list in which the layers
note their decisions while the forward runs, the second adds up what the losses make of them and adds it
to `outputs.loss`, in training only. A recomputation finds the list closed, so nothing counts twice, and
the losses' own tensors are never part of what is recomputed.

    loss + share * sum over terms of weight * value      share: supervised tokens of this micro-batch /
                                                         num_items_in_batch where Trainer passes it, else 1
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from monkeyjump.tuner.adalora import share_of_step

logger = logging.getLogger("monkeyjump")


@dataclass
class Seen:
    """What a loss may read.

    Attributes:
        adapter: whose loss it is.
        layers: the adapted layers that this adapter acts in.
        notes: what they noted in this forward pass, in the order of the layers.
    """

    adapter: str
    layers: list[Any]
    notes: list[Any]

    def check_whole(self, loss: str, weight: str) -> None:
        """Refuse a loss over weights that are no longer there when a forward pass ends.

        Raises:
            ValueError: FSDP2 has sharded the layers; each block's weights are whole only while it runs.
        """
        if any(isinstance(parameter, DTensor) for parameter in self.layers[0].parameters()):
            raise ValueError(
                f"{loss} cannot be sharded by FSDP2: it reads the experts' weights after their blocks have run; set "
                f"{weight}=0, or train under DDP"
            )

    @property
    def device(self) -> torch.device:
        """Of the first layer."""
        return next(self.layers[0].parameters()).device


@dataclass(frozen=True)
class Term:
    """One auxiliary loss of a config.

    Attributes:
        name: for logging.
        weight: what its value is multiplied by; 0 leaves it out.
        value: a scalar from what was seen.
        reads: whether it reads the layers' notes (which they then keep until the forward pass ends).
    """

    name: str
    weight: float
    value: Callable[[Seen], Tensor]
    reads: bool = True


class AuxiliaryLosses:
    """The auxiliary losses of a model's adapters.

    Attributes:
        terms: by adapter, those of a weight other than 0.
        layers: all adapted layers.
        latest: values of the latest training forward by name, before weights, without graph.
    """

    def __init__(self) -> None:
        self.terms: dict[str, list[Term]] = {}
        self.layers: list[Any] = []
        self.latest: dict[str, Tensor] = {}
        self._notes: dict[str, list[Any]] | None = None
        self._warned = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_notes": None, "latest": {}}  # activations: not for pickle or deepcopy

    def watch(self, model: nn.Module) -> None:
        """Put the hooks on a base model."""
        model.register_forward_pre_hook(self.open, with_kwargs=True)
        model.register_forward_hook(self.close, with_kwargs=True, always_call=True)

    def wants(self, adapter: str) -> bool:
        """Whether a layer is to note what it does for `adapter`: in a training forward that a loss reads."""
        return self._notes is not None and any(term.reads for term in self.terms.get(adapter, ()))

    def note(self, adapter: str, what: Any) -> None:
        """Keep what a layer noted until the forward pass ends."""
        assert self._notes is not None, "ask wants() first"
        self._notes[adapter].append(what)

    # ------------------------------------------------------------------ hooks

    def open(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: notes are wanted from here on."""
        self._notes = defaultdict(list) if model.training else None

    def close(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Any:
        """Forward hook, also called when the forward raised: add the losses to the output's own."""
        notes, self._notes = self._notes, None
        if notes is None or outputs is None:
            return None
        total = self._total(notes)
        if total is None:
            return None
        share = share_of_step(model, kwargs)
        if isinstance(outputs, tuple):
            has_loss = kwargs.get("labels") is not None
            loss = outputs[0] if has_loss else None
        else:
            loss = getattr(outputs, "loss", None)
        if not isinstance(loss, Tensor):
            self._say_once()
            return None
        loss = loss + share * total.to(loss.device)
        if isinstance(outputs, tuple):
            return (loss, *outputs[1:])
        outputs.loss = loss
        return None

    def _total(self, notes: dict[str, list[Any]]) -> Tensor | None:
        """The weighted sum of all losses of the active adapters, or None where there is none."""
        self.latest, total = {}, None
        for adapter, terms in self.terms.items():
            acting = [m for m in self.layers if not m.disable_adapters and adapter in m.active_adapters]
            seen = Seen(adapter, [m for m in acting if adapter in m.configs], notes.get(adapter, []))
            for term in terms:
                if not seen.layers or (term.reads and not seen.notes):
                    continue
                with torch.autocast(seen.device.type, enabled=False):
                    value = term.value(seen)
                self.latest[term.name] = self.latest.get(term.name, 0) + value.detach()
                total = term.weight * value if total is None else total + term.weight * value
        return total

    def _say_once(self) -> None:
        if not self._warned:
            logger.warning(
                "the model returned no loss of its own in training, so its auxiliary losses (%s) act on nothing; pass "
                "labels to the model (label_smoothing_factor and compute_loss_func take them away)",
                ", ".join(self.latest),
            )
        self._warned = True
