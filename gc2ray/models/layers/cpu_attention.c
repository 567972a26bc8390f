/* Attention of packed float32 sequences on an x86 CPU with AVX2; see cpu_attention.py.
 *
 * A task is a sequence and a key-value head, so results depend neither on the number of threads
 * nor on a sequence's neighbours. Queries of a sequence are taken 24 at a time: their scores against
 * all keys that any of them sees (a product), the softmax of each row, the weights times the values
 * (a product). Both products are made of tiles of 6 rows and 16 columns, as many sums as fit into
 * the registers beside what they are made of. A sequence with one query is bound by reading its
 * keys and values, and gets loops that read each of them once.
 *
 * Nothing is checked here: the caller has checked shapes, strides and places.
 */
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
  LANES = 8,   /* numbers of a register */
  ROWS = 6,    /* of a tile */
  COLS = 16,   /* of a tile */
  BLOCK = 24,  /* queries at a time: their scores and weights stay in the second cache */
  DEPTH = 256, /* keys at a time in the second product: their values stay in the first cache */
  WIDE = 64,   /* features of values that are summed up in registers, with one query */
};

/* Heads of tokens: feature f of token t of head h lies at at[h * head + t * token + f]. */
typedef struct {
  float *at;
  int64_t head, token;
} Heads;

/* Keys and values are the tokens from start on, queries the last `queries` of them. */
typedef struct {
  int64_t start, tokens, queries;
} Sequence;

typedef struct {
  Heads queries, keys, values, out;
  int64_t heads;  /* of keys and values */
  int64_t shared; /* query heads per one of them */
  int64_t size;   /* features of a head, a multiple of COLS */
  int64_t window; /* tokens that a query sees, itself included; 0: all */
  int64_t causal; /* a query sees no token behind it */
  float scale;
} Attention;

static inline ptrdiff_t more_of(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t less_of(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t padded(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }

static inline __m256 load(const float *at) { return _mm256_loadu_ps(at); }
static inline void store(float *at, __m256 x) { _mm256_storeu_ps(at, x); }
static inline __m256 all(float x) { return _mm256_set1_ps(x); }

static inline float sum_of(__m256 x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

static inline float largest_of(__m256 x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

/* 2^x for x <= 0, down to 2^-126; NaN stays NaN.
 *
 * x is cut into a whole number and a rest within half of it. The rest's power is a polynomial that
 * was fitted for least relative error (2e-9, less than float32 can tell); the whole number is added
 * to the exponent. Adding 1.5 * 2^23 rounds, and leaves the whole number in the last bits. */
static inline __m256 power_of_two(__m256 x) {
  const __m256 rounder = all(12582912.0f);
  x = _mm256_max_ps(all(-126.0f), x);
  const __m256 shifted = x + rounder;
  const __m256 rest = x - (shifted - rounder);
  __m256 y = all(1.5353361816e-4f);
  y = y * rest + all(1.3398874446e-3f);
  y = y * rest + all(9.6184373583e-3f);
  y = y * rest + all(5.5503324710e-2f);
  y = y * rest + all(2.4022647914e-1f);
  y = y * rest + all(6.9314720286e-1f);
  y = y * rest + all(1.0f);
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}

/* Scores first to stop of a row to exp(scale * score), but for a common factor; their sum. The row
 * is overwritten from first rounded down to stop rounded up to LANES. */
static float weigh(float *scores, ptrdiff_t first, ptrdiff_t stop, float scale) {
  const ptrdiff_t begin = first / LANES * LANES, end = padded(stop, LANES);
  for (ptrdiff_t i = begin; i < first; i++) scores[i] = -INFINITY;
  for (ptrdiff_t i = stop; i < end; i++) scores[i] = -INFINITY;
  __m256 most = all(-INFINITY), sums = all(0);
  for (ptrdiff_t i = begin; i < end; i += LANES) most = _mm256_max_ps(most, load(scores + i));
  scale *= 1.44269504088896341f; /* 1 / ln 2 */
  const __m256 factor = all(scale), top = all(scale * largest_of(most));
  for (ptrdiff_t i = begin; i < end; i += LANES) {
    const __m256 weight = power_of_two(load(scores + i) * factor - top);
    store(scores + i, weight);
    sums += weight;
  }
  return sum_of(sums);
}

/* out (6, 16) = a (6, depth) b (depth, 16), or what is there already plus it. A function of its own
 * for each use, never inlined: among other code its addresses do not fit into the registers. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define BEGIN(r)                                                      \
  __m256 low##r = add ? load(out + r * out_row) : all(0);             \
  __m256 high##r = add ? load(out + r * out_row + LANES) : all(0);
#define ADD(r)                           \
  {                                      \
    const __m256 x = all(a[r * a_row + d]); \
    low##r += x * low;                   \
    high##r += x * high;                 \
  }
#define END(r)                       \
  store(out + r * out_row, low##r);  \
  store(out + r * out_row + LANES, high##r);

static inline __attribute__((always_inline)) void tile(
    const float *a, ptrdiff_t a_row, const float *b, ptrdiff_t b_row, ptrdiff_t depth, float *out,
    ptrdiff_t out_row, int add) {
  EACH_ROW(BEGIN)
#pragma GCC unroll 4
  for (ptrdiff_t d = 0; d < depth; d++) {
    const __m256 low = load(b + d * b_row), high = load(b + d * b_row + LANES);
    EACH_ROW(ADD)
  }
  EACH_ROW(END)
}

static __attribute__((noinline)) void score_tile(
    const float *queries, const float *keys, ptrdiff_t size, float *scores, ptrdiff_t row) {
  tile(queries, size, keys, COLS, size, scores, row, 0);
}

/* Values and outputs have rows of one size. */
static __attribute__((noinline)) void value_tile(
    const float *weights, ptrdiff_t weights_row, const float *values, ptrdiff_t size,
    ptrdiff_t depth, float *out, int add) {
  tile(weights, weights_row, values, size, depth, out, size, add);
}

/* 8 rows of 8 numbers to 8 columns of them. */
static inline void transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
  __m256 pairs[LANES], fours[LANES];
  for (int i = 0; i < LANES; i += 2) {
    const __m256 a = load(from + i * from_row), b = load(from + (i + 1) * from_row);
    pairs[i] = _mm256_unpacklo_ps(a, b);
    pairs[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; j++) {
    store(to + j * to_row, _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20));
    store(to + (j + 4) * to_row, _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31));
  }
}

/* Keys (tokens, size) to (tokens / 16, size, 16), zeros behind: what score tiles read in order. */
static void pack(const float *keys, ptrdiff_t row, ptrdiff_t tokens, ptrdiff_t size, float *out) {
  for (ptrdiff_t t = 0; t < padded(tokens, COLS); t += LANES) {
    float *to = out + t / COLS * COLS * size + t % COLS;
    if (t + LANES <= tokens) {
      for (ptrdiff_t d = 0; d < size; d += LANES)
        transpose(keys + t * row + d, row, to + d * COLS, COLS);
      continue;
    }
    for (ptrdiff_t d = 0; d < size; d++)
      for (ptrdiff_t j = 0; j < LANES; j++)
        to[d * COLS + j] = t + j < tokens ? keys[(t + j) * row + d] : 0;
  }
}

/* Floats of memory that a task needs: packed keys, joined values, scores, queries and outputs. */
static ptrdiff_t space_for(const Attention *it, ptrdiff_t tokens) {
  return padded(tokens, COLS) * (2 * it->size + BLOCK) + 2 * BLOCK * it->size;
}

/* One query head of a sequence with several queries. `packed` are its keys; `values` lie together,
 * for other heads between them would drive each other out of the cache. */
static void attend_many(const Attention *it, const Sequence *sequence, const float *queries,
                        const float *packed, const float *values, float *out, float *space) {
  const ptrdiff_t size = it->size, row = padded(sequence->tokens, COLS);
  float *scores = space, *own = scores + BLOCK * row, *made = own + BLOCK * size;
  for (ptrdiff_t i = 0; i < sequence->queries; i += BLOCK) {
    const ptrdiff_t rows = less_of(BLOCK, sequence->queries - i), tiled = padded(rows, ROWS);
    const ptrdiff_t before = sequence->tokens - sequence->queries + i;
    const ptrdiff_t stop = it->causal ? before + rows : sequence->tokens;
    const ptrdiff_t first = it->window ? more_of(0, before + 1 - it->window) / COLS * COLS : 0;
    for (ptrdiff_t r = 0; r < tiled; r++) /* the last query again, where a tile has rows to spare */
      memcpy(own + r * size, queries + (i + less_of(r, rows - 1)) * it->queries.token,
             size * sizeof(float));
    for (ptrdiff_t t = first; t < stop; t += COLS)
      for (ptrdiff_t r = 0; r < tiled; r += ROWS)
        score_tile(own + r * size, packed + t * size, size, scores + r * row + t, row);
    float sums[BLOCK];
    for (ptrdiff_t r = 0; r < rows; r++) {
      const ptrdiff_t own_stop = it->causal ? before + r + 1 : stop;
      const ptrdiff_t own_first = it->window ? more_of(0, before + r + 1 - it->window) : 0;
      float *weights = scores + r * row;
      sums[r] = weigh(weights, own_first, own_stop, it->scale);
      memset(weights + first, 0, (own_first - first) * sizeof(float));
      memset(weights + own_stop, 0, (stop - own_stop) * sizeof(float));
    }
    for (ptrdiff_t t = first; t < stop; t += DEPTH)
      for (ptrdiff_t d = 0; d < size; d += COLS)
        for (ptrdiff_t r = 0; r < tiled; r += ROWS)
          value_tile(scores + r * row + t, row, values + t * size + d, size,
                     less_of(DEPTH, stop - t), made + r * size + d, t > first);
    for (ptrdiff_t r = 0; r < rows; r++)
      for (ptrdiff_t d = 0; d < size; d += LANES)
        store(out + (i + r) * it->out.token + d, load(made + r * size + d) / all(sums[r]));
  }
}

/* Sums over the lanes of four registers. */
static inline __m128 four_sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
}

/* Scores of one query against keys. */
static void score_one(const float *query, const float *keys, ptrdiff_t row, ptrdiff_t tokens,
                      ptrdiff_t size, float *scores) {
  ptrdiff_t t = 0;
  for (; t + 4 <= tokens; t += 4) {
    const float *key = keys + t * row;
    __m256 sums[4] = {all(0), all(0), all(0), all(0)};
    for (ptrdiff_t d = 0; d < size; d += LANES) {
      const __m256 x = load(query + d);
      for (int j = 0; j < 4; j++) sums[j] += x * load(key + j * row + d);
    }
    _mm_storeu_ps(scores + t, four_sums(sums[0], sums[1], sums[2], sums[3]));
  }
  for (; t < tokens; t++) {
    __m256 sum = all(0);
    for (ptrdiff_t d = 0; d < size; d += LANES) sum += load(query + d) * load(keys + t * row + d);
    scores[t] = sum_of(sum);
  }
}

/* One query head of a sequence with one query. */
static void attend_one(const Attention *it, const float *query, const float *keys,
                       const float *values, ptrdiff_t tokens, float *out, float *scores) {
  const ptrdiff_t size = it->size, row = it->values.token;
  score_one(query, keys, it->keys.token, tokens, size, scores);
  const __m256 total = all(weigh(scores, 0, tokens, it->scale));
  ptrdiff_t d = 0;
  for (; d + WIDE <= size; d += WIDE) {
    __m256 sums[WIDE / LANES];
    for (int j = 0; j < WIDE / LANES; j++) sums[j] = all(0);
    for (ptrdiff_t t = 0; t < tokens; t++) {
      const __m256 weight = all(scores[t]);
#pragma GCC unroll 8
      for (int j = 0; j < WIDE / LANES; j++)
        sums[j] += weight * load(values + t * row + d + j * LANES);
    }
    for (int j = 0; j < WIDE / LANES; j++) store(out + d + j * LANES, sums[j] / total);
  }
  for (; d < size; d += LANES) {
    __m256 sum = all(0);
    for (ptrdiff_t t = 0; t < tokens; t++) sum += all(scores[t]) * load(values + t * row + d);
    store(out + d, sum / total);
  }
}

/* One key-value head of a sequence, whose first query is the `query`-th of all. */
static void attend_head(const Attention *it, const Sequence *sequence, ptrdiff_t head,
                        ptrdiff_t query, float *space) {
  const int64_t first_head = head * it->shared, query_heads = it->shared;
  const float *keys = it->keys.at + head * it->keys.head + sequence->start * it->keys.token;
  const float *values = it->values.at + head * it->values.head + sequence->start * it->values.token;
  const float *queries = it->queries.at + first_head * it->queries.head + query * it->queries.token;
  float *out = it->out.at + first_head * it->out.head + query * it->out.token;
  if (sequence->queries == 1) {
    const ptrdiff_t unseen = it->window ? more_of(0, sequence->tokens - it->window) : 0;
    for (int64_t h = 0; h < query_heads; h++)
      attend_one(it, queries + h * it->queries.head, keys + unseen * it->keys.token,
                 values + unseen * it->values.token, sequence->tokens - unseen,
                 out + h * it->out.head, space);
    return;
  }
  const ptrdiff_t size = it->size, floats = padded(sequence->tokens, COLS) * size;
  pack(keys, it->keys.token, sequence->tokens, size, space);
  if (it->values.token != size) {
    for (ptrdiff_t t = 0; t < sequence->tokens; t++)
      memcpy(space + floats + t * size, values + t * it->values.token, size * sizeof(float));
    values = space + floats;
  }
  for (int64_t h = 0; h < query_heads; h++)
    attend_many(it, sequence, queries + h * it->queries.head, space, values,
                out + h * it->out.head, space + 2 * floats);
}

/* Attention of all sequences, whose queries and outputs lie one after the other. 0, or 1 where
 * there is not enough memory. */
int gc2ray_attend(const Attention *it, const Sequence *sequences, int64_t count, int32_t threads) {
  int64_t *firsts = malloc((count + 1) * sizeof(int64_t));
  if (!firsts) return 1;
  ptrdiff_t longest = 0;
  firsts[0] = 0;
  for (int64_t s = 0; s < count; s++) {
    firsts[s + 1] = firsts[s] + sequences[s].queries;
    longest = more_of(longest, sequences[s].tokens);
  }
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const size_t space_bytes = padded(space_for(it, longest) * sizeof(float), 64);
    float *space = aligned_alloc(64, space_bytes);
    failed |= !space;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count * it->heads; task++) {
      const int64_t s = task / it->heads;
      if (space) attend_head(it, sequences + s, task % it->heads, firsts[s], space);
    }
    free(space);
  }
  free(firsts);
  return failed;
}
