// One instruction set's table of functions: the including source defines VIGOS_ISA and the sizes.
#include "divergence_kernel.h"
#include "gemm_kernel.h"

namespace vigos::cpu {

#define VIGOS_TABLE_NAME_(isa) isa_##isa
#define VIGOS_TABLE_NAME(isa) VIGOS_TABLE_NAME_(isa)
#define VIGOS_STRING_(isa) #isa
#define VIGOS_STRING(isa) VIGOS_STRING_(isa)

const Isa& VIGOS_TABLE_NAME(VIGOS_ISA)() {
  namespace of = VIGOS_ISA;
  static const Isa table = {VIGOS_STRING(VIGOS_ISA),
                            of::kPanel,
                            of::kRows,
                            of::statistics,
                            of::measure,
                            of::gradient,
                            of::widen,
                            of::narrow,
                            of::pack_rows,
                            of::pack_columns,
                            of::pack_tiles,
                            of::multiply,
                            of::multiply_tiles,
                            of::evaluate};
  return table;
}

}  // namespace vigos::cpu
