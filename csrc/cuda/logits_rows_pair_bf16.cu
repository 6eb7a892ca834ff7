#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_pairs<__nv_bfloat16>(const LogitsRowsParams&, const LogitsRowsPlan&, cudaStream_t);
