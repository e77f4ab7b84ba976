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

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from monkeyjump.mamba.perplexity import Perplexity, perplexity, unigram_perplexity
from monkeyjump.mamba.pretraining.model import build_model
from monkeyjump.mamba.pretraining.settings import PretrainRun
from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer
from monkeyjump.mamba.text_runs.corpus import read_texts, recorded_facts
from monkeyjump.mamba.text_runs.fitting import fit, planned_steps
from monkeyjump.mamba.text_runs.opening import done_already, lay_out, stop_if_asked
from monkeyjump.mamba.text_runs.saving import save_model
from monkeyjump.mamba.text_runs.settings import begun, on_interrupt, write_settings
from monkeyjump.mamba.text_runs.trainer import HeldOut, WindowTrainer, training_arguments
from monkeyjump.mamba.text_runs.windows import Windows, collate, encode, windows_in
from monkeyjump.mamba.texts import Documents, first_of
from monkeyjump.training import folder as files
from monkeyjump.training.callbacks import Step
from monkeyjump.training.checkpoints import ASIDE, clear_aside
from monkeyjump.training.run import Display
from monkeyjump.training.signals import Interrupts

WATCHED = 60_000  # characters of the held-out text that are scored on the way
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
    started = begun(run, resume)
    if started and done_already(run, display):
        return folder
    with Interrupts(on_interrupt(run, started)) as interrupts:
        with files.made(folder, "--output"):
            corpus = _prepare(run, display)
            facts = _facts(run, corpus, display)
            write_settings(run)
        interrupts.going_on = on_interrupt(run, begun=True)
        checkpoint = lay_out(run, corpus.tokenizer, facts)
        trainer, last = _fit(run, corpus, facts["steps"], checkpoint, interrupts, display)
        stop_if_asked(run, interrupts, trainer.state.global_step)
    _finish(run, corpus, facts, trainer.model, last, display)
    return folder


def _prepare(run: PretrainRun, display: Display) -> Corpus:
    settings, folder = run.settings, run.output
    train, held_out = read_texts(run.text, run.held_out_text, settings.held_out, settings.seed, display)
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
    prints = {"text": corpus.train.fingerprint, "held_out": corpus.held_out.fingerprint}
    if (before := recorded_facts(run, prints)) is not None:
        return before
    model = build_model(run.settings, corpus.tokenizer)
    steps, seconds = planned_steps(run.settings, corpus.stream, model)
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


def _fit(
    run: PretrainRun, corpus: Corpus, steps: int, checkpoint: Path | None, interrupts: Interrupts, display: Display
) -> tuple[WindowTrainer, Step | None]:
    settings, folder = run.settings, run.output
    model = build_model(settings, corpus.tokenizer)
    windows = Windows(corpus.stream, settings.context_length, steps * settings.batch_size, settings.seed)
    checkpoints = folder / files.CHECKPOINTS
    arguments = training_arguments(settings, steps, checkpoints / ASIDE)
    trainer = WindowTrainer(model, arguments, train_dataset=windows, data_collator=collate)
    watched = HeldOut(corpus.tokenizer, first_of(corpus.held_out.texts, WATCHED), settings)
    return trainer, fit(trainer, watched, folder, settings.keep, checkpoint, interrupts, display, "pretrain")


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
