/* rope.cu: rotary position embedding in the half-split convention: a head's first half turns with its second.
 * Su et al., arXiv 2104.09864.
 */
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* cosine, sine [positions, half]. */
__global__ void rope_freqs_kernel(float *cosine, float *sine, int64_t positions, int half, double base) {
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= positions * half) return;
  int64_t p = i / half, k = i - p * half;
  double angle = (double)p * pow(base, -(double)k / (double)half), s, c;
  sincos(angle, &s, &c);
  cosine[i] = (float)c;
  sine[i] = (float)s;
}

/* Turns `heads` heads of each row of `width` elements, N pairs a thread. y may be x. */
template <typename T, int N>
__global__ void rope_kernel(T *y, const T *x, const int32_t *position, const float *cosine, const float *sine, int64_t rows, int heads,
                            int D, int64_t width, int64_t positions, float direction) {
  int half = D / 2, packs = half / N;
  int64_t total = rows * heads * packs;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t row = i / (heads * packs);
    int rest = (int)(i - row * heads * packs), head = rest / packs, k = (rest - head * packs) * N;
    int64_t at = row * width + head * D + k, p = position[row];
    Pack<T, N> a = load_pack<T, N>(x + at), b = load_pack<T, N>(x + at + half);
    bool inside = p >= 0 && p < positions;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float c = inside ? cosine[p * half + k + j] : NAN, s = inside ? direction * sine[p * half + k + j] : NAN;
      float first = to_float(a.v[j]), second = to_float(b.v[j]);
      a.v[j] = from_float<T>(first * c - second * s);
      b.v[j] = from_float<T>(second * c + first * s);
    }
    store_pack<T, N>(y + at, a);
    store_pack<T, N>(y + at + half, b);
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename T>
static void run_rope(nn_context *context, void *y, const void *x, const int32_t *position, const float *cosine, const float *sine,
                     int64_t rows, int64_t heads, int64_t D, int64_t width, int64_t positions, int32_t direction) {
  const int N = 16 / sizeof(T);
  bool packs = D / 2 % N == 0 && width % N == 0 && aligned16(y) && aligned16(x);
  int64_t blocks = ceil_div(rows * heads * (D / 2) / (packs ? N : 1), 256);
  unsigned grid = (unsigned)(blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536);
  if (packs)
    rope_kernel<T, N><<<grid, 256, 0, context->stream>>>((T *)y, (const T *)x, position, cosine, sine, rows, (int)heads, (int)D, width,
                                                         positions, (float)direction);
  else
    rope_kernel<T, 1><<<grid, 256, 0, context->stream>>>((T *)y, (const T *)x, position, cosine, sine, rows, (int)heads, (int)D, width,
                                                         positions, (float)direction);
}

extern "C" {

nn_status nn_rope_freqs(nn_context *context, float *cosine, float *sine, int64_t positions, int64_t D, double base, double ntk_alpha) {
  NN_ENTER(context, positions >= 0 && D >= 2 && D % 2 == 0 && base > 0.0 && ntk_alpha > 0.0 && (D > 2 || ntk_alpha == 1.0));
  double scaled = ntk_alpha == 1.0 ? base : base * pow(ntk_alpha, (double)D / (double)(D - 2));
  if (positions > 0)
    rope_freqs_kernel<<<(unsigned)ceil_div(positions * (D / 2), 256), 256, 0, context->stream>>>(cosine, sine, positions, (int)(D / 2),
                                                                                               scaled);
  NN_LEAVE(context);
}

nn_status nn_rope_forward(nn_context *context, void *y, const void *x, const int32_t *position, const float *cosine, const float *sine,
                          int64_t T, int64_t heads, int64_t D, int64_t positions, int32_t direction, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && heads >= 0 && D >= 0 && D % 2 == 0 && (direction == 1 || direction == -1) && valid(dtype));
  if (T > 0 && heads > 0 && D > 0)
    NN_FOR_DTYPE(dtype, X, run_rope<X>(context, y, x, position, cosine, sine, T, heads, D, heads * D, positions, direction););
  NN_LEAVE(context);
}

nn_status nn_rope_qk(nn_context *context, void *qkv, const int32_t *position, const float *cosine, const float *sine, int64_t T, int64_t Q,
                     int64_t G, int64_t D, int64_t positions, int32_t direction, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && Q >= 0 && G >= 0 && D >= 0 && D % 2 == 0 && (direction == 1 || direction == -1) && valid(dtype));
  if (T > 0 && Q + G > 0 && D > 0)
    NN_FOR_DTYPE(dtype, X, run_rope<X>(context, qkv, qkv, position, cosine, sine, T, Q + G, D, (Q + 2 * G) * D, positions, direction););
  NN_LEAVE(context);
}

} /* extern "C" */
