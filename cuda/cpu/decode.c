/* decode.c: choosing the next token from logits (nn.h), for the CPU: greedy, the whole distribution, top-k, top-p.
 *
 * One thread does one sequence. A candidate's weight is exp((logit - largest) / temperature) in float64; NaN counts as -infinity. The
 * candidates in falling order come from a heap, of which only as many are taken as the choice needs. The three ways of sampling are
 * one function: take candidates up to a count or a probability, then the first whose cumulative weight exceeds u * their total.
 */
#include <math.h>

#include "../include/nn_random.h"
#include "vector_kernels.h"

typedef struct candidate {
  float logit;
  int32_t index;
} candidate;

static float number(float logit) { return isnan(logit) ? -INFINITY : logit; }

/* Falling order of logit, ties to the lower index: no two candidates are equal. */
static int comes_before(candidate a, candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.index < b.index); }

static void sift_down(candidate *heap, int64_t count, int64_t at) {
  candidate moved = heap[at];
  for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
    if (child + 1 < count && comes_before(heap[child + 1], heap[child])) child++;
    if (!comes_before(heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

/* exp((logit - largest) / temperature); 1 for the largest itself, which may be infinite. */
static double weight_of(float logit, float largest, float temperature) {
  return logit == largest ? 1.0 : exp(((double)logit - (double)largest) / (double)temperature);
}

static int32_t largest_index(const float *logits, int64_t V) {
  int64_t best = 0;
  for (int64_t i = 1; i < V; i++)
    if (number(logits[i]) > number(logits[best])) best = i;
  return (int32_t)best;
}

/* The token for one row. The candidates are the first `most`, cut short where their weight reaches `share` of the whole. They
 * are taken to the end of the heap's array as they leave it: the i-th lies at heap[V - 1 - i]. */
static int32_t choose(candidate *heap, const float *logits, int64_t V, int64_t most, double share, float temperature, double u) {
  const float largest = number(logits[largest_index(logits, V)]);
  double all = 0.0, total = 0.0, cumulative = 0.0;
  for (int64_t i = 0; i < V; i++) {
    heap[i] = (candidate){number(logits[i]), (int32_t)i};
    all += weight_of(heap[i].logit, largest, temperature);
  }
  for (int64_t i = V / 2 - 1; i >= 0; i--) sift_down(heap, V, i);
  int64_t taken = 0;
  const int whole = most >= V && share >= 1.0;
  if (whole) total = all;
  while (taken < V && taken < most && (whole ? cumulative <= u * all : taken == 0 || total < share * all)) {
    const candidate next = heap[0];
    heap[0] = heap[V - 1 - taken];
    heap[V - 1 - taken] = next;
    taken++;
    sift_down(heap, V - taken, 0);
    if (whole)
      cumulative += weight_of(next.logit, largest, temperature);
    else
      total += weight_of(next.logit, largest, temperature);
  }
  if (whole) return heap[V - taken].index; /* the last that was taken */
  for (int64_t i = 0; i < taken; i++) {
    cumulative += weight_of(heap[V - 1 - i].logit, largest, temperature);
    if (cumulative > u * total) return heap[V - 1 - i].index;
  }
  return heap[V - taken].index;
}

/* A heap of all candidates for each thread that has a row. */
int64_t nn_sample_workspace_bytes(const nn_context *context, const nn_sizes *z) {
  return nn_min64(context->threads, z->T) * z->V * (int64_t)sizeof(candidate) + 256;
}

static nn_status sample(nn_context *context, int32_t *token, const float *logits, const int32_t *counter, int64_t B, int64_t V,
                        int64_t most, double share, float temperature, uint64_t seed) {
  nn_carve carve = nn_carve_begin(context);
  const int team = nn_team(context, B * V, 2048);
  candidate *heaps = nn_carve_take(&carve, nn_min64(team, B) * V * (int64_t)sizeof(candidate)); /* the first B threads have a row each */
  NN_CARVE_CHECK(context, carve);
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t b = 0; b < B; b++) {
    const double u = nn_random_uniform(seed, (uint64_t)b, (uint64_t)(uint32_t)counter[b]);
    token[b] = choose(heaps + omp_get_thread_num() * V, logits + b * V, V, most, share, temperature, u);
  }
  return NN_OK;
}

nn_status nn_argmax(nn_context *context, int32_t *token, const void *logits, int64_t B, int64_t V, nn_dtype dtype) {
  NN_REQUIRE(context, B >= 0 && V >= (B > 0) && V <= INT32_MAX);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, B * V, NN_GRAIN)) schedule(static)
  for (int64_t b = 0; b < B; b++) token[b] = largest_index((const float *)logits + b * V, V);
  return NN_OK;
}

nn_status nn_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V,
                    float temperature, uint64_t seed, nn_dtype dtype) {
  NN_REQUIRE(context, B >= 0 && V >= (B > 0) && V <= INT32_MAX);
  NN_REQUIRE(context, temperature > 0);
  NN_REQUIRE_F32(context, dtype);
  return sample(context, token, logits, counter, B, V, V, 1.0, temperature, seed);
}

nn_status nn_topk_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V,
                         int64_t top_k, float temperature, uint64_t seed, nn_dtype dtype) {
  NN_REQUIRE(context, B >= 0 && V >= (B > 0) && V <= INT32_MAX);
  NN_REQUIRE(context, temperature > 0 && top_k >= 1 && (B == 0 || top_k <= V));
  NN_REQUIRE_F32(context, dtype);
  /* A share above 1 is never reached: exactly top_k candidates. */
  return sample(context, token, logits, counter, B, V, top_k, top_k == V ? 1.0 : 2.0, temperature, seed);
}

nn_status nn_topp_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V,
                         float top_p, float temperature, uint64_t seed, nn_dtype dtype) {
  NN_REQUIRE(context, B >= 0 && V >= (B > 0) && V <= INT32_MAX);
  NN_REQUIRE(context, temperature > 0 && top_p > 0 && top_p <= 1);
  NN_REQUIRE_F32(context, dtype);
  return sample(context, token, logits, counter, B, V, V, (double)top_p, temperature, seed);
}
