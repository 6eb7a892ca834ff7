#define VIGOS_ISA avx512
#define VIGOS_LANES 16
#define VIGOS_TILE_ROWS 6
#define VIGOS_TILE_VECTORS 4
#include "isa.inl"
