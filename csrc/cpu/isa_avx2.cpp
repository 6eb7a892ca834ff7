#define VIGOS_ISA avx2
#define VIGOS_LANES 8
#define VIGOS_TILE_ROWS 6
#define VIGOS_TILE_VECTORS 2
#include "isa.inl"
