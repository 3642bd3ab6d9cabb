/* workspace.cu: how much scratch the kernels of this library take at most for a model. Each file's need is repeated here once. */
#include "attention_decode.cuh"
#include "product.cuh"
#include "sort.cuh"

int64_t nn_loss_chunk(int64_t T, int64_t V);
int64_t nn_attention_backward_wgmma_scratch(nn_context *context, const Attention &a);

extern "C" nn_status nn_workspace_bytes(nn_context *context, int64_t *bytes, int64_t T, int64_t S, int64_t H, int64_t F, int64_t E, int64_t K,
                                        int64_t V, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, bytes != NULL && T >= 0 && S >= 0 && H >= 0 && F >= 0 && E >= 0 && K >= 0 && V >= 0 && Q >= 1 && G >= 1 && Q % G == 0 &&
                        D >= 1 && valid(dtype));
  const int64_t size = dtype == NN_BF16 ? 2 : 4, slack = 16 * 256;
  int64_t most = SPLIT_WORKSPACE; /* also enough for nn_grad_norm of 2^34 elements */
  auto need = [&](int64_t wanted) { most = wanted > most ? wanted : most; };
  need(264 * H * 4);                                                        /* nn_rmsnorm_backward */
  need(T * K * most_dot_parts(F) * 4 + T * K * H * size);                   /* nn_moe_down_backward, its gathered rows packed */
  need((T * K + 64 * (E + 1)) * H * size);                                  /* gathered rows, packed; of nn_moe_*_weight_gradient padded */
  need(ceil_div(T * K, SORT_BLOCK) * E * 4);                                /* nn_moe_permute */
  need(ceil_div(T, SORT_BLOCK) * SORT_BINS * 4 + 2 * T * 4);                /* nn_scatter_add */
  need(nn_loss_chunk(T, V) * V * size + V * H * 4 + SPLIT_WORKSPACE);       /* nn_linear_cross_entropy */
  if (S > 0 && T > 0) {
    Attention a = attention_of(NULL, ceil_div(T, S), S, Q, G, D, dtype);
    need(T * Q * 4 + nn_attention_backward_scratch(context, a));            /* nn_flash_attention_backward */
    if (D == 64) need(T * Q * 4 + nn_attention_backward_wgmma_scratch(context, a));
    Attention d = attention_of(NULL, T, 1, Q, G, D, dtype);
    d.capacity = 1ll << 40;
    need(T <= 4096 ? T * Q * nn_decode_splits(context, d) * (D + 2) * 4 : 0); /* nn_attention_cached, one query a sequence */
  }
  /* nn_decode_attention and nn_decode_moe, where they go through the entries that they are made of, or by kernels of their own */
  const int64_t few = T < NN_DECODE_TOKENS ? T : NN_DECODE_TOKENS, slots = few * K, P = (Q + 2 * G) * D, entries = most;
  need(entries + few * (H + P + Q * D) * size + few * 4);
  need(entries + few * (H * size + 4 + 8 * E) + slots * ((F + H) * size + 20) + E * 8);
  Attention step = attention_of(NULL, few, 1, Q, G, D, dtype);
  step.capacity = 1ll << 40;
  need(2 * few * Q * D * size + (few > 0 ? few * Q * nn_decode_splits(context, step) * (D + 2) * 4 : 0));
  need(few * H * size + slots * (F * size + 8) + ceil_div(F, 768) * slots * H * 4);
  *bytes = most + slack;
  return NN_OK;
}
