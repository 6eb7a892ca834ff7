#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_rows<__nv_bfloat16, __nv_bfloat16>(const LogitsRowsParams&, const LogitsRowsPlan&,
                                                                        bool, cudaStream_t);
template cudaError_t vigos::dispatch_gradient<__nv_bfloat16>(const LogitsGradientParams&, bool, cudaStream_t);
