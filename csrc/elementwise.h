// What surrounds the matrix products of a decoder layer, each in one pass over its rows. Computed in float32, rounded
// once. Sums run over kWidth partial sums, so they differ from other orders by float32's rounding.

namespace {

using namespace smidgen;

template <class Pointer>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
    using Type = T;
};
template <class Pointer>
using Pointee = typename PointeeOf<Pointer>::Type;

// Calls fn with a null pointer to the type of the activations, so that its body is compiled for each.
template <class Fn>
inline void by_type(Type type, Fn fn) {
    if (type == kBfloat16)
        fn((Bfloat16*)nullptr);
    else
        fn((float*)nullptr);
}

void rms_norm(const RmsNorm& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            const T* x = (const T*)a.x + row * a.width;
            T* y = (T*)a.y + row * a.width;
            Vec squares{};
            for (int64_t i = 0; i < whole; i += kWidth) {
                const Vec v = load(x + i);
                squares = fma(v, v, squares);
            }
            float total = sum(squares);
            for (int64_t i = whole; i < a.width; i++) total += load_one(x + i) * load_one(x + i);
            const float rstd = 1.0f / __builtin_sqrtf(total / (float)a.width + a.eps);
            a.rstd[row] = rstd;
            for (int64_t i = 0; i < whole; i += kWidth) store(y + i, load(x + i) * rstd * load(a.weight + i));
            for (int64_t i = whole; i < a.width; i++) store_one(y + i, load_one(x + i) * rstd * a.weight[i]);
        }
    });
}

// With n = x rstd and h = grad_y weight: grad_x = rstd (h - n mean(h n)).
void rms_norm_backward(const RmsNormBackward& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            const T* g = (const T*)a.grad_y + row * a.width;
            const T* x = (const T*)a.x + row * a.width;
            const T* residual = a.residual ? (const T*)a.residual + row * a.width : nullptr;
            T* out = (T*)a.grad_x + row * a.width;
            const float rstd = a.rstd[row];
            Vec products{};
            for (int64_t i = 0; i < whole; i += kWidth)
                products = fma(load(g + i) * load(a.weight + i), load(x + i), products);
            float total = sum(products);
            for (int64_t i = whole; i < a.width; i++) total += load_one(g + i) * a.weight[i] * load_one(x + i);
            const float shift = -total * rstd * rstd * rstd / (float)a.width;
            for (int64_t i = 0; i < whole; i += kWidth) {
                Vec value = fma(load(x + i), broadcast(shift), load(g + i) * load(a.weight + i) * rstd);
                if (residual) value += load(residual + i);
                store(out + i, value);
            }
            for (int64_t i = whole; i < a.width; i++) {
                float value = load_one(x + i) * shift + load_one(g + i) * a.weight[i] * rstd;
                if (residual) value += load_one(residual + i);
                store_one(out + i, value);
            }
        }
    });
}

void rotate(const Rotate& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t half = a.rotary_dim / 2, whole = half / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            const float* cosine = a.cosine + row * half;
            const float* sine = a.sine + row * half;
            for (int64_t head = 0; head < a.heads; head++) {
                T* low = (T*)a.x + row * a.x_stride + head * a.head_dim;
                T* high = low + half;
                for (int64_t i = 0; i < whole; i += kWidth) {
                    const Vec c = load(cosine + i), s = load(sine + i) * a.sign, p = load(low + i), q = load(high + i);
                    store(low + i, p * c - q * s);
                    store(high + i, q * c + p * s);
                }
                for (int64_t i = whole; i < half; i++) {
                    const float c = cosine[i], s = sine[i] * a.sign, p = load_one(low + i), q = load_one(high + i);
                    store_one(low + i, p * c - q * s);
                    store_one(high + i, q * c + p * s);
                }
            }
        }
    });
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

void swiglu(const SwiGlu& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            const T* gate = (const T*)a.gate_up + row * 2 * a.width;
            const T* up = gate + a.width;
            T* y = (T*)a.y + row * a.width;
            for (int64_t i = 0; i < whole; i += kWidth) {
                const Vec g = load(gate + i);
                store(y + i, g * sigmoid(g) * load(up + i));
            }
            for (int64_t i = whole; i < a.width; i++) {
                const float g = load_one(gate + i);
                store_one(y + i, g * sigmoid(broadcast(g))[0] * load_one(up + i));
            }
        }
    });
}

// silu(g)' = s (1 + g (1 - s)) with s = sigmoid(g).
void swiglu_backward(const SwiGluBackward& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            const T* grad_y = (const T*)a.grad_y + row * a.width;
            const T* gate = (const T*)a.gate_up + row * 2 * a.width;
            const T* up = gate + a.width;
            T* grad_gate = (T*)a.grad_gate_up + row * 2 * a.width;
            T* grad_up = grad_gate + a.width;
            T* y = (T*)a.y + row * a.width;
            const auto step = [&](Vec d, Vec g, Vec u, Vec& dg, Vec& du, Vec& value) {
                const Vec s = sigmoid(g), silu = g * s;
                dg = d * u * (s + silu * (1.0f - s));
                du = d * silu;
                value = silu * u;
            };
            Vec dg, du, value;
            for (int64_t i = 0; i < whole; i += kWidth) {
                step(load(grad_y + i), load(gate + i), load(up + i), dg, du, value);
                store(grad_gate + i, dg);
                store(grad_up + i, du);
                store(y + i, value);
            }
            for (int64_t i = whole; i < a.width; i++) {
                step(broadcast(load_one(grad_y + i)), broadcast(load_one(gate + i)), broadcast(load_one(up + i)), dg, du,
                     value);
                store_one(grad_gate + i, dg[0]);
                store_one(grad_up + i, du[0]);
                store_one(y + i, value[0]);
            }
        }
    });
}

void cross_entropy(const CrossEntropy& a, int64_t begin, int64_t end) {
    by_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        for (int64_t row = begin; row < end; row++) {
            T* logits = (T*)a.logits + row * a.width;
            Vec tops = broadcast(-__builtin_inff());
            for (int64_t i = 0; i < whole; i += kWidth) tops = max(load(logits + i), tops);
            float top = largest(tops);
            for (int64_t i = whole; i < a.width; i++) top = load_one(logits + i) > top ? load_one(logits + i) : top;
            // A thousand at a time: one float32 sum over a large vocabulary would lose digits.
            double total = 0;
            for (int64_t start = 0; start < whole; start += 1024) {
                Vec part{};
                const int64_t stop = start + 1024 < whole ? start + 1024 : whole;
                for (int64_t i = start; i < stop; i += kWidth) part += exp(load(logits + i) - top);
                total += sum(part);
            }
            for (int64_t i = whole; i < a.width; i++) total += exp_one(load_one(logits + i) - top);
            const int64_t target = a.targets[row];
            const float lse = top + (float)__builtin_log(total);
            a.loss[row] = lse - load_one(logits + target);
            if (!a.backward) continue;
            const float at_target = exp_one(load_one(logits + target) - lse) - 1.0f;  // rounded once, at the end
            for (int64_t i = 0; i < whole; i += kWidth) store(logits + i, exp(load(logits + i) - lse));
            for (int64_t i = whole; i < a.width; i++) store_one(logits + i, exp_one(load_one(logits + i) - lse));
            store_one(logits + target, at_target);
        }
    });
}

}  // namespace
