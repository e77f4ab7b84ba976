"""A model that nobody knows: what is guessed, and what `register_block` says instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from monkeyjump import CenterUpdate, describe_routing, initialize_centers, record_routing, register_block
from monkeyjump.tuner import blocks
from monkeyjump.tuner.model import routers
from tiny import gates, llama, routed, tokens, trainable

WIDTH = 16
own_module = pytest.mark.proves("architecture", "any nn.Module with a ModuleList")
registered = pytest.mark.proves("architecture", "any nn.Module with register_block")


@pytest.fixture(autouse=True)
def _no_hooks_left() -> Iterator[None]:
    before = dict(blocks._hooks)
    yield
    blocks._hooks.clear()
    blocks._hooks.update(before)


class Mixer(nn.Module):
    """A block of two projections; its mask comes first, and True in it means padding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, padding: Tensor | None, h: Tensor) -> Tensor:
        return h + self.down(self.up(h).tanh())


class Listed(nn.Module):
    """What a newcomer writes: an embedding, a ModuleList, a head."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.down(self.up(self.norm(h)).tanh())

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Chained(nn.Module):
    """Blocks in no ModuleList, called with their mask first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Mixer(), Mixer(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.second(padding, self.first(padding, x)))


OWN = {"target_modules": ["up", "down"], "shared_modules": [], "temperature": 0.3}


def ids() -> Tensor:
    return torch.randint(0, 32, (3, 6), generator=torch.Generator().manual_seed(2))


def states() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- guessed


@own_module
def test_own_module_trains_moves_its_centers_and_loads(tmp_path: Path) -> None:
    model = routed(Listed(), **OWN, center_init="kmeans")
    initialize_centers(model, [{"ids": ids()}], progress=False)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    CenterUpdate(every=1, until=8).attach(model, optimizer)
    before, losses = [r.centers["default"].clone() for r in routers(model)], []
    model.train()
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(ids()).flatten(0, 1), ids().flatten() % 3)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(r.centers["default"], c) for r, c in zip(routers(model), before))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Listed(), tmp_path).eval()
    assert torch.equal(loaded(ids()), model(ids()))
    assert not torch.equal(loaded(ids()), Listed()(ids()))


@own_module
def test_mask_of_the_model_says_which_tokens_count() -> None:
    model, mask = routed(Listed(), **OWN).eval(), torch.ones(3, 6)
    mask[0, 4:] = 0
    with record_routing(model) as record:
        model(ids(), attention_mask=mask)
    assert record.tokens == {"blocks.0": 16, "blocks.1": 16}


@own_module
@pytest.mark.parametrize("granularity", ["token", "mean"])
def test_images_and_loose_rows_are_tokens_too(granularity: str) -> None:
    """Hidden states `[B, height, width, d]` route as `[B, height * width, d]`, and `[N, d]` as one row."""
    model = routed(Listed(), **OWN, granularity=granularity).eval()
    flat = ids()
    expected = model(flat)
    torch.testing.assert_close(model(flat.view(3, 2, 3)), expected.view(3, 2, 3, 3))
    torch.testing.assert_close(model(flat[1]), model(flat[1:2])[0])


@own_module
def test_torchs_encoder_layer_runs_its_adapters_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", True)  # and as it was, afterwards

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            return self.encoder(x, src_key_padding_mask=padding)

    register_block(nn.TransformerEncoderLayer, attended=lambda inputs: _real(inputs.get("src_key_padding_mask")))
    model = routed(Encoder(), target_modules=["linear1", "linear2"], temperature=0.3).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), record_routing(model) as record:
        found = model(states(), padding=padding)
    assert record.tokens == {"encoder.layers.0": 8, "encoder.layers.1": 8}
    torch.testing.assert_close(found, model.train()(states(), padding=padding))  # without dropout
    with model.disable_adapter():
        assert not torch.allclose(model(states(), padding=padding), found, atol=1e-3)


def _real(mask: Tensor | None) -> Tensor | None:
    """torch hands its layers a padding mask as 0 and -inf."""
    return None if mask is None else mask == 0


# ---------------------------------------------------------------------- registered


def register_mixer() -> None:
    register_block(Mixer, hidden_states="h", hidden_size=WIDTH, attended=lambda inputs: ~inputs["padding"])


@registered
def test_registered_block_is_found_where_nothing_could_be_guessed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module is routed.*register_block"):
        routed(Chained(), **OWN)
    register_mixer()
    model = routed(Chained(), **OWN).eval()
    plan = describe_routing(model)
    assert [(b.name, b.routed) for b in plan.blocks] == [("first", ("up", "down")), ("second", ("up", "down"))]
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with record_routing(model) as record:
        out = model(states(), padding=padding)
    assert record.tokens == {"first": 8, "second": 8}
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Chained(), tmp_path).eval()(states(), padding=padding), out)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(states(), padding=padding), out)
    left = model.unload()
    assert torch.equal(left(states(), padding=padding), Chained()(states(), padding=padding))
    assert type(left.first) is Mixer
    assert set(vars(left.first)) == set(vars(Chained().first))


@registered
@pytest.mark.parametrize("granularity", ["last", "mean", "max"])
def test_registered_mask_counts_where_sequences_are_routed(granularity: str) -> None:
    register_mixer()
    model = routed(Chained(), **OWN, granularity=granularity).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    together = model(states(), padding=padding)
    alone = model(states()[1:, :3], padding=padding[1:, :3])
    torch.testing.assert_close(together[1:, :3], alone)


@registered
def test_registered_mask_leaves_the_prompts_decision_to_the_cache() -> None:
    inputs = {"input_ids": tokens(2, 6), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = routed(llama(), granularity="mean").eval().generate(**inputs)
    register_block(LlamaDecoderLayer, attended=lambda inputs: None)
    assert torch.equal(routed(llama(), granularity="mean").eval().generate(**inputs), expected)


@registered
def test_hidden_states_and_width_may_be_functions() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[0] + self.up(pair[0]), pair[1]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Wide(), Wide()])

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            pair = (x, context)
            for block in self.blocks:
                pair = block(pair)
            return pair[0]

    register_block(
        Wide,
        hidden_states=lambda inputs: torch.cat(inputs["pair"], -1),
        hidden_size=lambda block: block.up.in_features + 2,
    )
    model = routed(Model(), target_modules=["up"], num_centers=1).eval()
    assert {r.dim for r in routers(model)} == {WIDTH + 2}
    assert all(m.shape == (2, 5, 1) for m in gates(model, x=states(), context=torch.randn(2, 5, 2)))


@registered
def test_rearranged_tokens_meet_their_own_gates() -> None:
    """A block that turns the tokens around inside equals the same block that does not."""

    class Turned(nn.Module):
        def __init__(self, turns: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.turns = turns
            self.inner = nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH), "down": nn.Linear(WIDTH, WIDTH)})
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            inside = h.flip(1) if self.turns else h
            inside = self.inner["down"](self.inner["up"](inside).tanh())
            return self.out(inside.flip(1) if self.turns else inside)

    def model_of(turns: bool) -> PeftModel:
        return routed(nn.Sequential(Turned(turns), Turned(turns)), **{**OWN, "target_modules": ["up", "down", "out"]})

    def turned(block: Any, gates: Tensor, inputs: dict[str, Any]) -> Tensor:
        return gates.flip(1) if block.turns else gates

    register_block(Turned, rearrange={"inner": turned})
    straight, flipped = (model_of(turns).eval() for turns in (False, True))
    torch.testing.assert_close(flipped(states()), straight(states()))
    with straight.disable_adapter():
        assert not torch.allclose(straight(states()), flipped(states()), atol=1e-3)
    blocks._hooks.clear()
    register_block(Turned)
    assert not torch.allclose(model_of(True).eval()(states()), straight(states()), atol=1e-3)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: register_block(Mixer()), TypeError, r"takes a class of nn\.Module, not Mixer"),
        (lambda: register_block(Mixer, hidden_states="x"), ValueError, r"hidden_states='x' is no parameter of Mixer"),
    ],
)
def test_wrong_registrations_are_refused(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_hidden_states_of_another_width_are_named() -> None:
    register_block(Mixer, hidden_states="h", hidden_size=9)
    with pytest.raises(ValueError, match=r"first: hidden states of width 16 came where 9 .*register_block"):
        routed(Chained(), **OWN)(states(), padding=torch.zeros(2, 5, dtype=torch.bool))


def test_a_block_without_hidden_states_says_how_to_name_them() -> None:
    register_block(Mixer, hidden_states=lambda inputs: None, hidden_size=WIDTH)
    with pytest.raises(ValueError, match=r"without hidden states .*register_block\(\.\.\., hidden_states"):
        routed(Chained(), **OWN)(states())
