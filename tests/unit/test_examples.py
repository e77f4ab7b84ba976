"""Every example is a valid run, and its adapter fits the model that it names, as far as that goes offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from monkeyjump.tasks.reading import catalog
from monkeyjump.training.config import RunConfig
from monkeyjump.training.data import describe
from monkeyjump.training.plan import make_plan
from monkeyjump.training.read import read_run

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = {
    str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.glob("**/*.yaml")) if "launch" not in path.parts
}


def llama(hidden: int, wide: int, layers: int, heads: int, kv: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=words, head_dim=hidden // heads,
    )  # fmt: skip


def llava(hidden: int, wide: int, layers: int, heads: int, kv: int) -> LlavaOnevisionConfig:
    text = Qwen2Config(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=152_000,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    return LlavaOnevisionConfig(text_config=text, vision_config=vision)


# shapes as the models' own config files say
SHAPES = {
    "demo": llama(576, 1536, 30, 9, 3, 49_152),
    "meta-llama/Llama-3.2-1B-Instruct": llama(2048, 8192, 16, 32, 8, 128_256),
    "meta-llama/Meta-Llama-3-8B-Instruct": llama(4096, 14_336, 32, 32, 8, 128_256),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": llava(3584, 18_944, 28, 28, 4),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": llava(896, 4864, 24, 14, 2),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shapes")
    for number, config in enumerate(SHAPES.values()):
        config.save_pretrained(folder / str(number))
    return {name: str(folder / str(number)) for number, name in enumerate(SHAPES)}


def planned(path: Path, shapes: dict[str, str]) -> tuple[RunConfig, dict]:
    config = read_run(path)
    config = read_run(path, [f"model.path={shapes[config.model.path]}"])
    return config, make_plan(config, parameters_only=True).record()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_planned(shapes: dict[str, str], name: str) -> None:
    config, plan = planned(EXAMPLES[name], shapes)
    assert plan["problems"] == []
    assert plan["missed"] == []
    assert plan["routed"]
    assert all("language_model" in block["name"] or "model.layers" in block["name"] for block in plan["blocks"])
    assert not plan["plain"]  # nothing of the picture tower
    assert describe(config.data)


# section 5.2: r = 2, q, k, v, o of 24 blocks, d = 896, keys and values 128 wide
@pytest.mark.parametrize(("base", "count"), [("lora", 270_336), ("lora-fa", 98_304), ("propulsion", 49_152)])
def test_the_ablations_have_the_papers_parameter_counts(shapes: dict[str, str], base: str, count: int) -> None:
    _, plan = planned(EXAMPLES[f"paper/ablation-{base}.yaml"], shapes)
    assert (plan["trainable_parameters"], len(plan["blocks"])) == (count, 24)


def test_the_papers_runs_take_its_settings_and_tasks() -> None:
    runs = {name: read_run(path) for name, path in EXAMPLES.items() if name.startswith("paper/")}
    assert len(runs) == 16
    tasks = {task for name, run in runs.items() if "ablation" not in name for task in run.data.tasks}
    assert tasks == set(catalog("suite"))
    for name, run in runs.items():
        fast = "lora-fa" in name or "propulsion" in name
        assert run.train.learning_rate == (4e-4 if fast else 1e-4), name
        assert run.method.centers.until == (0.6 if "ablation" in name else 5000)
    assert runs["paper/image-lora.yaml"].method.options["r"] == 1
    assert runs["paper/video-adalora.yaml"].method.options["target_r"] == 1


def test_the_example_with_own_files_reads_them() -> None:
    from monkeyjump.training.data import load_tasks

    chats, reviews = load_tasks(read_run(EXAMPLES["own-jsonl.yaml"]).data)
    assert len(chats.train) + len(chats.test) == 40
    assert {example.gold[0] for example in reviews.train} == {"positive", "negative"}
