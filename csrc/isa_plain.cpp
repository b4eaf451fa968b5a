#define SMIDGEN_ISA plain
#include "isa.h"
