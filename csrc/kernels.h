// The kernels: what each one is given, and the table of them that every instruction set fills.
//
// A kernel is a function of its arguments and a range of independent tasks. It touches no state, starts no thread and
// allocates nothing but `worker_scratch`; api.cpp hands the ranges to the threads. Sources named isa_*.cpp compile the
// same bodies (the other headers) for one instruction set each. They use no inline function of the standard library:
// the linker would keep one copy for all, compiled for whichever instruction set came last.
#pragma once

#include <cstddef>
#include <cstdint>

namespace smidgen {

constexpr int64_t kQueries = 64;  // queries in a block of attention

// Number types; the values are part of the C interface. Only stored weights may be float16.
enum Type : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// C = alpha op(A) op(B) + beta C, Fortran interface of BLAS: column-major, every argument by address.
using Sgemm = void (*)(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc);

// Memory of the calling thread, 64-byte aligned, valid until its next call with the same slot. Ends the program with a
// line on stderr if there is none left.
float* worker_scratch(int slot, size_t floats);

// y = x / rms(x) * weight; x, y [rows, width]; rstd [rows]. Tasks: rows.
struct RmsNorm {
    const void* x;
    const float* weight;
    void* y;
    float* rstd;
    int64_t width;
    float eps;
    Type type;
};

// grad_x = the gradient of y = x rstd weight, plus `residual` if it is not null. Tasks: rows.
struct RmsNormBackward {
    const void* grad_y;
    const void* x;
    const float* weight;
    const float* rstd;
    const void* residual;
    void* grad_x;
    int64_t width;
    Type type;
};

// In place: heads of x [rows, heads * head_dim] rotated by cos, sin [rows, rotary_dim / 2]; sign -1 rotates back.
// Element i of a head's first rotary_dim values is paired with element i + rotary_dim / 2. Tasks: rows.
struct Rotate {
    void* x;
    const float* cosine;
    const float* sine;
    int64_t heads, head_dim, rotary_dim, x_stride;
    float sign;
    Type type;
};

// y [rows, width] = silu(gate) * up, where gate_up is [rows, 2 * width]: gate first. Tasks: rows.
struct SwiGlu {
    const void* gate_up;
    void* y;
    int64_t width;
    Type type;
};

// From grad_y [rows, width] and gate_up [rows, 2 * width]: the gradient of gate_up, and y again.
struct SwiGluBackward {
    const void* grad_y;
    const void* gate_up;
    void* grad_gate_up;
    void* y;
    int64_t width;
    Type type;
};

// loss [rows] = logsumexp(logits) - logits[target]; with `backward`, logits become softmax(logits) - onehot(target).
struct CrossEntropy {
    void* logits;
    const int64_t* targets;
    float* loss;
    int64_t width;
    int backward;
    Type type;
};

// Causal attention of rows of tokens that lie one behind the other, float32. Row r is tokens starts[r] .. starts[r + 1];
// it goes on after the whole row prefixes[r], which goes on after none itself (-1: after none).
// Token t has its queries, keys and values at q, k, v + t * stride, head h at + h * head_dim; heads of q share the keys
// of head h / (heads / kv_heads). window: how many tokens back a query sees, itself included (0: all before it).
// lse [heads, tokens]: log of the sum of exponentials. blocks: pairs (row, block of kQueries queries in it).
// A task is one key head of one of these blocks, for all heads that share it.
struct Attention {
    const float* q;
    const float* k;
    const float* v;
    float* out;
    float* lse;
    const int64_t* starts;
    const int64_t* prefixes;
    const int64_t* blocks;
    int64_t tokens, heads, kv_heads, head_dim, stride, out_stride, window;
    float scale;
    Sgemm sgemm;
};

// Gradients of the above. Group g is rows groups[g] .. groups[g + 1]: one row, or one and those that go on after it.
// parts: triples (group, part, parts of this group): every parts-th block of queries, from `part` on, is the work of
// one task, so that few long rows keep all threads busy, and no two tasks add to the same place. partial_k, partial_v [most parts, kv_heads,
// tokens, head_dim] receive what each part adds to its keys and values; summed afterwards in a fixed order, so that the
// result does not depend on the threads. A task is one key head of one part.
struct AttentionBackward {
    Attention forward;
    const float* grad_out;
    float* grad_q;
    float* partial_k;
    float* partial_v;
    const int64_t* groups;
    const int64_t* parts;
};

// grad_k, grad_v [tokens, stride] from the partial sums. starts, parts_of_group: of the groups. A task is one key head
// of one group.
struct AttentionReduce {
    const float* partial_k;
    const float* partial_v;
    float* grad_k;
    float* grad_v;
    const int64_t* starts;
    const int64_t* parts_of_group;
    int64_t tokens, kv_heads, head_dim, stride;
};

// One new token per row against what is cached of the row, [row, kv_heads, capacity, head_dim]. Its queries, keys and
// values are at q, k, v + row * stride; keys and values are put into the cache as number lengths[row] first, so that
// lengths[row] + 1 are seen. type: of keys and values, float32 or bfloat16. A task is one key head of one row.
struct AttentionDecode {
    const float* q;
    const float* k;
    const float* v;
    void* keys;
    void* values;
    const int64_t* lengths;
    float* out;
    int64_t heads, kv_heads, head_dim, capacity, stride, out_stride, window;
    float scale;
    Type type;
};

// A matrix in 4-bit blocks. code [16] float32; absmax: the blocks' scales, float32, or if `map` is not null uint8 codes:
// scale = map[absmax[block]] * outer[block / 256] + *offset. blocksize: a power of two.
struct FourBit {
    const uint8_t* packed;
    const float* code;
    const void* absmax;
    const float* map;
    const float* outer;
    const float* offset;
    int64_t blocksize;
};

// Weight [count] -> packed [ceil(count / 2)], absmax [ceil(count / blocksize)]. A weight divided by its
// block's largest magnitude gets the code of its rank, which is the number of midpoints that it is above; a NaN is above
// all of them. A task is one stretch of `task` weights, a multiple of the blocksize.
struct Quantise4bit {
    const void* weight;
    const float* midpoints;  // [15], rising
    const int32_t* codes;    // [16], by rank
    uint8_t* packed;
    float* absmax;
    int64_t count, blocksize, task;
    Type type;
};

// codes [rows, width] = round(127 weight / scale), scale [rows] = the largest magnitude of the row. Tasks: rows.
struct QuantiseInt8 {
    const void* weight;
    int8_t* codes;
    float* scale;
    int64_t width;
    Type type;
};

// A matrix [n, k] in one of its stored forms. The rows of these are `row_bytes` long:
//   kBlocks   blocks of a GGUF file, type: ggml's number of it. half: 0, or half the width of the heads whose rows GGUF
//             keeps interleaved: row h * 2 half + j * half + i of W is row h * 2 half + 2 i + j of the file
//   kGroups   codes of `type` bits (2, 3, 4, 8), eight after eight from the lowest bit on. Weights ends[g - 1] .. ends[g]
//             of a row are (code - zeros [n, groups]) * scale [n, groups]
struct Weights {
    enum Form : int64_t { kFourBit = 0, kInt8 = 1, kDense = 2, kBlocks = 3, kGroups = 4 };
    int64_t form;
    FourBit four_bit;    // with k and blocksize multiples of 32, and whole blocks in each row, for a small product
    const void* values;  // int8 codes; dense weights of type `type`; blocks; codes
    const void* scale;   // of int8 rows, float32; of groups, of type `scale_type`
    int64_t type;
    int64_t row_bytes, half;
    const uint8_t* zeros;
    const int32_t* ends;  // rising; the last one is k
    int64_t groups, scale_type;
};

// out [last - first, k] = rows of W, of type `out_type`. Tasks: rows, from `first` on.
struct Dequantise {
    Weights weights;
    int64_t k, first;
    void* out;
    Type out_type;
};

constexpr int64_t kSmallRows = 16;  // rows of x at most

// y [rows, N] = x [rows, width] W [N, width]^T in float32, for 1 to kSmallRows rows. Tasks: rows of W.
struct Product {
    Weights weights;
    const float* x;
    float* y;
    int64_t rows, width, x_stride, y_stride;
};

// An adapter over W [n, k]: W + scaling B A, of which low [m, rank] = x A^T is known. Its part of a product is added while
// the result is in the cache. Backwards grad_low [m, rank] and grad_b [tasks, rank, n], one sum for each task, come out.
struct LowRank {
    const float* a;    // [rank, k]
    const float* b;    // [n, rank]
    const float* low;  // rows `low_stride` apart, as those of grad_low
    float* grad_low;
    float* grad_b;
    int64_t rank, low_stride;
    float scaling;
};

// Products in float32 with many rows of x, by panels: a thread de-quantises some rows of W into its own cache and
// multiplies them there at once, `slice` weights of each row at a time. Forwards y [m, n] = x [m, k] W^T, and a task is one
// panel of `step` rows of W. Backwards y [m, k] (+)= x [m, n] W, and a task is `step` rows of x and `columns` of W, with all
// panels of `panel` rows in turn. slice, columns: k or a multiple of 256. adapter: null, or what is added to W; backwards
// only where columns is k.
struct PanelProduct {
    Weights weights;
    const LowRank* adapter;
    const float* x;
    float* y;
    int64_t m, n, k, x_stride, y_stride, step, panel, slice, columns, accumulate;
    Sgemm sgemm;
};

// Name of the arguments' struct, name of the function.
#define SMIDGEN_KERNELS(X)                 \
    X(RmsNorm, rms_norm)                   \
    X(RmsNormBackward, rms_norm_backward)  \
    X(Rotate, rotate)                      \
    X(SwiGlu, swiglu)                      \
    X(SwiGluBackward, swiglu_backward)     \
    X(CrossEntropy, cross_entropy)         \
    X(PanelProduct, panel_product)         \
    X(PanelProduct, panel_product_t)       \
    X(Attention, attention)                \
    X(AttentionBackward, attention_backward) \
    X(AttentionReduce, attention_reduce)   \
    X(AttentionDecode, attention_decode)   \
    X(Quantise4bit, quantise_4bit)         \
    X(QuantiseInt8, quantise_int8)         \
    X(Dequantise, dequantise)              \
    X(Product, product)

struct Kernels {
    const char* isa;
#define SMIDGEN_MEMBER(Args, name) void (*name)(const Args& args, int64_t begin, int64_t end);
    SMIDGEN_KERNELS(SMIDGEN_MEMBER)
#undef SMIDGEN_MEMBER
};

extern const Kernels kernels_plain, kernels_avx2, kernels_avx512, kernels_neon;

}  // namespace smidgen
