/* The order of maximal marginal relevance: one thread, float32 rows, a bounded amount of work in each call.
 *
 * The score of a token only falls as other tokens are chosen. So a token whose score was last computed some choices ago
 * is compared with what was chosen since only once that old score is the greatest of all: about half of all comparisons
 * are never made. In the same way, products are summed in float32 first, which bounds the score from above, and in
 * float64 only where the bound is the greatest of all.
 *
 * Decided by float32 scores whose products were summed in float64, and the first of equal tokens: so the order does not
 * depend on the order of summation.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define TOGETHER 4 /* chosen rows that a row is compared with at a time */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* A token in the heap, by a bound of its score. */
struct entry { float bound; int32_t token; };

/* What is known of the similarity of a token to the chosen ones. */
struct known {
    float greatest, second; /* of the products in float32 */
    int32_t nearest;        /* the place in the order of the token with the greatest product */
    int32_t compared;       /* with how many of the chosen ones it was compared */
    int32_t exact;          /* with how many of them when its score was last computed exactly; 0: never */
};

static inline int precedes(struct entry one, struct entry other) {
    return one.bound > other.bound || (one.bound == other.bound && one.token < other.token);
}

/* Move the entry at `place` down the heap to where it belongs. */
static void sink(struct entry *heap, int64_t size, int64_t place) {
    const struct entry moved = heap[place];
    for (int64_t child; (child = 2 * place + 1) < size; place = child) {
        child += child + 1 < size && precedes(heap[child + 1], heap[child]);
        if (!precedes(heap[child], moved)) break;
        heap[place] = heap[child];
    }
    heap[place] = moved;
}

static inline float total(lanes value) {
    typedef float half __attribute__((vector_size(2 * LANES)));
    typedef float quarter __attribute__((vector_size(LANES)));
    const union { lanes whole; half parts[2]; } all = {value};
    const union { half whole; quarter parts[2]; } halves = {all.parts[0] + all.parts[1]};
    const quarter sums = halves.parts[0] + halves.parts[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

static inline void note(struct known *known, float product) {
    if (product > known->greatest) {
        known->second = known->greatest;
        known->greatest = product;
        known->nearest = known->compared;
    } else if (product > known->second) {
        known->second = product;
    }
    known->compared++;
}

/* Compare a row with the chosen ones up to `end`; widths are whole numbers of LANES. */
static void compare(const float *row, const float *chosen, int64_t width, struct known *known, int32_t end) {
    while (known->compared + TOGETHER <= end) {
        const float *first = chosen + known->compared * width;
        lanes sums[TOGETHER] = {{0}};
        for (int64_t d = 0; d < width; d += LANES) {
            const lanes own = *(const lanes *)(row + d);
            for (int k = 0; k < TOGETHER; k++) sums[k] += own * *(const lanes *)(first + k * width + d);
        }
        for (int k = 0; k < TOGETHER; k++) note(known, total(sums[k]));
    }
    while (known->compared < end) {
        const float *other = chosen + known->compared * width;
        lanes sum = {0};
        for (int64_t d = 0; d < width; d += LANES) sum += *(const lanes *)(row + d) * *(const lanes *)(other + d);
        note(known, total(sum));
    }
}

/* The product of two rows, summed in float64; equal rows give equal products. */
static __attribute__((noinline)) float product(const float *row, const float *other, int64_t width) {
    double sums[LANES] = {0};
    for (int64_t d = 0; d < width; d += LANES)
        for (int k = 0; k < LANES; k++) sums[k] += (double)row[d + k] * (double)other[d + k];
    double sum = 0;
    for (int k = 0; k < LANES; k++) sum += sums[k];
    return (float)sum;
}

/* The greatest product with the first `count` chosen rows. If one is greater than all others beyond doubt, it is that. */
static float likeness(const float *row, const float *chosen, int64_t width, const struct known *known, float error,
                      int64_t *done) {
    float greatest = product(row, chosen + known->nearest * width, width);
    *done += width;
    if (known->greatest - known->second > 2 * error) return greatest;
    for (int64_t place = 0; place < known->compared; place++) {
        const float other = product(row, chosen + place * width, width);
        greatest = other > greatest ? other : greatest;
    }
    *done += known->compared * width;
    return greatest;
}

static inline float score(float relevance, float weight, float likeness) {
    volatile float weighted = weight * likeness; /* rounded here, and not fused with the subtraction */
    return relevance - weighted;
}

/* Continue the order until `count` tokens are chosen, or about `work` multiplications are done; returns how many are.
 *
 * rows: [tokens, width], of length 1 or 0; relevance: [tokens]; known: [tokens]; heap: [tokens]; chosen: [count, width],
 * copies of the chosen rows, for they are read in order; order: [count]. `picked` is what the last call returned; before
 * the first call it is 0, and order[0] holds the first token. */
int64_t diversity_order(const float *rows, const float *relevance, int64_t tokens, int64_t width, float weight,
                        int64_t count, int64_t picked, int64_t work, struct known *known, struct entry *heap,
                        float *chosen, int64_t *order) {
    /* No sum in float32 of products of such rows is further from the one in float64 than this. */
    const float error = (float)(width / LANES + LANES) * 0x1p-23f;
    int64_t size = tokens - picked, done = 0;
    if (!picked) {
        size = 0;
        for (int64_t token = 0; token < tokens; token++) {
            known[token] = (struct known){-INFINITY, -INFINITY, 0, 0, 0};
            if (token != order[0]) heap[size++] = (struct entry){INFINITY, (int32_t)token};
        }
        memcpy(chosen, rows + order[0] * width, width * sizeof *rows);
        picked = 1;
    }
    while (picked < count && done < work) {
        const int32_t token = heap[0].token;
        const float *row = rows + token * width;
        struct known *own = known + token;
        if (own->compared < picked) {
            const int64_t end = own->compared + 2 * TOGETHER < picked ? own->compared + 2 * TOGETHER : picked;
            done += (end - own->compared) * width;
            compare(row, chosen, width, own, (int32_t)end);
            const float bound = score(relevance[token], weight, own->greatest - error);
            /* A bound from an exact score may be the lower one. */
            heap[0].bound = bound < heap[0].bound ? bound : heap[0].bound;
        } else if (own->exact < picked) {
            own->exact = (int32_t)picked;
            heap[0].bound = score(relevance[token], weight, likeness(row, chosen, width, own, error, &done));
        } else {
            order[picked] = token;
            memcpy(chosen + picked * width, row, width * sizeof *rows);
            picked++;
            heap[0] = heap[--size];
        }
        if (size) sink(heap, size, 0);
    }
    return picked;
}
