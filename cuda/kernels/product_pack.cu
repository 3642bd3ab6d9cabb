/* product_pack.cu: gathered rows of a product copied side by side into the workspace, for a core that cannot gather, or not as fast:
 * the copy engine of Hopper takes whole boxes, and cp.async does not multiply. Called by product_mma.cu and product_wgmma.cu.
 */
#include "product.cuh"

/* packed [count, width] = the gathered rows in their order, a warp each, times their scale if there is one; with offsets, group by group
 * from packed_start, zeros between. */
__global__ void __launch_bounds__(256)
    pack_kernel(bf16 *packed, const bf16 *matrix, const int32_t *rows, const float *scale, const int32_t *offsets, int groups, int64_t count,
                int width, int64_t stride) {
  const int64_t row = (int64_t)blockIdx.x * 8 + (threadIdx.x >> 5);
  if (row >= count) return;
  int64_t from = row;
  if (offsets) {
    int g = 0;
    while (g + 1 < groups && row >= packed_start(offsets, g + 1)) g++;
    from = offsets[g] + row - packed_start(offsets, g);
    if (from >= offsets[g + 1]) from = -1;
  }
  const int64_t source = from >= 0 ? (int64_t)rows[from] * stride : 0;
  const float factor = from >= 0 && scale ? scale[from] : 1.0f;
  for (int column = (threadIdx.x & 31) * 8; column < width; column += 256) {
    Pack<bf16, 8> x = {};
    if (from >= 0) x = load_pack<bf16, 8>(matrix + source + column);
    if (scale) {
#pragma unroll
      for (int j = 0; j < 8; j++) x.v[j] = from_float<bf16>(factor * to_float(x.v[j]));
    }
    store_pack<bf16, 8>(packed + row * width + column, x);
  }
}

bool nn_pack_rows(nn_context *context, Product &p, bool padded) {
  const bool depth = p.grouping == GROUP_DEPTH, of_b = p.b_rows != NULL;
  const int64_t slots = depth ? p.k : p.m, width = of_b ? p.n : depth ? p.m : p.k;
  const int64_t count = padded ? ceil_div(slots, PACK_DEPTH) * PACK_DEPTH + PACK_DEPTH * p.groups : slots;
  Scratch scratch(context);
  if (p.row_dots) scratch.take<float>(p.m * most_dot_parts(p.n)); /* the caller's, at the start of the workspace */
  bf16 *packed = scratch.take<bf16>(count * width);
  if (!scratch.fits()) return false;
  pack_kernel<<<(unsigned)ceil_div(count, 8), 256, 0, context->stream>>>(packed, (const bf16 *)(of_b ? p.b : p.a), of_b ? p.b_rows : p.a_rows, p.a_scale,
                                                                        padded ? p.offsets : NULL, p.groups, count, (int)width, of_b ? p.ldb : p.lda);
  if (of_b)
    p.b = packed, p.ldb = width, p.b_rows = NULL;
  else
    p.a = packed, p.lda = width, p.a_rows = NULL, p.a_scale = NULL;
  p.padded_rows = count;
  return true;
}
