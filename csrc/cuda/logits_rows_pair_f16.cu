#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_pairs<__half>(const LogitsRowsParams&, const LogitsRowsPlan&, cudaStream_t);
