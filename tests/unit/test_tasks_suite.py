"""Each of the 47 tasks on rows in its data set's layout: loads, renders, answers itself with a score of 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_vision import write_processor
from suite_rows import ROWS, layout, suite_task

from monkeyjump.evaluation.metrics import score
from monkeyjump.tasks import Size, catalog, find_task, load_task
from monkeyjump.tasks.listing import markdown_table, metric_table, notes, suite
from monkeyjump.tasks.vision import VisionPrompts, load_processor

NAMES = sorted(catalog("suite"))
DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> VisionPrompts:
    return VisionPrompts.of(load_processor(write_processor(tmp_path_factory.mktemp("processor"))))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film under the name of every clip, where MVTamperBench's archives would put it."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("media")
    with av.open(str(folder / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(16):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (15 * number, 0, 0)))
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return folder


def put_films(root: Path, task) -> None:
    folder = root / task.media.folder
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(ROWS):
        (folder / f"clip_{number}.mp4").write_bytes((root / "film.mp4").read_bytes())


def test_the_suite_is_the_papers():
    tasks = suite()
    assert len(tasks) == 47
    assert [sum(task.modality == kind for task in tasks) for kind in ("text", "image", "video")] == [14, 14, 19]
    assert sum(task.paper.test for task in tasks) == 74_192
    assert sum(task.paper.train for task in tasks if task.family == "GLUE") == 28_668
    assert sum(task.paper.train for task in tasks if task.modality == "video") == 13_300


@pytest.mark.parametrize("name", NAMES)
def test_task(name: str, tmp_path: Path, prompts: VisionPrompts, media: Path, monkeypatch: pytest.MonkeyPatch):
    task = suite_task(name, tmp_path)
    if task.modality == "video":
        monkeypatch.setenv("MONKEYJUMP_MEDIA", str(media))
        put_films(media, task)
    loaded = load_task(task, Size(train=6, test=4))
    assert (len(loaded.train), len(loaded.test)) == (6, 4)
    assert not set(loaded.train.survey.keys.tolist()) & set(loaded.test.survey.keys.tolist())
    examples = [loaded.train[0], loaded.test[0], loaded.test[1]]
    for example in examples:
        shown = prompts._render(prompts.turns(task, example))
        assert all(text in shown for text in example.fields.values())
        assert "{" not in shown
        assert example.is_right(example.gold[0])
        assert len(example.media) == {"text": 0, "image": 1, "video": 8}[task.modality]
        row = prompts.encode(task, 3, example)
        answer = prompts._answer(task, example.gold[0])
        supervised = [label for label in row["labels"] if label >= 0]
        assert supervised == [*answer, prompts.tokenizer.eos_token_id]
        assert (row["task"], row["task_ids"]) == (task.name, 3)
    tests = list(loaded.test)
    for metric in (task.metric, *task.also):
        found = score(metric, [example.gold[0] for example in tests], [example.gold for example in tests])
        assert found.value == pytest.approx(1.0), metric


def test_gold_answers_are_those_of_the_rows(tmp_path: Path):
    """The right option by index, number from 1, letter, key and text."""
    expected = {"hellaswag": "ABCD", "winogrande": "AB", "social_iqa": "ABC", "arc_easy": "ABCD", "seed_bench": "ABCD"}
    for name, letters in expected.items():
        task = suite_task(name, tmp_path / name)
        loaded = load_task(task, "all")
        for example in [*loaded.train, *loaded.test]:
            number = int(example.where.split()[-1]) - 1
            if loaded.task.source.test_split and "[train]" not in example.where:
                number += 2 * ROWS
            assert example.gold == (letters[number % len(letters)],), (name, example)


def test_rows_without_pictures_or_of_another_kind_go_out_with_a_count(tmp_path: Path):
    loaded = load_task(suite_task("scienceqa", tmp_path / "a"), "all")
    assert loaded.dropped["no image"] == 6
    loaded = load_task(suite_task("seed_bench", tmp_path / "b"), "all")
    assert loaded.dropped["data_type is none of image"] == 2


def test_clips_of_one_question_stay_on_one_side(tmp_path: Path):
    loaded = load_task(suite_task("action_count", tmp_path), Size(train=8, test=4))
    _, make = layout("action_count")
    assert make(0)["question"] == make(1)["question"]

    def questions(examples) -> set[str]:
        return {examples.table[int(row)].values["question"] for row in examples.rows}

    assert len(loaded.test) == 4
    assert not questions(loaded.train) & questions(loaded.test)


def test_equal_pictures_are_never_on_both_sides(tmp_path: Path):
    task = suite_task("svhn", tmp_path)
    features, make = layout("svhn")
    from suite_rows import write_split

    write_split(tmp_path, "test", features, make, start=ROWS // 2)  # half of them are training pictures
    loaded = load_task(task, "all")
    assert loaded.dropped["image also in the test rows"] == ROWS // 2
    assert len(loaded.train) == ROWS // 2


def test_flowers_have_the_names_of_their_numbers():
    """The data set's label 3 is class '101': trumpet creeper in the authors' list, as label 1 is '10'."""
    names = find_task("flowers102").choices
    order = sorted(map(str, range(1, 103)))
    assert names[order.index("1")] == "pink primrose"
    assert names[order.index("10")] == "globe thistle"
    assert names[order.index("101")] == "trumpet creeper"
    assert names[order.index("54")] == "sunflower"


def test_the_docs_table_is_the_registry():
    text = DOCS.read_text(encoding="utf-8")
    for made in (markdown_table(suite()), notes(), metric_table()):
        assert made in text, "run: monkeyjump tasks --markdown, and put the result into docs/tasks.md"


def test_pick_spreads_evenly():
    from monkeyjump.tasks.media import pick

    assert pick(16, 4) == [2, 6, 10, 14]
    assert pick(3, 6) == [0, 0, 1, 1, 2, 2]
    assert np.diff(pick(1000, 8)).tolist() == [125] * 7
