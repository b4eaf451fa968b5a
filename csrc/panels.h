// Products with packed weights for many rows: BLAS on panels that stay in the cache of the thread that made them. Long rows
// are taken in slices. Backwards threads share out the columns of W, or where these are few the rows of x, for which each
// de-quantises all of W.
// Measured against one large panel that all threads make and multiply together: 8 to 15 % faster for rows of 576 to 1536
// weights, equal for longer ones.

namespace {

using namespace smidgen;

// Weights [begin, end) of the rows [first, last) of W [n, k] into out, row after row. begin: a multiple of 256, the longest
// block. Forms that write float32 alone take a row at a time to another type.
template <class T>
inline void decode(const Weights& w, int64_t k, int64_t first, int64_t last, int64_t begin, int64_t end, T* out) {
    const int64_t count = end - begin;
    if (w.form == Weights::kFourBit && count == k) return dequantise_4bit(w.four_bit, first * k, last * k, out);
    float* numbers_of_row = sizeof(T) == sizeof(float) ? nullptr : worker_scratch(1, count);
    for (int64_t row = first; row < last; row++, out += count) {
        const int64_t start = row * k + begin;
        if (w.form == Weights::kFourBit) {
            dequantise_4bit(w.four_bit, start, start + count, out);
            continue;
        }
        if (w.form == Weights::kInt8) {
            dequantise_int8((const int8_t*)w.values + start, (const float*)w.scale + row, 1, count, out);
            continue;
        }
        float* to = numbers_of_row ? numbers_of_row : (float*)out;
        if (w.form == Weights::kDense)
            by_weight_type(Type(w.type), [&](auto* tag) { numbers<Pointee<decltype(tag)>>(w.values, start, count, to); });
        else
            decode_part(w, row, begin, count, to);
        if (!numbers_of_row) continue;
        int64_t j = 0;
        for (; j + kWidth <= count; j += kWidth) store(out + j, load(to + j));
        for (; j < count; j++) store_one(out + j, to[j]);
    }
}

void dequantise(const Dequantise& a, int64_t begin, int64_t end) {
    by_type(a.out_type, [&](auto* tag) {
        auto* out = (Pointee<decltype(tag)>*)a.out + begin * a.k;
        decode(a.weights, a.k, a.first + begin, a.first + end, 0, a.k, out);
    });
}

void panel_product(const PanelProduct& a, int64_t task, int64_t end_task) {
    for (; task < end_task; task++) {
        const int64_t first = task * a.step, last = first + a.step < a.n ? first + a.step : a.n;
        float* panel = worker_scratch(0, a.step * a.slice);
        for (int64_t begin = 0; begin < a.k; begin += a.slice) {
            const int64_t end = begin + a.slice < a.k ? begin + a.slice : a.k;
            decode(a.weights, a.k, first, last, begin, end, panel);
            product_nt(a.sgemm, a.m, last - first, end - begin, 1.0f, a.x + begin, a.x_stride, panel, end - begin,
                       begin > 0 ? 1.0f : 0.0f, a.y + first, a.y_stride);
        }
        if (const LowRank* l = a.adapter)
            product_nt(a.sgemm, a.m, last - first, l->rank, l->scaling, l->low, l->low_stride, l->b + first * l->rank,
                       l->rank, 1.0f, a.y + first, a.y_stride);
    }
}

void panel_product_t(const PanelProduct& a, int64_t task, int64_t end_task) {
    for (; task < end_task; task++) {
        const int64_t shares = (a.k + a.columns - 1) / a.columns;
        const int64_t top = task / shares * a.step, left = task % shares * a.columns;
        const int64_t right = left + a.columns < a.k ? left + a.columns : a.k;
        const int64_t rows = a.m - top < a.step ? a.m - top : a.step;
        const float* x = a.x + top * a.x_stride;
        float* y = a.y + top * a.y_stride;
        const LowRank* l = a.adapter;
        float* panel = worker_scratch(0, a.panel * a.slice);
        for (int64_t begin = left; begin < right; begin += a.slice) {
            const int64_t end = begin + a.slice < right ? begin + a.slice : right;
            for (int64_t first = 0; first < a.n; first += a.panel) {
                const int64_t last = first + a.panel < a.n ? first + a.panel : a.n;
                decode(a.weights, a.k, first, last, begin, end, panel);
                product_nn(a.sgemm, rows, end - begin, last - first, 1.0f, x + first, a.x_stride, panel, end - begin,
                           first > 0 || a.accumulate ? 1.0f : 0.0f, y + begin, a.y_stride);
                if (!l || begin > 0) continue;
                product_nn(a.sgemm, rows, l->rank, last - first, l->scaling, x + first, a.x_stride, l->b + first * l->rank,
                           l->rank, first > 0 ? 1.0f : 0.0f, l->grad_low + top * l->low_stride, l->low_stride);
                product_tn(a.sgemm, l->rank, last - first, rows, l->scaling, l->low + top * l->low_stride, l->low_stride,
                           x + first, a.x_stride, 0.0f, l->grad_b + task * l->rank * a.n + first, a.n);
            }
            if (l)
                product_nn(a.sgemm, rows, end - begin, l->rank, 1.0f, l->grad_low + top * l->low_stride, l->low_stride,
                           l->a + begin, a.k, 1.0f, y + begin, a.y_stride);
        }
    }
}

}  // namespace
