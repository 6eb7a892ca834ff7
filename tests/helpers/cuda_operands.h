// The operands of a launch, each moved to memory of its own that faults past its end; outputs are NaN until written.
#pragma once

#include <list>

#include "cuda_fibers.h"

namespace emulator {

class Operands {
 public:
  // (rows, columns) entries of `item` bytes; the pointer becomes that of the copy. Operands at one address stay one.
  // kept: an output whose entries may stay as they are.
  template <typename T>
  void matrix(T*& pointer, int64_t rows, int64_t columns, int64_t stride, size_t item, bool kept = false) {
    if (pointer == nullptr || rows == 0) return;
    char* const original = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(pointer));
    constexpr bool kWritten = !std::is_const_v<T>;
    const size_t bytes = ((rows - 1) * stride + columns) * item;
    for (Operand& operand : all_) {
      if (operand.original != original || operand.pages.bytes() < bytes) continue;
      operand.written |= kWritten;
      pointer = reinterpret_cast<T*>(operand.pages.data());
      return;
    }
    all_.push_back({original, Guarded(bytes, reinterpret_cast<uintptr_t>(original) % 16), rows, columns * item,
                    stride * item, kWritten});
    char* const copy = all_.back().pages.data();
    std::memcpy(copy, original, bytes);
    for (int64_t row = 0; kWritten && !kept && row < rows; ++row)
      std::memset(copy + row * stride * item, kPoison, columns * item);
    pointer = reinterpret_cast<T*>(copy);
  }
  template <typename T>
  void array(T*& pointer, int64_t count) {
    matrix(pointer, 1, count, count, sizeof(T));
  }

  // Gives the outputs back. What lies between rows, behind the last, and all of an input must be as before.
  void give_back() {
    for (Operand& operand : all_) {
      const char* const copy = operand.pages.data();
      bool kept = operand.pages.slack_untouched();
      for (int64_t row = 0; row < operand.rows; ++row) {
        const size_t start = row * operand.stride, end = start + operand.row_bytes;
        const size_t next = row + 1 < operand.rows ? start + operand.stride : end;
        kept &= std::memcmp(copy + end, operand.original + end, next - end) == 0;
        if (operand.written) {
          std::memcpy(operand.original + start, copy + start, operand.row_bytes);
        } else {
          kept &= std::memcmp(copy + start, operand.original + start, operand.row_bytes) == 0;
        }
      }
      if (!kept) throw std::runtime_error("emulated kernel: memory beside an output is written");
    }
  }

 private:
  struct Operand {
    char* original;
    Guarded pages;
    int64_t rows;
    size_t row_bytes, stride;
    bool written;
  };
  std::list<Operand> all_;
};

inline int64_t rows_named(const int64_t* index, int64_t count) {
  int64_t rows = index ? 0 : count;
  for (int64_t i = 0; index && i < count; ++i) rows = std::max(rows, index[i] + 1);
  return rows;
}

}  // namespace emulator
