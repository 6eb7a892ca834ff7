// What every launcher says when an argument, or a call to CUDA, is wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace vigos {

inline void require(bool holds, const char* name, const std::string& wanted, const std::string& got) {
  if (!holds) throw std::invalid_argument(std::string(name) + " must be " + wanted + ", got " + got);
}

inline void require(bool holds, const char* name, const std::string& wanted, int64_t got) {
  if (!holds) require(false, name, wanted, std::to_string(got));
}

inline void require_pointer(const char* name, const void* pointer) {
  require(pointer != nullptr, name, "a device pointer", "null");
}

inline bool aligned_to(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline void require_aligned(const char* name, const void* pointer, int64_t bytes) {
  require(aligned_to(pointer, bytes), name, "aligned to " + std::to_string(bytes) + " bytes",
          "address " + std::to_string(reinterpret_cast<uintptr_t>(pointer)));
}

#if defined(__CUDACC__)
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#endif

}  // namespace vigos
