"""What one forward pass knows that a block cannot see: masks, labels, task ids.

A block is handed hidden states and, at best, a 4-D attention mask; which tokens are padding, where
the prompt ends and which task a row belongs to is known further out. Pre-hooks on the outermost
model and on the model that directly holds the blocks push a `Frame`; the blocks read the stack.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from monkeyjump.routing.checks import refuse_rows
from monkeyjump.routing.pooling import Granularity, end_of_length, prompt_end

OURS = {"mj_prompt_lengths": "prompt_lengths", "task_ids": "task_ids", "mj_task_ids": "task_ids"}
TEXT_KEYWORDS = ("input_ids", "inputs_embeds")
CACHE_KEYWORDS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclass
class Frame:
    """One model call.

    Attributes:
        mask: its attention mask: `[B, T]`, `[B, 1, T, S]`, a dict of such, or None (all attended).
        labels: `[B, T]`; never an encoder-decoder's, which speak of the decoder's tokens alone.
        prompt_lengths: `[B]`, attended prompt tokens, given by the caller.
        task_ids: `[B]`.
        adapter_names: B names, where every row takes an adapter of its own.
        position_ids: `[B, T]`, where the caller gave them.
        packed: whether the caller passed sequence boundaries of a padding-free batch.
        offset: tokens already in the cache (see `_tokens_in`).
        prompt_columns: how many columns of the batch are prompt, while generating.
        decoder_columns: the same of a decoder beside an encoder, as wide as its first call.
        takes_text: whether the call was given tokens or their embeddings (a vision tower is not).
        reads_encoder: whether it was given an encoder's output.
        has_decoder_labels: whether labels, if there are any, are for another sequence than the block's.
        grad: whether the call wants gradients; inside a reentrant checkpoint torch itself says no.
    """

    mask: Any = None
    labels: Tensor | None = None
    prompt_lengths: Tensor | None = None
    task_ids: Tensor | None = None
    adapter_names: list[str] | None = None
    position_ids: Tensor | None = None
    packed: bool = False
    offset: int = 0
    prompt_columns: int | None = None
    decoder_columns: int | None = None
    takes_text: bool = False
    reads_encoder: bool = False
    has_decoder_labels: bool = False
    grad: bool | None = None
    prompt_end: Tensor | None = None  # from the labels, computed once for all blocks


class ForwardContext:
    """The stack of frames of the running forward pass; one per base model."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.sequence_modes = False  # whether any router decides per sequence
        self.warned: set[str] = set()
        self.parameters: dict[type, tuple[str, ...]] = {}  # of the watched models' forwards, in order

    def watch(self, module: nn.Module) -> None:
        """Put the two hooks on a model. Its signature is read here, once: torch.compile traces the hooks."""
        self.parameters[type(module)] = tuple(inspect.signature(module.forward).parameters)
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, with_kwargs=True, always_call=True)

    def __getstate__(self) -> dict:
        # for pickle and deepcopy: frames hold activations, and a copy is inside nobody's forward pass
        return {**self.__dict__, "frames": [], "warned": set()}

    # ------------------------------------------------------------------ hooks

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: note what this call was given, and take off what is only for us."""
        self.frames.append(frame := Frame())  # first, so that `leave` always has something to pop
        parameters = self.parameters[type(module)]
        for name, attribute in OURS.items():
            if name in kwargs and name not in parameters:
                setattr(frame, attribute, kwargs.pop(name))
        frame.grad = torch.is_grad_enabled()
        given = {**dict(zip(parameters, args)), **kwargs}
        frame.mask = given.get("attention_mask")
        frame.position_ids = given.get("position_ids")
        frame.packed = given.get("cu_seq_lens_q") is not None
        frame.takes_text = any(given.get(name) is not None for name in TEXT_KEYWORDS)
        frame.reads_encoder = given.get("encoder_hidden_states") is not None
        frame.has_decoder_labels = _is_encoder_decoder(module)
        if not frame.has_decoder_labels:
            frame.labels = given.get("labels")
        cache = next((given[name] for name in CACHE_KEYWORDS if given.get(name) is not None), None)
        if cache is not None and (self.sequence_modes or _is_square(frame.mask)):
            # asked here, before the first block lengthens the cache
            frame.offset = _tokens_in(cache)
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Forward hook, also called when the forward raised."""
        self.frames.pop()

    @contextmanager
    def inputs(self, **given: Any) -> Iterator[None]:
        """Push a frame by hand, for what cannot travel as a keyword (`generate` refuses unknown ones)."""
        self.frames.append(Frame(**given))
        try:
            yield
        finally:
            self.frames.pop()

    def first_time(self, key: str) -> bool:
        """Whether `key` is asked for the first time: what deserves a word deserves one only."""
        new = key not in self.warned
        self.warned.add(key)
        return new

    # ------------------------------------------------------------------ questions

    def first(self, name: str) -> Any:
        """The innermost value of a field that belongs to the whole pass, or None."""
        return next((v for f in reversed(self.frames) if (v := getattr(f, name)) is not None), None)

    def tasks(self, rows: int, device: torch.device) -> Tensor | None:
        """The task of every row of a block, long `[rows]`; None where nobody says.

        Raises:
            ValueError: the ids given are for another number of rows.
        """
        ids = self.first("task_ids")
        if ids is None:
            return None
        ids = torch.as_tensor(ids, device=device).flatten()
        if not len(ids) or rows % len(ids):
            raise ValueError(f"task_ids holds {len(ids)} ids for a batch of {rows} rows; pass one per row")
        return ids.repeat_interleave(rows // len(ids))  # beams of a row stand together

    def attended(self, batch: int, length: int, device: torch.device) -> Tensor | None:
        """Which of a block's tokens are real: bool `[B, T]`, or None where all of them are."""
        if not self.frames:
            return None
        # the innermost model call is the one whose tokens the block sees: in an encoder-decoder or
        # a vision-language model the outer mask may speak of other tokens
        frame = self.frames[-1]
        mask = as_attended(frame.mask, batch, length, frame.offset)
        return None if mask is None else mask.to(device)

    def prompt_end(
        self, granularity: Granularity, batch: int, length: int, attended: Tensor | None, learning: bool
    ) -> Tensor | None:
        """Index of the prompt's last token, long `[B]`; None means the last attended token.

        Args:
            learning: whether this is a training forward, in which the prompt must not be guessed.

        Raises:
            ValueError: nothing says where the prompts of a training batch end, or what says so does not fit.
        """
        if granularity != "prompt_end" or not self.frames:
            return None
        lengths = self.first("prompt_lengths")
        if lengths is not None:
            return end_of_length(lengths, attended, batch, length)
        frame = next((f for f in reversed(self.frames) if f.labels is not None), None)
        if frame is None and learning and not any(f.has_decoder_labels for f in self.frames):
            raise ValueError(
                "granularity='prompt_end' found no labels in training, so the end of the prompts is unknown; keep "
                "them in the batch (label_smoothing_factor and compute_loss_func take them out), or pass "
                "mj_prompt_lengths"
            )
        if frame is None or frame.labels is None or frame.labels.shape != (batch, length):
            return None
        if frame.prompt_end is None:
            frame.prompt_end = prompt_end(frame.labels, attended)
        return frame.prompt_end

    def prompt_columns(self, length: int) -> int | None:
        """How many of a block's columns are prompt, while generating; None where that is not known.

        Args:
            length: T of the hidden states that enter the block.
        """
        frame = next((f for f in reversed(self.frames) if f.prompt_columns is not None), None)
        if frame is None or not self.frames[-1].takes_text:
            return None
        if not self.frames[-1].reads_encoder:
            return frame.prompt_columns
        if frame.decoder_columns is None:  # generation begins
            frame.decoder_columns = length
        return frame.decoder_columns

    def refuse_packed(self, granularity: Granularity, attended: Tensor | None) -> None:
        """Rows must hold one sequence each: no boundaries given, and no positions that restart.

        Raises:
            ValueError: they hold several.
        """
        packed = (
            f"granularity={granularity!r} takes one sequence per row, but these rows are packed (their positions "
            "restart); unpack them, or use granularity='token'"
        )
        if any(frame.packed for frame in self.frames):
            raise ValueError(packed)
        positions = self.first("position_ids")
        if positions is None or positions.dim() != 2 or positions.shape[1] < 2:
            return
        restarts = positions.diff(dim=1) <= 0
        if attended is not None and attended.shape == positions.shape:
            restarts = restarts & attended[:, 1:] & attended[:, :-1]  # padding repeats positions
        elif attended is not None:
            return
        refuse_rows(restarts.any(-1), packed)


def _tokens_in(cache: Any) -> int:
    """How many tokens a cache holds; of one that keeps states and no tokens, 1 where there are any."""
    layers = cache.__dict__.get("layers")  # a cache of an encoder-decoder is made of two
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return int(cache.has_previous_state())
    return int(cache.get_seq_length())


def as_attended(mask: Any, batch: int, length: int, offset: int) -> Tensor | None:
    """A transformers attention mask as bool `[B, T]`.

    Args:
        mask: `[B, S]` with S >= T (the last T columns are this call's tokens), or `[B, 1, T, S]`
            (bool, or additive with 0 for attended): a token is real where it attends to itself,
            which is the diagonal that starts at the cache offset; a dict of such masks; or None.
        batch, length: B and T of the hidden states.
        offset: tokens already in the cache.

    Raises:
        ValueError: the mask speaks of another number of tokens.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or not torch.is_tensor(mask):
        return None
    if mask.dim() == 4:
        diagonal = mask[:, 0].diagonal(offset=offset, dim1=-2, dim2=-1)[:, :length].expand(batch, -1)
        mask = diagonal if diagonal.dtype == torch.bool else diagonal >= 0
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit hidden states of {batch} rows and "
            f"{length} tokens: pass one mask value per token"
        )
    return mask[:, -length:].bool()


def _is_square(mask: Any) -> bool:
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    return torch.is_tensor(mask) and mask.dim() == 4


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
