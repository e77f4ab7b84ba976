"""Kinds of rows and sources: chats, pairs, options, numbers, folders; and what the refusal of a wrong one says."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from small_inputs import tokenizer, write_lines
from suite_rows import picture

from monkeyjump.tasks import InputError, Prompts, Size, load_task, read_task
from monkeyjump.tasks.cache import home
from monkeyjump.tasks.origins import HubSource
from monkeyjump.tasks.sources import hub_rows

OPTIONS = (
    "columns: {question: q, label: right}\ninstruction: |-\n  {question}\n  {options}\n"
    "options: {column: answers, label: letter}\n"
)


def task(folder: Path, text: str, rows: list[dict[str, object]] | None = None):
    if rows is not None:
        write_lines(folder / "rows.jsonl", rows)
    path = folder / "task.yaml"
    path.write_text("name: mine\nsource: {kind: files, train: rows.jsonl}\n" + text)
    return read_task(path)


def load(folder: Path, text: str, rows: list[dict[str, object]] | None = None):
    return load_task(task(folder, text, rows), "all")


def chat(n: int) -> dict[str, object]:
    turns = [
        {"role": "user", "content": f"film {n} ?"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "the food ?"},
        {"role": "assistant", "content": "bad"},
    ]
    return {"messages": turns}


def test_rows_of_prompt_and_answer_need_no_template(tmp_path: Path):
    loaded = load(tmp_path, "", [{"prompt": f"film {n} ?", "answer": "good"} for n in range(10)])
    assert (len(loaded.train), len(loaded.test)) == (8, 2)
    example = loaded.train[0]
    assert example.gold == ("good",)
    row = Prompts(tokenizer()).encode(loaded.task, 0, example)
    assert tokenizer().decode([i for i in row["labels"] if i >= 0]) == "good </s>"


def test_every_turn_of_the_assistant_is_trained_on_and_the_last_is_the_answer(tmp_path: Path):
    loaded = load(tmp_path, "messages: messages\n", [chat(n) for n in range(5)])
    prompts = Prompts(tokenizer())
    row = prompts.encode(loaded.task, 0, loaded.train[0])
    assert tokenizer().decode([i for i in row["labels"] if i >= 0]) == "good </s> bad </s>"
    text = tokenizer().decode(row["input_ids"])
    assert text.count("<s> assistant good </s>") == 1
    assert text.endswith("<s> assistant bad </s>")
    alone = prompts.tokenizer(prompts._render([*prompts._system, *chat(int(text.split()[6]))["messages"]], reply=False))
    assert row["input_ids"] == alone.input_ids  # piece by piece as in one go


def test_chats_keep_their_own_system_turn(tmp_path: Path):
    rows = [{"messages": [{"role": "system", "content": f"poor {n}"}, *chat(n)["messages"]]} for n in range(5)]
    loaded = load(tmp_path, "messages: messages\n", rows)
    text = tokenizer().decode(Prompts(tokenizer()).prompt(loaded.task, loaded.train[0]))
    assert text.startswith("<s> system poor")
    assert text.count("system") == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path):
    loaded = load(tmp_path, "messages: messages\n", [chat(n) for n in range(5)])
    forgetful = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %} assistant"
    with pytest.raises(InputError, match="chat template writes a turn differently"):
        Prompts(tokenizer(forgetful)).encode(loaded.task, 0, loaded.train[0])


def test_max_length_cuts_texts_and_nothing_else(tmp_path: Path):
    loaded = load(tmp_path, "", [{"prompt": f"{n} " + "film " * 50, "answer": "good"} for n in range(5)])
    prompts = Prompts(tokenizer(), max_length=20)
    row = prompts.encode(loaded.task, 0, loaded.train[0])
    assert len(row["input_ids"]) == 20
    assert (
        tokenizer().decode(row["input_ids"]).endswith("film </s><s> assistant good </s>".replace("</s><s>", "</s> <s>"))
    )
    assert prompts.cut["mine"] > 0
    with pytest.raises(InputError, match=r"need .* tokens, max_length is 5"):
        Prompts(tokenizer(), max_length=5).encode(loaded.task, 0, loaded.train[0])


def test_numbers_are_said_with_their_decimals(tmp_path: Path):
    text = "columns: {text: t, label: y}\ninstruction: '{text}'\nanswer: number\nrange: [0, 5]\nmetric: spearman\n"
    loaded = load(tmp_path, text, [{"t": f"film {n}", "y": n / 3} for n in range(10)])
    gold = {example.fields["text"]: example.gold for example in [*loaded.train, *loaded.test]}
    assert gold["film 2"] == ("0.7",)
    assert gold["film 9"] == ("3.0",)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_folder_of_files_is_one_source(tmp_path: Path, suffix: str):
    for part in range(3):
        rows = [{"prompt": f"film {part} {n} ?", "answer": "good"} for n in range(4)]
        path = tmp_path / "rows" / f"part{part}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == "jsonl":
            write_lines(path, rows)
        else:
            getattr(datasets.Dataset.from_list(rows), f"to_{suffix}")(str(path))
    path = tmp_path / "task.yaml"
    path.write_text("name: mine\nsource: {kind: files, train: rows}\n")
    loaded = load_task(read_task(path), Size(train=None, test=2))
    assert (len(loaded.train), len(loaded.test)) == (10, 2)


def test_a_folder_of_pictures_has_its_folders_as_classes(tmp_path: Path):
    for number, label in enumerate(("cat", "dog")):
        (tmp_path / "rows" / label).mkdir(parents=True)
        for n in range(5):
            picture(10 * number + n).save(tmp_path / "rows" / label / f"{n}.png")
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: mine\nsource: {kind: files, train: rows}\nmedia: {kind: image, column: image}\n"
        "columns: {label: label}\ninstruction: cat or dog?\nchoices: [cat, dog]\nlabels: index\n"
    )
    loaded = load_task(read_task(path), "all")
    assert len(loaded.train) + len(loaded.test) == 10
    example = loaded.train[0]
    number = int(example.where.split()[-1]) - 1
    assert example.gold == (("cat", "dog")[number // 5],)
    assert example.media[0].size == (20, 16)


def test_a_changed_file_is_read_anew(tmp_path: Path):
    rows = [{"prompt": f"film {n} ?", "answer": "good"} for n in range(5)]
    assert len(load(tmp_path, "", rows).train) == 4
    assert len(load(tmp_path, "", [*rows, *({"prompt": f"food {n}", "answer": "bad"} for n in range(5))]).train) == 8


def test_labels_are_the_same_from_every_format(tmp_path: Path):
    text = "columns: {text: t, label: y}\ninstruction: '{text}'\nchoices: [up, down]\n"
    text += "labels: {up: [true], down: [false]}\n"
    loaded = load(tmp_path, text, [{"t": f"film {n}", "y": bool(n % 2)} for n in range(10)])
    (tmp_path / "rows.csv").write_text("t,y\n" + "".join(f"film {n},{bool(n % 2)}\n" for n in range(10)))
    path = tmp_path / "task.yaml"
    path.write_text(path.read_text().replace("rows.jsonl", "rows.csv"))
    again = load_task(read_task(path), "all")
    assert {e.key: e.gold for e in [*again.train, *again.test]} == {
        e.key: e.gold for e in [*loaded.train, *loaded.test]
    }


def one_bad(**values: object) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [{"q": f"film {n} ?", "answers": ["good", "bad"], "right": "A"} for n in range(30)]
    rows[6] = values
    return rows


def bad_chat(*turns: object) -> list[dict[str, object]]:
    return [*(chat(n) for n in range(30)), {"messages": list(turns)}]


@pytest.mark.parametrize(
    ("text", "rows", "message", "hint"),
    [
        (OPTIONS, one_bad(q="a", answers=["x", "y"], right="C"), "row 7, field 'right': 'C' is no answer", "A, B"),
        (
            OPTIONS,
            one_bad(q="a", answers="x", right="A"),
            "row 7, field 'answers': expected a list.* found str",
            "answers|row",
        ),
        (OPTIONS, one_bad(q="a", answers=["x"], right="A"), "row 7, field 'answers': 1 options", "from 2"),
        (OPTIONS, one_bad(q="a", right="A"), "row 7: no column 'answers'", "columns there"),
        ("", [{"prompt": "a", "answer": {}}] * 3, "row 1, field 'answer': expected text.* found dict", "columns.label"),
        (
            "",
            [{"prompt": f"a {n}", "answer": "" if n % 10 else "b"} for n in range(30)],
            "27 of 30 rows have no answer",
            "label",
        ),
        ("messages: chat\n", [chat(1)], "row 1: no column 'chat'", "messages"),
        (
            "messages: messages\n",
            bad_chat("hello"),
            r"row 31, field 'messages\[0\]': expected .* found str",
            "messages",
        ),
        ("messages: messages\n", bad_chat({"role": "bot", "content": "x"}), r"row 31.*role': 'bot' is no role", "user"),
        ("messages: messages\n", bad_chat({"role": "user"}), r"row 31.*content': expected text, found NoneType", "row"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, text: str, rows, message: str, hint: str):
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, text, rows)
    assert "rows.jsonl" in str(caught.value)
    assert any(word in caught.value.hint for word in hint.split("|"))


def test_few_rows_without_an_answer_go_out_with_a_count(tmp_path: Path):
    rows = [{"prompt": f"film {n} ?", "answer": "good" if n else "  "} for n in range(40)]
    loaded = load(tmp_path, "", rows)
    assert loaded.dropped["no answer"] == 1
    assert len(loaded.train) + len(loaded.test) == 39


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {label: y}\ninstruction: x\n", "give choices: .* or options: .* or answer"),
        ("columns: {label: y}\ninstruction: x\nchoices: [a]\n", "at least two"),
        ("columns: {label: y}\ninstruction: '{options}'\nchoices: [a, b]\n", "gives no options"),
        ("columns: {label: y}\ninstruction: x\nanswer: text\nchoices: [a, b]\n", "leaves no room for choices"),
        ("columns: {label: y}\ninstruction: x\noptions: {columns: [a, b], column: c}\n", "either columns"),
        ("columns: {label: y}\ninstruction: x\noptions: {column: c, label: key}\n", "belong together"),
        ("messages: m\ninstruction: x\n", "leave out instruction"),
        ("columns: {label: y}\ninstruction: x\nchoices: [a, b]\nmetric: acuracy\n", "did you mean 'accuracy'"),
        ("columns: {label: y}\ninstruction: x\nchoices: [a, b]\napart: [z]\n", "apart: .*'z'"),
        ("metric: nope\nmax_text_tokens: 0\nmedea: 1\n", "metric.*max_text_tokens|max_text_tokens.*metric"),
    ],
)
def test_a_wrong_description_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        task(tmp_path, text, [{"prompt": "a", "answer": "b"}])


def test_a_folder_that_mixes_formats_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "rows.jsonl" / "a.jsonl").write_text("{}")
    (tmp_path / "rows.jsonl" / "b.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="mixes csv, jsonl"):
        task(tmp_path, "")


def test_an_open_quote_is_named(tmp_path: Path):
    (tmp_path / "rows.csv").write_text('prompt,answer\na,b\n"c,d\ne,f\n')
    path = tmp_path / "task.yaml"
    path.write_text("name: mine\nsource: {kind: files, train: rows.csv}\n")
    with pytest.raises(InputError, match=r"rows.csv, row \d: .*end of data") as caught:
        load_task(read_task(path), "all")
    assert "quotes" in caught.value.hint


def test_nothing_is_left_behind_by_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MONKEYJUMP_HOME", str(tmp_path / "home"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\nnot json\n')
    with pytest.raises(InputError, match="row 2: not JSON"):
        load_task(task(tmp_path, ""), "all")
    assert list((home() / "rows").iterdir()) == []


def test_an_unknown_hub_set_says_what_to_check(tmp_path: Path):
    path = tmp_path / "task.yaml"
    path.write_text("name: mine\nsource: {kind: hub, id: nobody/nothing-at-all}\n")
    with pytest.raises(InputError, match=r"nobody/nothing-at-all\[train\]: cannot be loaded") as caught:
        load_task(read_task(path), "all")
    assert "network" in caught.value.hint


def test_without_a_network_a_stream_of_the_hub_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **options: pytest.fail("tries again for minutes"))
    with pytest.raises(InputError, match=r"nobody/nothing\[train\]: cannot be loaded: ConnectError") as caught:
        next(hub_rows(HubSource(kind="hub", id="nobody/nothing"), "train"))
    assert "network" in caught.value.hint


@pytest.mark.slow
def test_a_million_rows_are_loaded_in_bounded_memory(tmp_path: Path):
    """In a process of its own: what loading and reading rows adds to the memory stays far below the file's size."""
    import subprocess
    import sys

    text = "words " * 60
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(1_000_000):
            file.write(json.dumps({"prompt": f"{n} {text}", "answer": "good"}) + "\n")
    task(tmp_path, "")
    code = f"""
import resource, datasets, pyarrow
from monkeyjump.tasks import load_task, read_task
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load_task(read_task(Path({str(tmp_path / "task.yaml")!r})), "all")
assert len(loaded.train) == 800_000
assert loaded.train[799_999].gold == ("good",)
status = Path("/proc/self/status").read_text()
print(int(status.split("RssAnon:")[1].split()[0]) // 1024, pyarrow.total_allocated_bytes() // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    anonymous, arrow = map(int, done.stdout.split())
    assert (tmp_path / "rows.jsonl").stat().st_size > 380e6
    assert anonymous < 700, f"{anonymous} MB"
    assert arrow < 50
