// y = x W^T for a few rows of x, straight from the packed bytes of W: what generation does for every token. A general
// matrix product would want W as a dense panel first, and is slow on such narrow shapes.
//
// Up to kMost rows of x: a row of W is decoded into registers and multiplied at once. From there on, the same decoded
// numbers are needed more often than there are registers: strips of kStrip numbers of kRows rows are decoded into the
// first-level cache, and tiles of 4 rows of W times kTile rows of x are summed up in registers.

namespace {

using namespace smidgen;

constexpr int kStrip = 256;
constexpr int kRows = 8;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kTile = 6;  // 32 registers
#else
constexpr int kTile = 3;
#endif

// Sum over the lanes, in pairs: the shortest chain.
inline float lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

template <class T>
inline Vec load_some(const T* p, int64_t count) {
    float numbers[kWidth] = {};
    for (int64_t i = 0; i < count; i++) numbers[i] = load_one(p + i);
    return load(numbers);
}

// A W whose rows are plain numbers of type T, times a scale for each row.
template <class T>
struct PlainRows {
    static constexpr int kMost = 8;
    const T* weight;
    const float* scale;  // divided by 127; null: none
    int64_t width;

    float row_scale(int64_t row) const { return scale ? scale[row] / 127.0f : 1.0f; }

    template <int M>
    void dot(int64_t row, const float* x, int64_t x_stride, Vec* sums) const {
        const T* w = weight + row * width;
        Vec parts[M][2]{};  // two chains of sums
        int64_t k = 0;
        for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
            const Vec first = load(w + k), second = load(w + k + kWidth);
            for (int m = 0; m < M; m++) {
                parts[m][0] = fma(first, load(x + m * x_stride + k), parts[m][0]);
                parts[m][1] = fma(second, load(x + m * x_stride + k + kWidth), parts[m][1]);
            }
        }
        for (; k < width; k += kWidth) {
            const int64_t count = width - k < kWidth ? width - k : kWidth;
            const Vec some = load_some(w + k, count);
            for (int m = 0; m < M; m++) parts[m][0] = fma(some, load_some(x + m * x_stride + k, count), parts[m][0]);
        }
        for (int m = 0; m < M; m++) sums[m] = (parts[m][0] + parts[m][1]) * row_scale(row);
    }

    // Numbers k .. k + count of a row; padded by zeros to a whole vector.
    void strip(int64_t row, int64_t k, int64_t count, float* out) const {
        const T* w = weight + row * width + k;
        const float factor = row_scale(row);
        int64_t i = 0;
        for (; i + kWidth <= count; i += kWidth) store(out + i, load(w + i) * factor);
        if (i < count) store(out + i, load_some(w + i, count - i) * factor);
    }
};

// A W in 4-bit blocks, of which a row has a whole number.
struct FourBitRows {
    static constexpr int kMost = 8;
    const FourBit& m;
    Table table;
    int64_t width;

    template <int M>
    void dot(int64_t row, const float* x, int64_t x_stride, Vec* sums) const {
        // AVX-512 scales a table in one instruction. Elsewhere few sums are scaled sooner than all the weights.
        constexpr bool scales_table = kWidth == 16 || M > 3;
        constexpr int chains = M > 4 ? 1 : 2;  // many sums keep the units busy by themselves
        const uint8_t* p = m.packed + row * width / 2;
        int64_t block = row * width / m.blocksize;
        Vec parts[M][chains]{};
        for (int64_t k = 0; k < width; k += m.blocksize, block++) {
            const float scale = block_scale(m, block);
            const Scaled scaled(table, scale);
            Vec unscaled[M][chains]{};
            Vec(&some)[M][chains] = scales_table ? parts : unscaled;
            for (int64_t i = k; i < k + m.blocksize; i += kCodes, p += kCodes / 2) {
                Vec values[kVectors];
                if (scales_table)
                    decode(scaled, p, values);
                else
                    decode(table, p, values);
                for (int r = 0; r < M; r++)
                    for (int v = 0; v < kVectors; v++) {
                        Vec& sum = some[r][v % chains];
                        sum = fma(values[v], load(x + r * x_stride + i + v * kWidth), sum);
                    }
            }
            if (!scales_table)
                for (int r = 0; r < M; r++)
                    for (int c = 0; c < chains; c++) parts[r][c] = fma(unscaled[r][c], broadcast(scale), parts[r][c]);
        }
        for (int r = 0; r < M; r++) sums[r] = parts[r][0] + (chains > 1 ? parts[r][chains - 1] : Vec{});
    }

    void strip(int64_t row, int64_t k, int64_t count, float* out) const {
        for (int64_t i = row * width + k, end = i + count; i < end;) {
            const int64_t block_end = (i / m.blocksize + 1) * m.blocksize, next = block_end < end ? block_end : end;
            const Row<float> values(table, block_scale(m, i / m.blocksize));
            for (; i < next; i += kCodes, out += kCodes) values.write(m.packed + i / 2, out);
        }
    }
};

// sums [4, kSmallRows] += 4 strips of W times T rows of x.
template <int T>
inline void tile(const float* w, const float* x, int64_t x_stride, int64_t count, Vec* sums) {
    Vec acc[4][T];
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < T; t++) acc[r][t] = sums[r * kSmallRows + t];
    int64_t k = 0;
    for (; k + kWidth <= count; k += kWidth) {
        Vec some[T];
        for (int t = 0; t < T; t++) some[t] = load(x + t * x_stride + k);
        for (int r = 0; r < 4; r++) {
            const Vec row = load(w + r * kStrip + k);
            for (int t = 0; t < T; t++) acc[r][t] = fma(row, some[t], acc[r][t]);
        }
    }
    if (k < count)
        for (int t = 0; t < T; t++) {
            const Vec some = load_some(x + t * x_stride + k, count - k);
            for (int r = 0; r < 4; r++) acc[r][t] = fma(load(w + r * kStrip + k), some, acc[r][t]);
        }
    for (int r = 0; r < 4; r++)
        for (int t = 0; t < T; t++) sums[r * kSmallRows + t] = acc[r][t];
}

template <int T>
inline void tile_of(int64_t rows, const float* w, const float* x, int64_t x_stride, int64_t count, Vec* sums) {
    if constexpr (T > 1)
        if (rows < T) return tile_of<T - 1>(rows, w, x, x_stride, count, sums);
    tile<T>(w, x, x_stride, count, sums);
}

// Sums of M rows of x times decoded weights, eight from weight `i` after x on: a sink for the forms of blocks.h.
template <int M>
struct Dot {
    static constexpr int kChains = M > 2 ? 1 : 2;
    const float* x;
    int64_t x_stride;
    Eight parts[M][kChains]{};

    void add(int64_t i, Eight weights) {
        for (int m = 0; m < M; m++) {
            Eight& sum = parts[m][i / 8 % kChains];
            sum = fma_eight(weights, eight_floats(x + m * x_stride + i), sum);
        }
    }
    void scaled(int64_t i, Eight code, float scale) { add(i, code * scale); }
    void shifted(int64_t i, Eight code, float scale, float offset) {
        add(i, fma_eight(code, Eight{} + scale, Eight{} + offset));
    }
    void sums(Vec* out) const {
        for (int m = 0; m < M; m++) {
            const Eight sum = parts[m][0] + (kChains > 1 ? parts[m][kChains - 1] : Eight{});
            float numbers[kWidth > 8 ? kWidth : 8] = {};
            put(numbers, sum);
            out[m] = load(numbers);
            for (int i = kWidth; i < 8; i += kWidth) out[m] += load(numbers + i);
        }
    }
};

// A W in the blocks of a GGUF file: a block is multiplied in registers as it is decoded.
template <class Form>
struct BlockRows {
    static constexpr int kMost = 4;  // there are many forms, and each is compiled for every count
    const Weights& w;
    int64_t width;

    const uint8_t* bytes(int64_t row) const { return (const uint8_t*)w.values + stored_row(w, row) * w.row_bytes; }

    template <int M>
    void dot(int64_t row, const float* x, int64_t x_stride, Vec* sums) const {
        const uint8_t* p = bytes(row);
        Dot<M> dot{x, x_stride};
        for (int64_t k = 0; k < width; k += Form::kElements, p += Form::kBytes, dot.x += Form::kElements) Form::each(p, dot);
        dot.sums(sums);
    }

    void strip(int64_t row, int64_t k, int64_t count, float* out) const { write_blocks<Form>(bytes(row), k, count, out); }
};

// Weights k .. k + count of a row, and zeros up to a whole vector.
inline void padded_strip(const Weights& w, int64_t row, int64_t k, int64_t count, float* out) {
    decode_part(w, row, k, count, out);
    for (; count % kWidth; count++) out[count] = 0;
}

// A W of integers in groups of whole eights, in registers too.
template <int kBits>
struct GroupRows {
    static constexpr int kMost = 4;
    const Weights& w;
    int64_t width;

    template <int M>
    void dot(int64_t row, const float* x, int64_t x_stride, Vec* sums) const {
        const uint8_t *p = (const uint8_t*)w.values + row * w.row_bytes, *zeros = w.zeros + row * w.groups;
        Dot<M> dot{x, x_stride};
        by_weight_type(Type(w.scale_type), [&](auto* tag) {
            const auto* scales = (const Pointee<decltype(tag)>*)w.scale + row * w.groups;
            int64_t k = 0;
            for (int64_t group = 0; group < w.groups; group++) {
                const float scale = load_one(scales + group), zero = (float)zeros[group];
                for (; k < w.ends[group]; k += 8, p += kBits) dot.scaled(k, floats(codes<kBits>(p)) - zero, scale);
            }
        });
        dot.sums(sums);
    }

    void strip(int64_t row, int64_t k, int64_t count, float* out) const { padded_strip(w, row, k, count, out); }
};

inline bool groups_are_eights(const Weights& w) {
    for (int64_t group = 0; group < w.groups; group++)
        if (w.ends[group] % 8) return false;
    return true;
}

// A W of which parts of rows are decoded into memory first.
struct DecodedRows {
    static constexpr int kMost = 8;
    const Weights& w;
    int64_t width;

    template <int M>
    void dot(int64_t row, const float* x, int64_t x_stride, Vec* sums) const {
        alignas(64) float part[kStrip];
        Vec parts[M][2]{};
        for (int64_t start = 0; start < width; start += kStrip) {
            const int64_t count = width - start < kStrip ? width - start : kStrip;
            strip(row, start, count, part);
            int64_t k = 0;
            for (; k + kWidth <= count; k += kWidth) {
                const Vec some = load(part + k);
                for (int m = 0; m < M; m++) {
                    Vec& sum = parts[m][k / kWidth % 2];
                    sum = fma(some, load(x + m * x_stride + start + k), sum);
                }
            }
            if (k < count)
                for (int m = 0; m < M; m++)
                    parts[m][0] = fma(load(part + k), load_some(x + m * x_stride + start + k, count - k), parts[m][0]);
        }
        for (int m = 0; m < M; m++) sums[m] = parts[m][0] + parts[m][1];
    }

    void strip(int64_t row, int64_t k, int64_t count, float* out) const { padded_strip(w, row, k, count, out); }
};

template <class Rows>
inline void tiled(const Rows& weight, const Product& a, int64_t begin, int64_t end) {
    alignas(64) float strips[kRows * kStrip] = {};
    const int64_t tiles = (a.rows + kTile - 1) / kTile, height = (a.rows + tiles - 1) / tiles;  // tiles of like height
    for (int64_t first = begin; first < end; first += kRows) {
        const int64_t rows = end - first < kRows ? end - first : kRows;
        Vec sums[kRows * kSmallRows]{};
        for (int64_t k = 0; k < a.width; k += kStrip) {
            const int64_t count = a.width - k < kStrip ? a.width - k : kStrip;
            for (int64_t r = 0; r < rows; r++) weight.strip(first + r, k, count, strips + r * kStrip);
            for (int64_t r = 0; r < rows; r += 4)
                for (int64_t m = 0; m < a.rows; m += height)
                    tile_of<kTile>(a.rows - m < height ? a.rows - m : height, strips + r * kStrip,
                                   a.x + m * a.x_stride + k, a.x_stride, count, sums + r * kSmallRows + m);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t m = 0; m < a.rows; m++) a.y[m * a.y_stride + first + r] = lanes(sums[r * kSmallRows + m]);
    }
}

template <int M, class Rows>
inline void direct(const Rows& weight, const Product& a, int64_t begin, int64_t end) {
    if constexpr (M < Rows::kMost)
        if (a.rows > M) return direct<M + 1>(weight, a, begin, end);
    for (int64_t row = begin; row < end; row++) {
        Vec sums[M];
        weight.template dot<M>(row, a.x, a.x_stride, sums);
        for (int m = 0; m < M; m++) a.y[m * a.y_stride + row] = lanes(sums[m]);
    }
}

template <class Rows>
inline void product_of(const Rows& weight, const Product& a, int64_t begin, int64_t end) {
    if (a.rows <= Rows::kMost)
        direct<1>(weight, a, begin, end);
    else
        tiled(weight, a, begin, end);
}

void product(const Product& a, int64_t begin, int64_t end) {
    const Weights& w = a.weights;
    if (w.form == Weights::kFourBit)
        return product_of(FourBitRows{w.four_bit, Table(w.four_bit.code), a.width}, a, begin, end);
    if (w.form == Weights::kInt8)
        return product_of(PlainRows<int8_t>{(const int8_t*)w.values, (const float*)w.scale, a.width}, a, begin, end);
    if (w.form == Weights::kBlocks &&
        by_block_form(w.type, [&](auto form) { product_of(BlockRows<decltype(form)>{w, a.width}, a, begin, end); }))
        return;
    if (w.form == Weights::kGroups && groups_are_eights(w))
        return by_bits(w.type, [&](auto bits) { product_of(GroupRows<decltype(bits)::value>{w, a.width}, a, begin, end); });
    if (w.form != Weights::kDense) return product_of(DecodedRows{w, a.width}, a, begin, end);
    by_weight_type(Type(w.type), [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        product_of(PlainRows<T>{(const T*)w.values, nullptr, a.width}, a, begin, end);
    });
}

}  // namespace
