"""Text that comes in pieces, or several texts in a row: token mode takes them, the sequence modes refuse (rule 7)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tiny import llama, routed, tokens

SEQUENCE = ["last", "mean", "max", "prompt_end"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 65}
IDS = tokens(1, 9)
PACKED = torch.cat([IDS, tokens(1, 5, seed=9)], dim=1)
RESTARTING = torch.cat([torch.arange(9), torch.arange(5)])[None]
BOUNDARIES = torch.tensor([0, 9, 14], dtype=torch.int32)


def model_of(granularity: str) -> Any:
    return routed(llama(), granularity=granularity, temperature=0.2, task_type="CAUSAL_LM").eval()


def told(granularity: str) -> dict[str, Tensor]:
    return {"task_ids": torch.tensor([1])} if granularity == "task" else {}


PIECES: dict[str, dict[str, Any]] = {
    "prefill in chunks": {"prefill_chunk_size": 4},
    "a last chunk of one token": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted decoding": {"assistant_model": llama(3)},
}


@pytest.mark.proves("integration", "generate: chunked prefill and assisted decoding")
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("granularity", ["token", "task"])
def test_pieces_change_nothing_where_every_token_is_routed_alone(granularity: str, piece: str) -> None:
    model = model_of(granularity)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **told(granularity), **GREEDY}
    assert torch.equal(model.generate(**given, **PIECES[piece]), model.generate(**given))


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_sequence_modes_refuse_pieces(granularity: str, piece: str) -> None:
    model = model_of(granularity)
    with pytest.raises(ValueError, match="granularity='token'"):
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **PIECES[piece], **GREEDY)
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"decision on 4 tokens of 1 rows.*granularity='token'"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("length", [4, 8])
def test_prompt_that_begins_in_a_cache(length: int) -> None:
    def continued(model: Any) -> Tensor:
        cache = DynamicCache(config=model.get_base_model().config)
        with torch.no_grad():
            model(input_ids=IDS[:, :length], past_key_values=cache)
        return model.generate(input_ids=IDS, past_key_values=copy.deepcopy(cache), **GREEDY)

    model = model_of("token")
    assert torch.equal(continued(model), model.generate(input_ids=IDS, **GREEDY))
    with pytest.raises(ValueError, match=rf"decision on {length} tokens.*prompts that begin in a cache"):
        continued(model_of("last"))


def rows_alone(model: nn.Module, granularity: str) -> Tensor:
    rows = [PACKED[:, :9], PACKED[:, 9:]]
    return torch.cat([model(input_ids=row, **told(granularity)).logits for row in rows], dim=1)


@pytest.mark.proves("integration", "packed rows with restarting positions")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("granularity", ["token", "task"])
def test_packed_rows_equal_the_rows_alone(granularity: str, training: bool) -> None:
    model = model_of(granularity).train(training)
    packed = model(input_ids=PACKED, position_ids=RESTARTING, use_cache=False, **told(granularity)).logits
    torch.testing.assert_close(packed, rows_alone(model, granularity))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_sequence_modes_refuse_packed_rows(granularity: str, training: bool) -> None:
    model = model_of(granularity).train(training)
    given = {"input_ids": PACKED, "labels": PACKED, "use_cache": False}
    with pytest.raises(ValueError, match=rf"{granularity!r} takes one sequence per row.*granularity='token'"):
        model(**given, position_ids=RESTARTING)
    lengths = {"max_length_q": 9, "max_length_k": 9}
    with pytest.raises(ValueError, match="packed"):
        model(**given, cu_seq_lens_q=BOUNDARIES, cu_seq_lens_k=BOUNDARIES, **lengths)
