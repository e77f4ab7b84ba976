"""Rows in the layout of each data set of the suite: column names and types as on its card, contents ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from monkeyjump.tasks import Task, find_task
from monkeyjump.tasks.origins import HubSource

TEXT, INT = Value("string"), Value("int32")
TEXTS = List(TEXT)
ROWS = 12

Make = Callable[[int], dict[str, Any]]
Layout = tuple[Features, Make]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Pictures.Image:
    draw = random.Random(number)
    return Pictures.frombytes("RGB", size, bytes(draw.randrange(256) for _ in range(size[0] * size[1] * 3)))


def glue(label: Any, value: Callable[[int], Any], *fields: str) -> Layout:
    features = Features({**dict.fromkeys(fields, TEXT), "label": label, "idx": INT})
    return features, lambda n: {**{field: f"{field} number {n}" for field in fields}, "label": value(n), "idx": n}


def two(*names: str) -> ClassLabel:
    return ClassLabel(names=list(names))


def classes(names: int | ClassLabel, *extra: str) -> Layout:
    label = ClassLabel(num_classes=names) if isinstance(names, int) else names
    features = Features({"image": Image(), "label": label, **dict.fromkeys(extra, TEXT)})
    return features, lambda n: {
        "image": picture(n),
        "label": n % label.num_classes,
        **{name: f"{name} {n}" for name in extra},
    }


def arc(question: str) -> Layout:
    features = Features({"id": TEXT, question: TEXT, "choices": {"text": TEXTS, "label": TEXTS}, "answerKey": TEXT})

    def row(n: int) -> dict[str, Any]:
        names = ["1", "2", "3", "4"] if n == 3 else ["A", "B", "C", "D"]
        texts = [f"option {n}.{m}" for m in range(4)]
        return {
            "id": f"row{n}",
            question: f"question {n}?",
            "choices": {"text": texts, "label": names},
            "answerKey": names[n % 4],
        }

    return features, row


def people(answers: list[str]) -> list[str]:
    return (answers * 10)[:10]


def vqa(*extra: str) -> Layout:
    features = Features(
        {"image": Image(), "question": TEXT, "answers": TEXTS, "question_id": TEXT, **dict.fromkeys(extra, TEXT)}
    )
    return features, lambda n: {
        "image": picture(n),
        "question": "what is this?",
        "answers": people([f"thing {n}", f"thing {n}", "unsure"]),
        "question_id": str(n),
        **dict.fromkeys(extra, "other"),
    }


MVTAMPER = (
    Features({"video": TEXT, "question": TEXT, "candidates": TEXTS, "answer": TEXT, "tamper_type": TEXT}),
    lambda n: {
        "video": f"clip_{n}.mp4",
        "question": f"what happens in {n // 2}?",  # each clip in two forms
        "candidates": [f"deed {n // 2}.{m}" for m in range(4)],
        "answer": f"deed {n // 2}.{n // 2 % 4}",
        "tamper_type": ("original", "masking")[n % 2],
    },
)

LAYOUTS: dict[str, Layout] = {
    "sst2": glue(two("negative", "positive"), lambda n: n % 2, "sentence"),
    "qnli": glue(two("entailment", "not_entailment"), lambda n: n % 2, "question", "sentence"),
    "qqp": glue(two("not_duplicate", "duplicate"), lambda n: n % 2, "question1", "question2"),
    "cola": glue(two("unacceptable", "acceptable"), lambda n: n % 2, "sentence"),
    "mrpc": glue(two("not_equivalent", "equivalent"), lambda n: n % 2, "sentence1", "sentence2"),
    "stsb": glue(Value("float32"), lambda n: n % ROWS * 0.4, "sentence1", "sentence2"),
    "boolq": (
        Features({"question": TEXT, "answer": Value("bool"), "passage": TEXT}),
        lambda n: {"question": f"is {n} even", "answer": n % 2 == 0, "passage": f"Numbers, of which {n} is one."},
    ),
    "piqa": (
        Features({"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ClassLabel(names=["0", "1"])}),
        lambda n: {"goal": f"open jar {n}", "sol1": f"turn lid {n}", "sol2": f"shout {n}", "label": n % 2},
    ),
    "social_iqa": (
        Features(dict.fromkeys(("context", "question", "answerA", "answerB", "answerC", "label"), TEXT)),
        lambda n: {
            "context": f"Ann met {n} friends.",
            "question": "How does she feel?",
            "answerA": "happy",
            "answerB": "tired",
            "answerC": "lost",
            "label": str(n % 3 + 1),
        },
    ),
    "hellaswag": (
        Features(
            {"ind": INT, "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "ctx": TEXT, "endings": TEXTS}
            | {"source_id": TEXT, "split": TEXT, "split_type": TEXT, "label": TEXT}
        ),
        lambda n: {
            "ind": n,
            "activity_label": "Baking",
            "ctx_a": f"Bake {n}.",
            "ctx_b": "he",
            "ctx": f"Bake {n}. he",
            "endings": [f"ending {n}.{m}" for m in range(4)],
            "source_id": "x",
            "split": "train",
            "split_type": "indomain",
            "label": str(n % 4),
        },
    ),
    "winogrande": (
        Features(dict.fromkeys(("sentence", "option1", "option2", "answer"), TEXT)),
        lambda n: {
            "sentence": f"The {n} cups fit, _ is big.",
            "option1": "cup",
            "option2": "box",
            "answer": str(n % 2 + 1),
        },
    ),
    "arc_easy": arc("question"),
    "arc_challenge": arc("question"),
    "openbookqa": arc("question_stem"),
    "caltech101": classes(101),
    "flowers102": classes(ClassLabel(names=sorted(map(str, range(1, 103))))),
    "eurosat": classes(10, "image_id"),
    "pets": classes(37, "image_id"),
    "svhn": classes(10),
    "camelyon": (
        Features({"image": Image(), "label": Value("bool")}),
        lambda n: {"image": picture(n), "label": n % 2 == 0},
    ),
    "chartqa": (
        Features({"image": Image(), "query": TEXT, "label": TEXTS, "human_or_machine": two("human", "machine")}),
        lambda n: {"image": picture(n), "query": "how much?", "label": [f"{n}.5"], "human_or_machine": n % 2},
    ),
    "okvqa": vqa("question_type", "answer_type"),
    "vizwiz": vqa("category"),
    "textvqa": vqa("image_id", "flickr_original_url"),
    "scienceqa": (
        Features(
            {"image": Image(), "question": TEXT, "choices": TEXTS, "answer": Value("int8"), "hint": TEXT}
            | dict.fromkeys(("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT)
        ),
        lambda n: {
            "image": None if n % 4 == 3 else picture(n),
            "question": f"which is larger in {n}?",
            "choices": ["sun", "moon", "tree"][: 2 + n % 2],
            "answer": n % 2,
            "hint": "" if n % 2 else "Look at the picture.",
            **{
                name: name for name in ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
            },
        },
    ),
    "cnn_dailymail": (
        Features(dict.fromkeys(("article", "highlights", "id"), TEXT)),
        lambda n: {"article": f"Storm {n} came.\nIt went.", "highlights": f"A storm {n} .", "id": str(n)},
    ),
    "hotpot_qa": (
        Features(
            dict.fromkeys(("id", "question", "answer", "type", "level"), TEXT)
            | {"supporting_facts": {"title": TEXTS, "sent_id": List(INT)}}
            | {"context": {"title": TEXTS, "sentences": List(TEXTS)}}
        ),
        lambda n: {
            "id": str(n),
            "question": f"Which river is in town {n}?",
            "answer": f"River {n}",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": {"title": ["Town"], "sent_id": [0]},
            "context": {
                "title": ["Town", "River"],
                "sentences": [[f"Town {n} is old.", "It has a river."], [f"River {n} is long."]],
            },
        },
    ),
    "humaneval": (
        Features(dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT)),
        lambda n: {
            "task_id": f"HumanEval/{n}",
            "prompt": f'import math\n\n\ndef add_{n}(x: int) -> int:\n    """ Return x plus {n}.\n    """\n',
            "canonical_solution": f"    result = x + {n}\n    return result\n",
            "test": f"\n\ndef check(candidate):\n    for x in (1, -2):\n        assert candidate(x) == x + {n}\n",
            "entry_point": f"add_{n}",
        },
    ),
    "text_recognition": (
        Features({"image": Image(), "text": TEXT}),
        lambda n: {"image": picture(n), "text": f"SALE{n}"},
    ),
    "vqa_rad": (
        Features({"image": Image(), "question": TEXT, "answer": TEXT}),
        lambda n: {"image": picture(n), "question": "is it normal?", "answer": ("yes", "no", "left lung")[n % 3]},
    ),
    "seed_bench": (
        Features(
            dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type"), TEXT)
            | {
                "question": TEXT,
                "question_id": TEXT,
                "question_type_id": INT,
                "image": List(Image()),
                "segment": List(INT),
            }
        ),
        lambda n: {
            "answer": "ABCD"[n % 4],
            **{f"choice_{letter}": f"{letter} {n}" for letter in "abcd"},
            "data_id": str(n),
            "data_type": "video" if n % 6 == 5 else "image",
            "question": f"what is in {n}?",
            "question_id": str(n),
            "question_type_id": 1,
            "image": [picture(n)],
            "segment": [],
        },
    ),
}


def layout(name: str) -> Layout:
    return LAYOUTS.get(name, MVTAMPER)


def write_split(folder: Path, split: str, features: Features, make: Make, start: int) -> None:
    rows = [make(n) for n in range(start, start + ROWS)]
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(str(path))


def suite_task(name: str, folder: Path) -> Task:
    """The task, reading a folder in the layout of the Hub's repositories instead of the Hub itself."""
    task = find_task(name)
    source = task.source
    assert isinstance(source, HubSource)
    splits = [source.train_split, *([source.test_split] if source.test_split else [])]
    for number, split in enumerate(splits):
        write_split(folder, split, *layout(name), start=number * 2 * ROWS)
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    card = {"configs": [{"config_name": source.config or "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return task.model_copy(update={"source": source.model_copy(update={"id": str(folder)})})
