#include "product.cuh"
nn_status nn_product_wgmma(nn_context *, Product &) { return NN_ERROR_UNSUPPORTED; }
