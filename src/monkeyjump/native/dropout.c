/* The bits of a dropout mask: each is 1 with probability keep / 2^16. See monkeyjump/ops/dropout.py. */

#include "thin.h"

#define DIGITS 16

/* splitmix64: a counter -> a random word, so that threads need no state. */
INLINE uint64_t random_word(uint64_t counter) {
    uint64_t z = counter * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

CLONED static void draw_words(uint64_t seed, uint32_t keep, uint64_t *words, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
        uint64_t word = 0;
        /* from the least significant digit: P(1) is keep / 2^16 after the last */
        for (int digit = 0; digit < DIGITS; digit++) {
            const uint64_t fresh = random_word(seed + (uint64_t)(n * DIGITS + digit));
            word = keep >> digit & 1 ? word | fresh : word & fresh;
        }
        words[n] = word;
    }
}

void mj_dropout_bits(uint64_t seed, uint32_t keep, int64_t words, int threads, uint64_t *out) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t first, last;
        own_rows(words, &first, &last);
        draw_words(seed, keep, out, first, last);
    }
}
