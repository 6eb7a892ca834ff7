#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_rows<__half, __half>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                          cudaStream_t);
template cudaError_t vigos::dispatch_gradient<__half>(const LogitsGradientParams&, bool, cudaStream_t);
