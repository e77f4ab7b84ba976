"""The scan of Mamba-2 as matrix products: state space duality (Dao and Gu 2024, "Transformers are SSMs", section 6).

    h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t]^T         per head, h [P, N]
    y[t] = h[t] C[t] + D x[t]

Within a chunk of Q steps the recurrence is a causal matrix, y = (G * decay) (dt x) with G = C B^T; between chunks only
the states h at their ends matter, and these follow one another in a short loop. The heads of a group share B and C,
so that G, the states of a chunk and what they give to the output are one product per group each, with the heads side by
side as columns: nothing is repeated for a head.

The forward pass keeps the states at the beginnings of the chunks and nothing else; the backward pass, written by hand,
computes the rest again. Both go through a sequence in blocks of chunks small enough for a cache, with the same buffers
for every block: to touch fresh memory for the first time costs more than most of what is computed in it.
"""

from monkeyjump.mamba.ssd.interface import ssd_scan

__all__ = ["ssd_scan"]
