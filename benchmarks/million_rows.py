"""Does training start on a million rows in bounded memory?

Writes JSONL files of growing length, trains five steps on each in a process of its own (a model of two tiny
layers, so that what is measured is the data), and prints the seconds to the first step and the peak memory.

    python benchmarks/million_rows.py [rows ...]        default: 10,000 and 1,000,000
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = """
model: {{path: model}}
method: {{r: 2, centers: {{max_tokens: 2000}}}}
data:
  size: all
  tasks: [{{name: rows, source: {{kind: files, train: {name}}}}}]
train: {{batch_size: 8, max_steps: 5, log_every: 1, save_every: 5, routing_every: 0}}
output: {{folder: out-{rows}}}
"""


def write_model(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
    from small_inputs import save_model

    save_model(folder)


def write_rows(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            words = " ".join(str(number // 100**place % 100) for place in range(4))
            prompt = f"is this film good or bad ? {words} the film was {'good' if number % 2 else 'bad'} " + "the " * 20
            file.write(json.dumps({"prompt": prompt, "answer": "positive" if number % 2 else "negative"}) + "\n")


def child(run: str) -> None:
    """Trains and reports what it took."""
    from monkeyjump.bench.memory import peak_bytes
    from monkeyjump.cli import app
    from monkeyjump.training import run as module

    imported, start = peak_bytes("cpu"), time.perf_counter()
    original, seconds = module.fit, []

    def fit(*args, **kwargs):
        seconds.append(time.perf_counter() - start)
        return original(*args, **kwargs)

    module.fit = fit
    assert app.run(["train", run]) == 0
    print(json.dumps({"to_first_step": seconds[0], "imports": imported, "peak": peak_bytes("cpu")}))


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [10_000, 1_000_000]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_model(place / "model")
        print(f"{'rows':>10} {'file, MB':>9} {'s to step 1':>12} {'peak, MB':>9} {'above imports':>14}")
        for rows in sizes:
            name = f"rows-{rows}.jsonl"
            write_rows(place / name, rows)
            (place / f"{rows}.yaml").write_text(RUN.format(name=name, rows=rows))
            environment = {**os.environ, "MONKEYJUMP_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [sys.executable, __file__, "--child", f"{rows}.yaml"],
                cwd=place, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            size = (place / name).stat().st_size / 1e6
            peak, above = found["peak"] / 1e6, (found["peak"] - found["imports"]) / 1e6
            print(f"{rows:>10,} {size:>9.0f} {found['to_first_step']:>12.1f} {peak:>9.0f} {above:>14.0f}", flush=True)


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main()
