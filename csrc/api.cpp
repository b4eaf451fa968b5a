// The C interface: what Python calls. It picks the instruction set once, and shares the tasks out over the threads of
// the program's own OpenMP runtime (PyTorch's), which is handed in as a function, so that there is one thread pool.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#define API extern "C" __attribute__((visibility("default")))

namespace smidgen {
namespace {

// The entry point by which every OpenMP runtime (libgomp, libomp) runs a function on all threads of a team.
using RunTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

RunTeam run_team = nullptr;
Sgemm sgemm = nullptr;

const Kernels* best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &kernels_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &kernels_avx2;
#elif defined(__aarch64__)
    return &kernels_neon;
#endif
    return &kernels_plain;
}

const Kernels* kernels = best();

template <class Args>
struct Job {
    void (*kernel)(const Args&, int64_t, int64_t);
    const Args* args;
    int64_t count, grain;
    std::atomic<int64_t> next{0};

    static void work(void* data) {
        Job& job = *static_cast<Job*>(data);
        for (;;) {
            const int64_t begin = job.next.fetch_add(job.grain, std::memory_order_relaxed);
            if (begin >= job.count) return;
            const int64_t end = begin + job.grain < job.count ? begin + job.grain : job.count;
            job.kernel(*job.args, begin, end);
        }
    }
};

// Runs tasks 0 .. count, `grain` at a time, each by whichever thread is free. Results do not depend on who runs what.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t count, int64_t grain) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    if (!run_team || count <= grain) return kernel(args, 0, count);
    Job<Args> job{kernel, &args, count, grain};
    run_team(Job<Args>::work, &job, 0, 0);  // 0 threads: as many as the caller's OpenMP setting says
}

// As many rows as make about 32 KiB of floats: small enough to share out, large enough to be worth it.
int64_t rows_per_task(int64_t width) { return width > 0 ? (8192 + width - 1) / width : 1; }

// Rows of W that make one task of a small product: a multiple of the 8 that are multiplied together.
int64_t product_rows(int64_t width) { return width > 0 ? (16384 / width + 8) / 8 * 8 : 8; }

struct Buffer {
    float* memory = nullptr;
    size_t floats = 0;
    ~Buffer() { std::free(memory); }
};
thread_local Buffer buffers[4];

}  // namespace

float* worker_scratch(int slot, size_t floats) {
    Buffer& buffer = buffers[slot];
    if (buffer.floats < floats) {
        std::free(buffer.memory);
        buffer.floats = floats;
        buffer.memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
        if (!buffer.memory) {
            std::fprintf(stderr, "smidgen: out of memory: %zu bytes for a thread's scratch\n", floats * sizeof(float));
            std::abort();
        }
    }
    return buffer.memory;
}

// ---- set up

API int smidgen_interface() { return 9; }  // raised with every change of a signature below

API const char* smidgen_isa() { return kernels->isa; }

// 1 if this machine has the instruction set ('plain', 'avx2', 'avx512', 'neon') and it is used from now on.
API int smidgen_use_isa(const char* name) {
    const Kernels* candidates[] = {
        &kernels_plain,
#if defined(__x86_64__)
        &kernels_avx2,
        &kernels_avx512,
#elif defined(__aarch64__)
        &kernels_neon,
#endif
    };
    const Kernels* top = best();
    for (const Kernels* candidate : candidates) {
        if (!std::strcmp(candidate->isa, name)) {
            kernels = candidate;
            return 1;
        }
        if (candidate == top) break;  // what follows is more than this machine has
    }
    return 0;
}

API void smidgen_use_threads(RunTeam team) { run_team = team; }

API void smidgen_use_sgemm(Sgemm function) { sgemm = function; }

// ---- elementwise

API void smidgen_rms_norm(const void* x, const float* weight, void* y, float* rstd, int64_t rows, int64_t width,
                          float eps, int type) {
    run(kernels->rms_norm, {x, weight, y, rstd, width, eps, Type(type)}, rows, rows_per_task(width));
}

API void smidgen_rms_norm_backward(const void* grad_y, const void* x, const float* weight, const float* rstd,
                                   const void* residual, void* grad_x, int64_t rows, int64_t width, int type) {
    run(kernels->rms_norm_backward, {grad_y, x, weight, rstd, residual, grad_x, width, Type(type)}, rows,
        rows_per_task(width));
}

API void smidgen_rotate(void* x, const float* cosine, const float* sine, int64_t rows, int64_t heads, int64_t head_dim,
                        int64_t rotary_dim, int64_t x_stride, float sign, int type) {
    run(kernels->rotate, {x, cosine, sine, heads, head_dim, rotary_dim, x_stride, sign, Type(type)}, rows,
        rows_per_task(heads * head_dim));
}

API void smidgen_swiglu(const void* gate_up, void* y, int64_t rows, int64_t width, int type) {
    run(kernels->swiglu, {gate_up, y, width, Type(type)}, rows, rows_per_task(2 * width));
}

API void smidgen_swiglu_backward(const void* grad_y, const void* gate_up, void* grad_gate_up, void* y, int64_t rows,
                                 int64_t width, int type) {
    run(kernels->swiglu_backward, {grad_y, gate_up, grad_gate_up, y, width, Type(type)}, rows,
        rows_per_task(2 * width));
}

API void smidgen_cross_entropy(void* logits, const int64_t* targets, float* loss, int64_t rows, int64_t width,
                               int backward, int type) {
    run(kernels->cross_entropy, {logits, targets, loss, width, backward, Type(type)}, rows, 1);
}

// ---- attention

API int smidgen_has_threads() { return run_team != nullptr; }

API int smidgen_has_sgemm() { return sgemm != nullptr; }

API void smidgen_attention(const float* q, const float* k, const float* v, float* out, float* lse,
                           const int64_t* starts, const int64_t* prefixes, const int64_t* blocks, int64_t num_blocks,
                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t stride,
                           int64_t out_stride, int64_t window, float scale) {
    run(kernels->attention,
        {q, k, v, out, lse, starts, prefixes, blocks, tokens, heads, kv_heads, head_dim, stride, out_stride, window,
         scale, sgemm},
        num_blocks * kv_heads, 1);
}

// grad_q, grad_k and grad_v have q's stride; partial_k and partial_v are scratch memory of as many times
// kv_heads * tokens * head_dim floats as the group with the most parts has parts. group_starts: of the groups' tokens.
API void smidgen_attention_backward(const float* q, const float* k, const float* v, const float* out,
                                    const float* grad_out, const float* lse, float* grad_q, float* grad_k,
                                    float* grad_v, float* partial_k, float* partial_v, const int64_t* starts,
                                    const int64_t* prefixes, const int64_t* groups, const int64_t* group_starts,
                                    const int64_t* parts, const int64_t* parts_of_group, int64_t num_groups,
                                    int64_t num_parts, int64_t tokens, int64_t heads, int64_t kv_heads,
                                    int64_t head_dim, int64_t stride, int64_t out_stride, int64_t window, float scale) {
    const Attention forward{q, k, v, const_cast<float*>(out), const_cast<float*>(lse), starts, prefixes, nullptr,
                            tokens, heads, kv_heads, head_dim, stride, out_stride, window, scale, sgemm};
    run(kernels->attention_backward, {forward, grad_out, grad_q, partial_k, partial_v, groups, parts},
        num_parts * kv_heads, 1);
    run(kernels->attention_reduce,
        {partial_k, partial_v, grad_k, grad_v, group_starts, parts_of_group, tokens, kv_heads, head_dim, stride},
        num_groups * kv_heads, 1);
}

API void smidgen_attention_decode(const float* q, const float* k, const float* v, void* keys, void* values,
                                  const int64_t* lengths, float* out, int64_t rows, int64_t heads, int64_t kv_heads,
                                  int64_t head_dim, int64_t capacity, int64_t stride, int64_t out_stride,
                                  int64_t window, float scale, int type) {
    run(kernels->attention_decode,
        {q, k, v, keys, values, lengths, out, heads, kv_heads, head_dim, capacity, stride, out_stride, window, scale,
         Type(type)},
        rows * kv_heads, 1);
}

// ---- packed weights

API void smidgen_quantise_4bit(const void* weight, const float* midpoints, const int32_t* codes, uint8_t* packed,
                               float* absmax, int64_t count, int64_t blocksize, int type) {
    const int64_t task = blocksize > 16384 ? blocksize : 16384;
    run(kernels->quantise_4bit, {weight, midpoints, codes, packed, absmax, count, blocksize, task, Type(type)},
        (count + task - 1) / task, 1);
}

API void smidgen_quantise_int8(const void* weight, int8_t* codes, float* scale, int64_t rows, int64_t width, int type) {
    run(kernels->quantise_int8, {weight, codes, scale, width, Type(type)}, rows, rows_per_task(width));
}

// Rows first .. last of W [n, k] into out, float32 or bfloat16.
API void smidgen_dequantise(const Weights* weights, int64_t k, int64_t first, int64_t last, void* out, int type) {
    run(kernels->dequantise, {*weights, k, first, out, Type(type)}, last - first, rows_per_task(k));
}

// y [rows, out_features] = x [rows, width] W^T for up to kSmallRows rows
API void smidgen_product(const Weights* weights, const float* x, float* y, int64_t rows, int64_t out_features,
                         int64_t width, int64_t x_stride, int64_t y_stride) {
    if (rows <= 0) return;
    run(kernels->product, {*weights, x, y, rows, width, x_stride, y_stride}, out_features, product_rows(width));
}

// Both need sgemm. backward 0: y [m, n] = x [m, k] W^T; else y [m, k] = x [m, n] W, added to y if `accumulate`.
// adapter: null, or what is added to W.
API void smidgen_panel_product(const Weights* weights, const LowRank* adapter, const float* x, float* y, int64_t m,
                               int64_t n, int64_t k, int64_t x_stride, int64_t y_stride, int64_t step, int64_t panel,
                               int64_t slice, int64_t columns, int backward, int accumulate) {
    if (m <= 0 || n <= 0 || k <= 0) return;
    const PanelProduct args{*weights, adapter, x,     y,     m,       n,          k,    x_stride,
                            y_stride, step,    panel, slice, columns, accumulate, sgemm};
    const int64_t tasks = backward ? ((m + step - 1) / step) * ((k + columns - 1) / columns) : (n + step - 1) / step;
    run(backward ? kernels->panel_product_t : kernels->panel_product, args, tasks, 1);
}

}  // namespace smidgen
