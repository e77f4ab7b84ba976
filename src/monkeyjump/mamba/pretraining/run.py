"""Pretraining from text on disk to a folder that `from_pretrained` reads.

pretraining.yaml    text and settings, every field
tokenizer.json, tokenizer_config.json
run.json            versions, seed, fingerprints of the text, steps, parameters; written before training
metrics.jsonl       a line per log: loss, learning rate, held-out perplexity
checkpoints/        complete ones only
config.json, model.safetensors    the model
result.json         perplexities; written last: the run is done

A run may be killed at any moment: `resume=True` goes on, and ends with the weights of one that was never stopped.
"""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PrinterCallback

from monkeyjump.mamba.perplexity import Perplexity, perplexity, unigram_perplexity
from monkeyjump.mamba.pretraining.model import build_model, save_model, save_tokenizer, seconds_per_step
from monkeyjump.mamba.pretraining.settings import SETTINGS, PretrainRun, check_same, write_settings
from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer
from monkeyjump.mamba.pretraining.trainer import HeldOut, WindowTrainer, training_arguments
from monkeyjump.mamba.pretraining.windows import Windows, collate, encode, windows_in
from monkeyjump.mamba.texts import Documents, apart, hold_out, read_documents
from monkeyjump.tasks.errors import InputError
from monkeyjump.training import folder as files
from monkeyjump.training.callbacks import Checkpoints, FiniteGradients, Metrics, Step, StopOnSignal
from monkeyjump.training.checkpoints import ASIDE, clear_aside, latest, number_of
from monkeyjump.training.run import Display
from monkeyjump.training.saving import no_space
from monkeyjump.training.signals import Interrupted, Interrupts

GO_ON = "go on with: monkeyjump mamba pretrain --output {folder} --resume"
WATCHED = 60_000  # characters of the held-out text that are scored on the way
TRAINING_SHARE = 0.93  # of the minutes: the rest goes to the held-out perplexities
STOP_AFTER = 3  # steps in a row without a finite gradient
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Corpus:
    """`stream` `[N]`: the training documents as token ids."""

    train: Documents
    held_out: Documents
    tokenizer: Any
    stream: np.ndarray


def pretrain(run: PretrainRun, display: Display, resume: bool = False) -> Path:
    """Trains, and returns the run's folder. A run that is done already is left as it is with `resume`.

    Raises:
        InputError: before any training, and with nothing left behind.
        Interrupted: by a signal; what was reached is saved.
        FloatingPointError: no finite gradient in several steps in a row.
        SaveFailed: the disk is full.
    """
    folder = run.output
    going_on = _check_folder(run, resume)
    if going_on and files.is_done(folder):
        display.note(f"{folder} is done already")
        return folder
    with Interrupts(f"interrupted; {GO_ON.format(folder=folder)}") as interrupts:
        with files.made(folder, "--output"):
            corpus = _prepare(run, display)
            facts = _facts(run, corpus, display)
            write_settings(run)
        (folder / files.CHECKPOINTS).mkdir(exist_ok=True)
        clear_aside(folder / files.CHECKPOINTS)
        files.clear(folder)
        save_tokenizer(corpus.tokenizer, folder)
        files.write_facts(folder, facts)
        checkpoint = latest(folder / files.CHECKPOINTS) if going_on else None
        trainer, last = _fit(run, corpus, facts["steps"], checkpoint, interrupts, display)
        if interrupts.received:
            step = trainer.state.global_step
            raise Interrupted(f"interrupted; step {step} is saved; {GO_ON.format(folder=folder)}", interrupts.received)
    _finish(run, corpus, facts, trainer.model, last, display)
    return folder


def _check_folder(run: PretrainRun, resume: bool) -> bool:
    """Whether there is something to go on with."""
    folder = run.output
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("pretraining runs in one process", hint="start it without torchrun or accelerate launch")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file", hint="name a folder, which is made if need be")
    if not (folder / SETTINGS).is_file():
        if folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
            raise InputError(f"--output: {folder} holds something else", hint="name a new folder")
        return False
    if not resume:
        raise InputError(
            f"--output: {folder} holds a run already", hint="add --resume to go on with it, or name another folder"
        )
    check_same(run)
    return True


def _prepare(run: PretrainRun, display: Display) -> Corpus:
    settings, folder = run.settings, run.output
    train = read_documents(run.text, display.note)
    if run.held_out_text:
        held_out = read_documents(run.held_out_text, display.note)
    else:
        train, held_out = hold_out(train, settings.held_out, settings.seed)
    train = apart(train, held_out)
    if not held_out.texts or not train.texts:
        raise InputError(
            f"{train.origin}: no text is left beside the part that is held out for perplexity", hint="give more text"
        )
    if (folder / files.FACTS).is_file():  # the tokenizer that the checkpoints were made with
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        display.note(f"training a tokenizer of {settings.vocab_size} tokens on {_size(train)}")
        tokenizer = train_tokenizer(train.texts, settings.vocab_size, settings.context_length)
    stream = encode(tokenizer, train.texts)
    windows_in(stream, settings.context_length)
    return Corpus(train, held_out, tokenizer, stream)


def _size(documents: Documents) -> str:
    return f"{documents.bytes / 1e6:.2f} MB of text in {len(documents.texts):,} documents"


def _facts(run: PretrainRun, corpus: Corpus, display: Display) -> dict[str, Any]:
    """run.json: as it is if it is there, for its number of steps must not be measured anew."""
    path = run.output / files.FACTS
    prints = {"text": corpus.train.fingerprint, "held_out": corpus.held_out.fingerprint}
    if path.is_file():
        before = files.read_json(path)
        if before["fingerprints"] != prints:
            raise InputError(
                f"{run.output}: the text is not the one that the run was begun with",
                hint="restore the files, or begin a new run in another folder",
            )
        return {name: value for name, value in before.items() if name != "versions"}
    model = build_model(run.settings, corpus.tokenizer)
    steps, seconds = _steps(run, corpus, model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    display.note(
        f"{parameters:,} parameters, {len(corpus.stream):,} training tokens, {steps} steps"
        + (f" of about {seconds:.2f} s" if seconds else "")
    )
    return {
        "command": sys.argv,
        "seeds": {"train": run.settings.seed},
        "fingerprints": prints,
        "documents": {"text": len(corpus.train.texts), "held_out": len(corpus.held_out.texts)},
        "bytes": {"text": corpus.train.bytes, "held_out": corpus.held_out.bytes},
        "training_tokens": len(corpus.stream),
        "steps": steps,
        "epochs": steps * run.settings.batch_size / windows_in(corpus.stream, run.settings.context_length),
        "measured_seconds_per_step": seconds,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
    }


def _steps(run: PretrainRun, corpus: Corpus, model: Any) -> tuple[int, float | None]:
    """Optimizer steps of the run, and the seconds of one where they had to be measured."""
    settings = run.settings
    if settings.max_steps is not None:
        return settings.max_steps, None
    if settings.num_epochs is not None:
        rows = windows_in(corpus.stream, settings.context_length)
        return math.ceil(settings.num_epochs * rows / settings.batch_size), None
    assert settings.minutes is not None
    windows = Windows(corpus.stream, settings.context_length, settings.batch_size, settings.seed)
    batch = collate(windows[number] for number in range(len(windows)))
    del batch["row_ids"]
    seconds = seconds_per_step(model, batch)
    return max(1, int(TRAINING_SHARE * 60 * settings.minutes / seconds)), seconds


def _fit(
    run: PretrainRun, corpus: Corpus, steps: int, checkpoint: Path | None, interrupts: Interrupts, display: Display
) -> tuple[WindowTrainer, Step | None]:
    settings, folder = run.settings, run.output
    model = build_model(settings, corpus.tokenizer)
    windows = Windows(corpus.stream, settings.context_length, steps * settings.batch_size, settings.seed)
    checkpoints = folder / files.CHECKPOINTS
    arguments = training_arguments(settings, steps, checkpoints / ASIDE)
    trainer = WindowTrainer(model, arguments, train_dataset=windows, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    done = number_of(checkpoint) if checkpoint else 0
    metrics = files.MetricsFile(folder, done if checkpoint else -1)
    if checkpoint:
        display.note(f"going on after step {done} of {steps}")
    last: Step | None = None
    with display.bar("pretrain", steps) as bar:

        def report(step: Step) -> None:
            nonlocal last, done
            last = step
            # without the clock first: these numbers are the same in every run of the same settings
            metrics.write({"step": step.number, **step.metrics, "seconds": round(step.seconds, 3)})
            if "loss" in step.metrics:
                bar.advance(step.number - done, f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s")
                done = step.number
            elif "held_out/perplexity" in step.metrics:
                display.note(f"step {step.number}: held-out perplexity {step.metrics['held_out/perplexity']:.1f}")

        finite = FiniteGradients(STOP_AFTER, None, windows.where)
        watched = HeldOut(corpus.tokenizer, _first(corpus.held_out.texts, WATCHED), settings)
        finite.trainer = watched.trainer = trainer
        for callback in (
            Metrics(report), finite, watched, StopOnSignal(interrupts), Checkpoints(checkpoints, settings.keep)
        ):  # fmt: skip
            trainer.add_callback(callback)
        with no_space(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, last


def _first(texts: list[str], characters: int) -> list[str]:
    """The beginning of the texts, of so many characters altogether."""
    found = []
    for text in texts:
        found.append(text[:characters])
        characters -= len(text)
        if characters <= 0:
            break
    return found


def _finish(
    run: PretrainRun, corpus: Corpus, facts: dict[str, Any], model: Any, last: Step | None, display: Display
) -> None:
    folder, length = run.output, run.settings.context_length
    save_model(model, folder)
    display.note("scoring the held-out text")
    found = perplexity(model, corpus.tokenizer, corpus.held_out.texts, length, length // 2, run.settings.batch_size)
    counts = np.bincount(corpus.stream, minlength=run.settings.vocab_size)
    files.write_json(  # last: from here on the run is done
        folder / files.RESULT,
        {
            "steps": facts["steps"],
            "tokens": facts["steps"] * run.settings.batch_size * length,
            "seconds": round(last.seconds, 3) if last else None,
            "held_out": {"window": length, "stride": length // 2, **found.record()},
            "unigram": _unigram(counts, corpus).record(),
            "sample": _sample(model, corpus),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
    clear_aside(folder / files.CHECKPOINTS)


def _unigram(counts: np.ndarray, corpus: Corpus) -> Perplexity:
    return unigram_perplexity(counts, corpus.tokenizer, corpus.held_out.texts)


@torch.no_grad()
def _sample(model: Any, corpus: Corpus) -> str:
    """How the model goes on after the first words of the held-out text."""
    torch.manual_seed(0)
    prompt = corpus.tokenizer(" ".join(corpus.held_out.texts[0].split()[:12]), return_tensors="pt")["input_ids"]
    model.eval()
    reply = model.generate(
        input_ids=prompt.to(model.device),
        attention_mask=torch.ones_like(prompt).to(model.device),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        top_k=20,
    )
    return corpus.tokenizer.decode(reply[0])
