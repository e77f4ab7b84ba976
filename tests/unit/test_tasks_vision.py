"""Pictures and videos: from a cell to the tensors of a training step of a tiny LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_inputs import write_lines
from small_vision import vision_model, write_processor
from suite_rows import picture

from monkeyjump.tasks import Collator, InputError, Task, blend, load_task, read_task
from monkeyjump.tasks.vision import VisionPrompts, load_processor

COMMON = "columns: {question: question, label: answer}\ninstruction: '{question}'\nchoices: [good, bad]\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> VisionPrompts:
    return VisionPrompts.of(load_processor(write_processor(tmp_path_factory.mktemp("processor"))))


def rows(count: int, column: str, cell) -> list[dict[str, object]]:
    return [{"question": f"film {n} is it ?", "answer": ("good", "bad")[n % 2], column: cell(n)} for n in range(count)]


def image_task(folder: Path, **changes: str) -> Task:
    for n in range(8):
        picture(n, (40, 30) if n % 2 else (30, 60)).save(folder / f"{n}.png")
    write_lines(folder / "images.jsonl", rows(8, "picture", changes.get("cell", "{}.png").format))
    path = folder / "images.yaml"
    path.write_text(
        "name: images\nsource: {kind: files, train: images.jsonl}\nmedia: {kind: image, column: picture}\n" + COMMON
    )
    return read_task(path)


def video_task(folder: Path) -> Task:
    for n in range(8):
        frames = folder / f"clip{n}"
        frames.mkdir()
        for m in range(6):
            picture(10 * n + m).save(frames / f"{m:03}.png")
    write_lines(folder / "clips.jsonl", rows(8, "clip", "clip{}".format))
    path = folder / "clips.yaml"
    path.write_text(
        "name: clips\nsource: {kind: files, train: clips.jsonl}\nmedia: {kind: video, column: clip, frames: 3}\n"
        + COMMON
    )
    return read_task(path)


def text_task(folder: Path) -> Task:
    write_lines(folder / "texts.jsonl", rows(8, "unused", str))
    path = folder / "texts.yaml"
    path.write_text("name: texts\nsource: {kind: files, train: texts.jsonl}\n" + COMMON)
    return read_task(path)


def test_a_batch_of_picture_video_and_text_goes_through_a_training_step(tmp_path: Path, prompts: VisionPrompts):
    tasks = [load_task(make(tmp_path), "all") for make in (image_task, video_task, text_task)]
    mixture = blend(tasks, prompts)
    batch = [next(row for row in mixture.train if row["task"] == name) for name in ("images", "clips", "texts")]
    tensors = Collator.of(prompts.tokenizer)(batch)
    assert tensors["pixel_values_videos"].shape == (1, 3, 3, 28, 28)
    assert tensors["pixel_values"].ndim == 5
    model = vision_model(prompts.tokenizer)
    loss = model(**tensors).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_batching_changes_no_row(tmp_path: Path, prompts: VisionPrompts):
    """Pictures of different sizes have different numbers of tiles: the batch equals the single rows."""
    tasks = [load_task(make(tmp_path), "all") for make in (image_task, video_task, text_task)]
    encoded = list(blend(tasks, prompts).train)
    wide = [row for row in encoded if row["task"] == "images"][:3]
    rows = [*wide, *(row for row in encoded if row["task"] != "images")][:8]
    assert len({row["pixel_values"].shape[1] for row in wide}) > 1
    model = vision_model(prompts.tokenizer).eval()
    collator = Collator.of(prompts.tokenizer)
    with torch.no_grad():
        together = model(**collator(rows)).logits
        for number, row in enumerate(rows):
            alone = model(**collator([row])).logits[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_a_frame_is_the_picture_resized(tmp_path: Path, prompts: VisionPrompts):
    """What the video part of the processor makes of a frame: resized, rescaled, normalized (torchvision is missing)."""
    loaded = load_task(video_task(tmp_path), "all")
    example = loaded.train[0]
    video = prompts.encode(loaded.task, 0, example)["pixel_values_videos"][0]
    part = prompts.processor.image_processor
    for frame, found in zip(example.media, video):
        pixels = torch.from_numpy(np.array(frame.resize((28, 28), Image.Resampling.BICUBIC))).float()
        expected = (pixels / 255 - torch.tensor(part.image_mean)) / torch.tensor(part.image_std)
        torch.testing.assert_close(found, expected.permute(2, 0, 1), rtol=0, atol=0.03)


def test_only_the_answer_is_supervised_and_placeholders_fit_the_model(tmp_path: Path, prompts: VisionPrompts):
    loaded = load_task(video_task(tmp_path), "all")
    row = prompts.encode(loaded.task, 0, loaded.train[0])
    video_token = prompts.processor.video_token_id
    assert row["input_ids"].count(video_token) == 3 * 1 + 1  # 2 x 2 patches pool to one a frame, and a newline
    assert [label for label in row["labels"] if label >= 0] == row["input_ids"][-2:]
    assert row["input_ids"][-1] == prompts.tokenizer.eos_token_id


def test_a_processor_without_chat_template(tmp_path: Path):
    plain = VisionPrompts.of(load_processor(write_processor(tmp_path / "plain", template=None)))
    loaded = load_task(image_task(tmp_path), "all")
    row = plain.encode(loaded.task, 0, loaded.train[0])
    assert plain.processor.image_token_id in row["input_ids"]
    assert torch.isfinite(vision_model(plain.tokenizer)(**Collator.of(plain.tokenizer)([row])).loss)


def test_a_missing_picture_names_row_place_and_remedy(tmp_path: Path):
    loaded = load_task(image_task(tmp_path, cell="gone{}.png"), "all")
    with pytest.raises(
        InputError, match=r"images.jsonl, row \d, field 'picture': image 'gone\d.png'.*not found"
    ) as caught:
        loaded.train[0]
    assert "MONKEYJUMP_MEDIA" in caught.value.hint


def test_a_file_that_is_no_picture_is_named(tmp_path: Path):
    loaded = load_task(image_task(tmp_path), "all")
    for n in range(8):
        (tmp_path / f"{n}.png").write_text("no picture")
    with pytest.raises(InputError, match=r"row \d, field 'picture': cannot be read as image"):
        loaded.train[0]


def test_animated_gif_and_film_give_the_same_number_of_frames(tmp_path: Path):
    av = pytest.importorskip("av")
    shades = [Image.new("RGB", (32, 32), (8 * n, 8 * n, 8 * n)) for n in range(30)]
    shades[0].save(tmp_path / "clip0", "GIF", save_all=True, append_images=shades[1:])
    (tmp_path / "clip0").rename(tmp_path / "a.gif")
    with av.open(str(tmp_path / "a.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for shade in shades:
            film.mux(stream.encode(av.VideoFrame.from_image(shade)))
        film.mux(stream.encode())
    write_lines(
        tmp_path / "clips.jsonl",
        [
            {"question": f"film {n} ?", "answer": "good", "clip": ("a.gif", "a.mp4")[n % 2], "end": 1.45}
            for n in range(4)
        ],
    )
    path = tmp_path / "clips.yaml"
    path.write_text(
        "name: clips\nsource: {kind: files, train: clips.jsonl}\n"
        "media: {kind: video, column: clip, frames: 3, end: end}\n" + COMMON
    )
    loaded = load_task(read_task(path), "all")
    for example in [*loaded.train, *loaded.test]:
        found = [frame.getpixel((16, 16))[0] // 8 for frame in example.media]
        gif = "1" in example.fields["question"] or "3" in example.fields["question"]
        expected = [2, 7, 12] if gif else [5, 15, 25]  # the film is cut at 1.45 s
        assert all(abs(a - b) <= 1 for a, b in zip(found, expected)), (example, found)
