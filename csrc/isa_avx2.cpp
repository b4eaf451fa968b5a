#define SMIDGEN_ISA avx2
#include "isa.h"
