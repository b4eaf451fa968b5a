// Included by each isa_*.cpp after it has named its instruction set: the bodies, and the table of them.
#include "kernels.h"
#include "simd.h"

#include "attention.h"
#include "elementwise.h"
#include "fourbit.h"
#include "quantise.h"

#include "int8.h"  // after what it calls, as those below
#include "blocks.h"
#include "products.h"

#include "panels.h"

#define SMIDGEN_JOIN2(a, b) a##b
#define SMIDGEN_JOIN(a, b) SMIDGEN_JOIN2(a, b)
#define SMIDGEN_TEXT2(a) #a
#define SMIDGEN_TEXT(a) SMIDGEN_TEXT2(a)

namespace smidgen {
const Kernels SMIDGEN_JOIN(kernels_, SMIDGEN_ISA) = {
    SMIDGEN_TEXT(SMIDGEN_ISA),
#define SMIDGEN_ENTRY(Args, name) name,
    SMIDGEN_KERNELS(SMIDGEN_ENTRY)
#undef SMIDGEN_ENTRY
};
}  // namespace smidgen
