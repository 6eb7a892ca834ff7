#define VIGOS_ISA portable
#define VIGOS_LANES 4
#define VIGOS_TILE_ROWS 4
#define VIGOS_TILE_VECTORS 2
#include "isa.inl"
