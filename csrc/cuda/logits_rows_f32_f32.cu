#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_rows<float, float>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                        cudaStream_t);
template cudaError_t vigos::dispatch_gradient<float>(const LogitsGradientParams&, bool, cudaStream_t);
