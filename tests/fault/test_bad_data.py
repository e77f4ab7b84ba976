"""`initialize_centers` refuses data that it cannot fit centers to, and sets no center then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from monkeyjump import initialize_centers
from monkeyjump.tuner.model import routers
from tiny import by_message, llama, routed, tokens

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def fresh(**config: Any) -> PeftModel:
    return routed(llama(), **{"center_init": "kmeans", "target_modules": TARGETS, **config}).train()


def untouched(model: PeftModel) -> bool:
    found = routers(model)
    idle = not any(router.observers or router.context.frames or router.ready["default"] for router in found)
    return idle and model.training and not any(router.centers["default"].any() for router in found)


def rows(ids: Tensor) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.tolist()} for row in ids]


SAME = torch.full((4, 6), 5)
BAD_DATA: list[tuple[Any, dict[str, Any], list[str]]] = [
    ([], {}, ["data is empty", "at least one"]),
    (iter([]), {}, ["no attended token"]),
    (["some text"], {}, ["list of texts", "tokenizer="]),
    ([{"text": "some text"}], {}, ["without input_ids", "text", "tokenize them first"]),
    ([[1, 2, 3]], {}, ["without input_ids", "list"]),
    ([{"words": torch.ones(2, 3)}], {}, ["input_ids"]),
    ([{"input_ids": SAME, "attention_mask": torch.zeros_like(SAME)}], {}, ["no attended token"]),
    (rows(tokens()), {"max_tokens": 0}, ["max_tokens=0", "at least 1, or None"]),
    (rows(tokens()), {"max_samples": -1}, ["max_samples=-1", "at least 1, or None"]),
    (rows(tokens()), {"memory_limit": "lots"}, ["memory_limit='lots'", "'4GB'"]),
]


@pytest.mark.parametrize(("data", "arguments", "words"), by_message(BAD_DATA))
def test_data_without_states_is_refused(data: Any, arguments: dict, words: list[str]) -> None:
    model = fresh()
    with pytest.raises(ValueError) as error:
        initialize_centers(model, data, progress=False, **arguments)
    assert not [word for word in words if word not in str(error.value)], error.value
    assert untouched(model)


@pytest.mark.parametrize("center_init", ["kmeans", "random_tokens"])
@pytest.mark.parametrize("granularity", ["token", "last"])
def test_identical_tokens_are_refused_with_block_and_counts(center_init: str, granularity: str) -> None:
    model = fresh(center_init=center_init, granularity=granularity)
    one_token = [{"input_ids": SAME[:, :1], "attention_mask": torch.ones(4, 1)}]
    with pytest.raises(
        ValueError, match=r"model\.layers\.0.*\b1\b.*distinct.*\b3\b|model\.layers\.0.*\b3\b.*\b1\b distinct"
    ):
        initialize_centers(model, one_token, progress=False)
    assert untouched(model)


def test_refusal_in_a_later_block_leaves_all_centers_unset() -> None:
    # two slots in block 0, three in block 1, and states of which there are two: block 0 alone could be fitted
    regex = r".*layers\.0\.self_attn\.[qk]_proj|.*layers\.1\.self_attn\.[qkv]_proj"
    model = fresh(target_modules=regex, shared_modules=[])
    for layer in model.get_base_model().model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no mixing of positions: equal tokens stay equal
    two_tokens = [{"input_ids": torch.tensor([[5, 5, 5, 6, 6, 6]])}]
    with pytest.raises(ValueError, match=r"model\.layers\.1.*distinct"):
        initialize_centers(model, two_tokens, progress=False)
    assert untouched(model)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, ["single mapping", "list of batches"]),
        ({"train": [], "test": []}, ["single mapping of train, test", "one split"]),
    ],
)
def test_a_mapping_is_told_what_is_wanted(data: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        initialize_centers(fresh(), data, progress=False)


@pytest.mark.parametrize("kind", ["stream", "numpy"])
def test_streams_of_rows_and_arrays_are_read(kind: str) -> None:
    ids = tokens(8, 6)
    data = {"stream": (row for row in rows(ids)), "numpy": [{"input_ids": row.numpy()} for row in ids]}[kind]
    assert initialize_centers(fresh(), data, progress=False).seen == 48


@pytest.mark.parametrize(
    ("argument", "value", "remedy"),
    [
        ("max_tokens", "50k", "use an integer of at least 1, or None"),
        ("max_samples", 0, "use an integer of at least 1, or None"),
        ("memory_limit", "1.2.3GB", "'4GiB'"),
    ],
)
def test_limits_of_the_wrong_kind_are_refused(argument: str, value: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value!r}.*{remedy}"):
        initialize_centers(fresh(), rows(tokens()), progress=False, **{argument: value})


def test_states_that_are_not_finite_never_become_centers() -> None:
    model = fresh()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    ids = tokens(8, 9)
    ids[0, 4] = 7
    initialize_centers(model, rows(ids), progress=False)
    assert all(router.centers["default"].isfinite().all() for router in routers(model))


def test_only_states_that_are_not_finite_are_refused() -> None:
    model = fresh()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model\.layers\.0.*finite"):
        initialize_centers(model, rows(tokens()), progress=False)
    assert untouched(model)


def test_nothing_to_initialize_is_said() -> None:
    model = fresh(center_init="random")
    with pytest.raises(ValueError, match=r"no active adapter needs data .*center_init: random"):
        initialize_centers(model, rows(tokens()))
    with pytest.raises(ValueError, match="no routed adapter"):
        initialize_centers(llama(), rows(tokens()))


def test_failing_forward_restores_modes_and_observers() -> None:
    model = fresh()
    with pytest.raises(IndexError):
        initialize_centers(model, [{"input_ids": torch.full((1, 4), 10_000)}], progress=False)
    assert untouched(model)
    assert not any(router._disable_adapters for router in routers(model))
