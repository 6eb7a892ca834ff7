// One instruction set's table of functions: the including source defines VIGOS_ISA and the sizes.
#include "divergence_kernel.h"
#include "gemm_kernel.h"

namespace vigos::cpu {

#define VIGOS_TABLE_NAME_(isa) isa_##isa
#define VIGOS_TABLE_NAME(isa) VIGOS_TABLE_NAME_(isa)
#define VIGOS_STRING_(isa) #isa
#define VIGOS_STRING(isa) VIGOS_STRING_(isa)

const Isa& VIGOS_TABLE_NAME(VIGOS_ISA)() {
  namespace ours = VIGOS_ISA;
  static const Isa table = {VIGOS_STRING(VIGOS_ISA), ours::kPanel,       ours::kRows,        ours::statistics,
                            ours::measure,           ours::gradient,     ours::widen,        ours::narrow,
                            ours::pack_rows,         ours::pack_columns, ours::gradient_row, ours::pack_tiles,
                            ours::multiply,          ours::multiply_add, ours::evaluate};
  return table;
}

}  // namespace vigos::cpu
