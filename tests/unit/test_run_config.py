"""A run's file: what it may say, who wins, and what is answered where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel

from monkeyjump.methods import METHODS
from monkeyjump.tasks import InputError
from monkeyjump.training.adapters import adapter_config
from monkeyjump.training.arguments import NAMED, training_arguments
from monkeyjump.training.config import SECTIONS, Centers, Method, Train, absolute, json_schema
from monkeyjump.training.presets import RUN_PRESETS
from monkeyjump.training.read import describe_fields, read_run, write_run
from monkeyjump.training.sweep import method_named
from tiny import llama

GOOD = "model: {path: somewhere}\ndata: {tasks: [tweets]}\noutput: {folder: out}\n"
FINE = "columns: {text: a, label: b}, instruction: '{text}', choices: [x, y]"


@pytest.fixture
def written(tmp_path: Path):
    def written(text: str, *overrides: str, preset: str | None = None):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return read_run(path, overrides, preset)

    return written


def test_preset_then_file_then_overrides(written):
    text = GOOD + "preset: paper\ntrain: {epochs: 7, weight_decay: 0.5}\n"
    found = written(text, "train.epochs=9", "method.top_k=1")
    assert found.train.batch_size == 4  # the preset's
    assert found.train.weight_decay == 0.5  # the file's
    assert found.train.epochs == 9  # the override's
    assert found.method.options["top_k"] == 1
    assert written(text, preset="paper-vision").train.accumulation == 8


def test_the_paper_preset_is_table_13(written):
    found = written(GOOD + "preset: paper\n")
    config = adapter_config(found.method, llama())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.top_k, config.temperature) == (2, 5, 0.05, 2, 1.0)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}
    assert (config.ema_momentum, config.gate_norm, config.ema_space) == (0.5, "none", "raw")
    centers, train = found.method.centers, found.train
    assert (centers.every, centers.until, centers.max_tokens) == (2, 5000, 50_000)
    assert (train.learning_rate, train.scheduler, train.warmup, train.weight_decay) == (1e-4, "cosine", 0.1, 0.1)
    assert (train.epochs, train.batch_size, train.accumulation, train.precision) == (2, 4, 4, "bf16")
    assert found.data.max_length == 1024
    for base, rate in (("lora_fa", 4e-4), ("propulsion", 4e-4), ("adalora", 1e-4)):
        assert written(GOOD + f"preset: paper\nmethod: {{base: {base}}}\n").train.learning_rate == rate
    vision = written(GOOD, preset="paper-vision")
    assert (adapter_config(vision.method, llama()).r, vision.data.max_length) == (1, 2048)


def test_more_is_told_the_tasks_of_the_run(written):
    found = adapter_config(written(GOOD + "method: {base: more}\n").method, llama(), tasks=["a", "b"])
    assert (found.num_tasks, found.task_names) == (2, ["a", "b"])
    room = written(GOOD + "method: {base: more, num_tasks: 5}\n").method
    assert adapter_config(room, llama(), tasks=["a", "b"]).num_tasks == 5
    with pytest.raises(InputError, match=r"method\.num_tasks: 5, but data\.tasks has 6"):
        adapter_config(room, llama(), tasks=list("abcdef"))
    with pytest.raises(InputError, match="'task_names' is no field of more"):
        written(GOOD + "method: {base: more, task_names: [a]}\n")


@pytest.mark.parametrize("name", RUN_PRESETS)
def test_every_preset_is_a_valid_run(written, name: str):
    assert written(GOOD, preset=name).output.folder == Path("out")


def test_what_is_written_out_reads_the_same(written, tmp_path: Path):
    found = written(GOOD + "method: {r: 3, target_modules: [q_proj]}\ntrain: {learning_rate: 1e-3}\n")
    path = tmp_path / "again.yaml"
    path.write_text(write_run(found))
    assert read_run(path) == found
    assert OmegaConf.load(path).train.learning_rate == 1e-3


def test_the_plain_method_takes_what_the_routed_one_takes(written):
    for base in ("lora", "lora_fa", "adalora"):
        routed = adapter_config(written(GOOD, f"method.base={base}", "method.preset=paper").method, llama(), 50)
        plain = adapter_config(
            written(GOOD, f"method.base={base}", "method.preset=paper", "method.routed=false").method, llama(), 50
        )
        assert plain.peft_type.value == routed.peft_type.value.removeprefix("MJ_")
        for name in ("r", "init_r", "target_r", "lora_alpha", "lora_dropout", "total_step", "task_type"):
            assert getattr(plain, name, None) == getattr(routed, name, None), name
    assert set(plain.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}


def test_mixtures_are_named_as_base_and_never_routed(written):
    found = written(GOOD, "method.base=moelora", "method.num_experts=3", "method.r=2").method
    assert found.routed is False
    config = adapter_config(found, llama())
    assert (type(config).__name__, config.num_experts, config.r, config.top_k) == ("MoELoRAConfig", 3, 2, 2)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}
    assert config.task_type == "CAUSAL_LM"
    paper = adapter_config(written(GOOD, "method.base=moe_lora", preset="paper").method, llama())
    assert (paper.r, paper.lora_alpha, paper.lora_dropout) == (2, 5, 0.05)
    released = adapter_config(written(GOOD, "method.base=moe_lora", "method.preset=released").method, llama())
    assert (released.r, released.top_k) == (8, 2)  # the preset's top_k is of Monkey Jump's routing
    for base, rate in (("moe_lora_fa", 4e-4), ("moe_propulsion", 4e-4), ("moelora", 1e-4)):
        assert written(GOOD, f"method.base={base}", preset="paper").train.learning_rate == rate
    for base, ranks in (("moe_adalora", (3, 2)), ("adalora", (3, 2))):
        config = adapter_config(written(GOOD, f"method.base={base}", preset="paper").method, llama(), 50)
        assert (config.init_r, config.target_r, config.total_step) == (*ranks, 50)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_can_be_swept_over_the_same_file(written, name: str):
    file = written(GOOD + "method: {r: 4, lora_alpha: 8, lora_dropout: 0.0, top_k: 1, shared_modules: [o_proj]}\n")
    chosen = method_named(name, file.method)
    row, config = METHODS[name], adapter_config(chosen, llama(), 50)
    assert type(config) is row.config_class
    assert (chosen.base, chosen.routed) == (row.base, row.routed)
    assert all(getattr(config, field) == value for field, value in row.options.items())
    if "propulsion" not in name:
        rank = ("target_r", "init_r") if "adalora" in name else ("r",)
        assert [getattr(config, field) for field in rank] == [4, 6][: len(rank)]
        assert (config.lora_alpha, config.lora_dropout) == (8, 0.0)
    assert written(write_run(file.model_copy(update={"method": chosen}))).method == chosen


def test_paths_are_relative_to_the_file(written, tmp_path: Path):
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    tasks = "[own.yaml, {name: a, source: {kind: files, train: mine.jsonl}, " + FINE + "}]"
    found = written(f"model: {{path: model}}\ndata: {{tasks: {tasks}}}\noutput: {{folder: o}}\n")
    assert found.model.path == str(tmp_path / "model")
    name, task = found.data.tasks
    assert name == str(tmp_path / "own.yaml")
    assert task.source.train == tmp_path / "mine.jsonl"
    (tmp_path / "deeper").mkdir()
    again = tmp_path / "deeper" / "again.yaml"
    again.write_text(write_run(absolute(found)))
    assert read_run(again) == found  # here the paths were absolute already


def test_train_section_reaches_transformers(tmp_path: Path):
    train = Train(batch_size=3, accumulation=2, scheduler="cosine", max_steps=7, arguments={"adam_beta2": 0.9})
    found = training_arguments(train, tmp_path, use_cpu=True)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.max_steps) == (3, 2, 7)
    assert found.adam_beta2 == 0.9
    assert found.save_total_limit is None  # Trainer deletes the old checkpoint before the new one is complete
    assert found.report_to == []


BROKEN = [
    (GOOD + "trian: {epochs: 2}\n", "unknown field 'trian'", "'train'"),
    (GOOD + "train: {learning_rat: 2}\n", "unknown field 'train.learning_rat' = 2", "'learning_rate'"),
    (GOOD + "train: {epochs: true}\n", "train.epochs = True: a number is needed", ""),
    (GOOD + "train: {batch_size: 0}\n", "train.batch_size = 0: input should be greater than or equal to 1", ""),
    (GOOD + "train: {scheduler: cosin}\n", "train.scheduler = 'cosin' is not known: did you mean 'cosine'", ""),
    (GOOD + "train: {arguments: {seed: 1}}\n", "'seed': set seed instead", ""),
    (GOOD + "train: {arguments: {fdsp: x}}\n", "'fdsp' is no argument of TrainingArguments: did you mean 'fsdp'", ""),
    (GOOD + "method: {topk: 2}\n", "'topk' is no field of lora: did you mean 'top_k'", ""),
    (GOOD + "method: {base: lroa}\n", "base='lroa' is not known: did you mean", ""),
    (GOOD + "method: {base: moelroa}\n", "base='moelroa' is not known: did you mean 'moelora'", ""),
    (
        GOOD + "method: {base: moelora, num_expert: 4}\n",
        "'num_expert' is no field of moelora: did you mean 'num_exp",
        "",
    ),
    (GOOD + "method: {base: moelora, shared_modules: []}\n", "'shared_modules' is no field of moelora", ""),
    (GOOD + "method: {base: moelora, top_k: 5}\n", "top_k=5 is out of range: there are only num_experts=4", ""),
    (
        GOOD + "method: {base: moelora, routed: true}\n",
        "base='moelora' cannot be routed: it has a router of its own",
        "",
    ),
    (GOOD + "method: {base: hydralora, topk: 1, centers: {evry: 2}}\n", "'topk' is no field of hydralora", ""),
    (GOOD + "method: {top_k: 0}\n", "top_k=0 is out of range: use an integer of at least 1", ""),
    (GOOD + "method: {temperature: 0}\n", "temperature=0 is out of range: use a number above 0", ""),
    (GOOD + "method: {centers: {evry: 2}}\n", "unknown field 'method.centers.evry' = 2", "'every'"),
    (GOOD + "method: {centers: {until: 1.5}}\n", "method.centers.until = 1.5: use a number of steps, or a share", ""),
    (GOOD + "preset: papper\n", "unknown preset 'papper'", "'paper'"),
    (GOOD.replace("[tweets]", "[]"), "data.tasks: no data: name at least one task", ""),
    (GOOD.replace("[tweets]", "[{nam: a, source: {kind: files, train: b}}]"), "unknown field 'nam'", ""),
    (GOOD.replace("[tweets]", "[{name: a, source: {kind: files, train: no.jsonl}}]"), "no such file", ""),
    (GOOD.replace("{path: somewhere}", "{}"), "field 'model.path' is missing", "--help"),
    ("- a\n", "expected sections, found list", "model"),
    ("model: {path: [\n", "not YAML", ""),
]


@pytest.mark.parametrize(("text", "message", "hint"), BROKEN, ids=[message[:40] for _, message, _ in BROKEN])
def test_a_broken_file_is_answered_in_one_sentence(written, text: str, message: str, hint: str):
    with pytest.raises(InputError) as caught:
        written(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "run.yaml" in str(caught.value) or "preset" in str(caught.value)
    assert hint in caught.value.hint


def test_all_problems_come_at_once(written):
    with pytest.raises(InputError) as caught:
        written("model: {}\nmethod: {topk: 2, centers: {evry: 1}}\ndata: {cap: 0, tasks: [a]}\ntrain: {epochs: x}\n")
    for word in ("model.path", "topk", "evry", "data.cap", "train.epochs", "'output'"):
        assert word in str(caught.value), word


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train"])
def test_an_override_without_a_value_is_refused(written, override: str):
    with pytest.raises(InputError, match=f"override '{override}': expected section.field=value"):
        written(GOOD, override)


def test_every_field_has_a_help_text():
    fields = describe_fields()
    missing = [name for name, _, _, text in fields if not text]
    assert not missing
    assert {"train.learning_rate", "method.top_k", "method.r", "data.tasks"} <= {name for name, *_ in fields}


def test_the_json_schema_knows_all_fields_and_forbids_others():
    schema = json_schema()
    definitions = {"RunConfig": schema, **schema["$defs"]}
    for model in (*SECTIONS.values(), Centers):
        assert set(model.model_fields) <= set(definitions[model.__name__]["properties"])
        if model is not Method:
            assert definitions[model.__name__]["additionalProperties"] is False
    assert "top_k" in definitions["Method"]["properties"]
    assert issubclass(Method, BaseModel)


def test_arguments_that_have_a_name_of_ours_exist():
    for ours in set(NAMED.values()):
        section, _, field = ours.rpartition(".")
        assert field in SECTIONS[section or "train"].model_fields
