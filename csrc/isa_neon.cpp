#define SMIDGEN_ISA neon
#include "isa.h"
