"""What a smaller sample costs: centers fitted on a reservoir of n tokens, judged on all tokens.

    python benchmarks/centers_sample_size.py MODEL TEXT [--restarts 1] [--seeds 8]

MODEL: a folder or Hub name that transformers' AutoModel reads; TEXT: a plain text file. For every block's
input states, number of centers and sample size it prints the cosine inertia on all tokens over that of the
reference (a fit on all tokens, best of 10 restarts), and the share of tokens whose nearest center agrees with
the reference: mean over blocks, with a 95 % t interval over seeds, and the worst of all fits. The sample is
what bounded fitting keeps: unit vectors in float16. "all" refits on all tokens with another seed: what the
choice of seeds alone changes.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from monkeyjump.routing.kmeans import kmeans
from monkeyjump.routing.reservoir import Reservoir

BATCH = 512  # rows offered to the reservoir at a time


def block_inputs(model_path: str, text: Path, tokens: int) -> list[Tensor]:
    """Unit hidden states [tokens, d] entering each block, over windows of 256 tokens that start with BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = -(-tokens // 256)
    windows = torch.tensor(ids[: count * 255]).view(count, 255)
    windows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for batch in windows.split(16):
            states = model(input_ids=batch, output_hidden_states=True).hidden_states[:-1]
            parts.append([torch.nn.functional.normalize(h.flatten(0, 1), dim=1) for h in states])
    return [torch.cat(block)[:tokens] for block in zip(*parts)]


def judge(states: Tensor, centers: Tensor) -> tuple[float, Tensor]:
    """Unit states [N, d], centers [E, d] -> inertia (squared chords) and nearest center [N]."""
    best, labels = (states @ centers.T).max(dim=1)
    return float((2 - 2 * best.double()).sum()), labels


def agreement(labels: Tensor, centers: Tensor, wanted: Tensor, reference: Tensor) -> float:
    """Share of tokens with the same center, after the one-to-one match of most similar centers."""
    similarity = (reference @ centers.T).tolist()
    orders = itertools.permutations(range(len(centers)))
    match = max(orders, key=lambda order: sum(similarity[i][j] for i, j in enumerate(order)))
    return float((torch.tensor(match)[wanted] == labels).double().mean())


def sample(states: Tensor, size: int, seed: int) -> Tensor:
    reservoir = Reservoir(size, states.shape[1], seed=seed, dtype=torch.float16)
    for batch in states.split(BATCH):
        reservoir.add(batch)
    return reservoir.states()


def interval(values: list[float]) -> str:
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 16_000, 8_000, 4_000, 1_000])
    parser.add_argument("--centers", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()

    blocks = block_inputs(options.model, options.text, options.tokens)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {len(blocks)} blocks,", end=" ")
    print(f"{len(blocks[0]):,} tokens, d {blocks[0].shape[1]}, restarts {options.restarts}")
    print("| E | sample | inertia / reference | worst | same center | worst | seconds per block |")
    print("|---|---|---|---|---|---|---|")
    for count in options.centers:
        fits = [kmeans(states, count, restarts=10, seed=0, iterations=200) for states in blocks]
        judged = [judge(states, fit.centers) for states, fit in zip(blocks, fits)]
        for size in options.sizes:
            ratios, shares, started = [], [], time.perf_counter()
            for seed in range(1, options.seeds + 1):
                for states, fit, (inertia, labels) in zip(blocks, fits, judged):
                    kept = states if size >= len(states) else sample(states, size, seed)
                    centers = kmeans(kept, count, restarts=options.restarts, seed=seed).centers
                    found, chosen = judge(states, centers)
                    ratios.append(found / inertia)
                    shares.append(agreement(chosen, centers, labels, fit.centers))
            seconds = (time.perf_counter() - started) / len(ratios)
            means = [
                [statistics.mean(values[i : i + len(blocks)]) for i in range(0, len(values), len(blocks))]
                for values in (ratios, shares)
            ]
            name = "all" if size >= options.tokens else f"{size:,}"
            print(f"| {count} | {name} | {interval(means[0])} | {max(ratios):.4f} |", end=" ")
            print(f"{interval(means[1])} | {min(shares):.4f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
