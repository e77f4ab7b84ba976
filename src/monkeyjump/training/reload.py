"""The proof that an adapter folder holds everything: a new process loads it on a fresh base.

The parent writes a probe (a batch and the logits it saw) and starts this module; it answers with one line
of JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from monkeyjump.tasks.models import load_base, load_tokenizer
from monkeyjump.tasks.prompts import Tokens


@dataclass(frozen=True)
class Reloaded:
    """`difference` is the largest absolute one between the logits of the two processes."""

    difference: float
    equal: bool
    values: int
    answer: str


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.cpu()


def check_reload(model: Any, base: str, folder: Path, batch: dict[str, Tensor], prompt: Tokens) -> Reloaded:
    """Compares `model` on `batch` with what a new process makes of `base` and `folder`, and answers `prompt`.

    Raises RuntimeError with the last line of the new process's stderr if that fails.
    """
    model.eval()
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch, "probe.safetensors")
        tensors = {**batch, "logits": _logits(model, batch), "prompt": torch.tensor([prompt])}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, probe)
        command = [sys.executable, "-m", __name__, base, str(folder), str(probe)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the new process could not load {folder}: {reason}")
    return Reloaded(**json.loads(done.stdout.splitlines()[-1]))


def _reload(base: str, folder: str, probe: str) -> Reloaded:
    import monkeyjump  # noqa: F401  registers the adapter types with PEFT

    model = PeftModel.from_pretrained(load_base(base), folder).eval()
    tensors = load_file(probe)
    expected, prompt = tensors.pop("logits"), tensors.pop("prompt")
    found = _logits(model, tensors)
    attended = tensors["attention_mask"].bool()  # logits at padding mean nothing
    difference = (found.float() - expected.float())[attended].abs().max().item()
    tokenizer = load_tokenizer(base)
    with torch.no_grad():
        reply = model.generate(
            input_ids=prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    answer = tokenizer.decode(reply[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    equal = torch.equal(found[attended], expected[attended])
    return Reloaded(difference, equal, int(attended.sum()) * found.shape[-1], answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "folder", "probe"):
        parser.add_argument(name)
    given = parser.parse_args()
    print(json.dumps(asdict(_reload(given.base, given.folder, given.probe))))
