/* attention_decode.cuh: attention of one new query a sequence over a cache, for attention.cu and step_attention.cu. */
#pragma once

#include "attention.cuh"

/* Pieces that a cache is cut into. */
int nn_decode_splits(nn_context *context, const Attention &a);
nn_status nn_attention_decode(nn_context *context, void *out, const Attention &a);
/* The same as part of a chain, after a kernel that wrote a.q and the newest key and value of each sequence. partial [B, Q, splits, D + 2];
 * out NULL: the splits are left unmerged. */
nn_status nn_attention_decode_chained(nn_context *context, void *out, float *partial, const Attention &a, int splits);
