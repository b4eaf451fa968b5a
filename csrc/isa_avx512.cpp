#define SMIDGEN_ISA avx512
#include "isa.h"
