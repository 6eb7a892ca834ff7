#include "logits_rows_launch.cuh"

template cudaError_t vigos::dispatch_rows<float, __half>(const LogitsRowsParams&, const LogitsRowsPlan&, bool,
                                                         cudaStream_t);
