// Weights as the blocks of a GGUF file, and as integers in groups (GPTQ, AWQ): rows -> float32.
//
// Layouts: ggml's block structures (ggml-common.h names them block_q4_0 and so on), little-endian, scales as float16.
// Products and sums are rounded in the order of the gguf package's reference, so that the values are the same bit for bit.
// Everything is done eight weights at a time, whatever the instruction set: blocks are made of eights.

namespace {

using namespace smidgen;

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInt __attribute__((vector_size(32)));
typedef uint32_t EightUint __attribute__((vector_size(32)));
typedef uint8_t EightBytes __attribute__((vector_size(8)));
typedef int8_t EightSigned __attribute__((vector_size(8)));

constexpr EightUint kOnes = {0, 1, 2, 3, 4, 5, 6, 7};

inline EightInt eight(const uint8_t* p) {
#if defined(__AVX2__)
    return (EightInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    EightBytes bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, EightInt);
#endif
}
inline EightInt eight_signed(const uint8_t* p) {
#if defined(__AVX2__)
    return (EightInt)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    EightSigned bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, EightInt);
#endif
}
inline Eight floats(EightInt v) { return __builtin_convertvector(v, Eight); }
inline Eight eight_floats(const float* p) {
    Eight v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Eight fma_eight(Eight a, Eight b, Eight c) {
#if defined(__AVX2__)
    return (Eight)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
inline void put(float* out, Eight v) { __builtin_memcpy(out, &v, sizeof v); }
// Bits `at` .. at + 7 of a word, one in each lane.
inline EightInt bits(uint32_t word, int at) { return (EightInt)((((EightUint){} + (word >> at)) >> kOnes) & 1u); }

inline float half_at(const uint8_t* p) {
    Float16 value;
    __builtin_memcpy(&value, p, sizeof value);
    return load_one(&value);
}
inline uint32_t word_at(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}

// What becomes of decoded weights: codes times a scale, with an offset added or not, eight from weight `i` of a block on.
struct Writer {
    float* out;
    void scaled(int i, Eight code, float scale) { put(out + i, code * scale); }
    void shifted(int i, Eight code, float scale, float offset) { put(out + i, code * scale + offset); }
};

// ---- blocks of 32: bytes hold weight j in the low and weight j + 16 in the high four bits

struct Q4_0 {
    static constexpr int kElements = 32, kBytes = 18;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p);
        for (int j = 0; j < 16; j += 8) {
            const EightInt codes = eight(p + 2 + j);
            sink.scaled(j, floats((codes & 15) - 8), d);
            sink.scaled(j + 16, floats((codes >> 4) - 8), d);
        }
    }
};

struct Q4_1 {
    static constexpr int kElements = 32, kBytes = 20;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p), m = half_at(p + 2);
        for (int j = 0; j < 16; j += 8) {
            const EightInt codes = eight(p + 4 + j);
            sink.shifted(j, floats(codes & 15), d, m);
            sink.shifted(j + 16, floats(codes >> 4), d, m);
        }
    }
};

struct Q5_0 {
    static constexpr int kElements = 32, kBytes = 22;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p);
        const uint32_t high = word_at(p + 2);
        for (int j = 0; j < 16; j += 8) {
            const EightInt codes = eight(p + 6 + j);
            sink.scaled(j, floats(((codes & 15) | bits(high, j) << 4) - 16), d);
            sink.scaled(j + 16, floats(((codes >> 4) | bits(high, j + 16) << 4) - 16), d);
        }
    }
};

struct Q5_1 {
    static constexpr int kElements = 32, kBytes = 24;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p), m = half_at(p + 2);
        const uint32_t high = word_at(p + 4);
        for (int j = 0; j < 16; j += 8) {
            const EightInt codes = eight(p + 8 + j);
            sink.shifted(j, floats((codes & 15) | bits(high, j) << 4), d, m);
            sink.shifted(j + 16, floats((codes >> 4) | bits(high, j + 16) << 4), d, m);
        }
    }
};

struct Q8_0 {
    static constexpr int kElements = 32, kBytes = 34;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p);
        for (int j = 0; j < 32; j += 8) sink.scaled(j, floats(eight_signed(p + 2 + j)), d);
    }
};

// ---- blocks of 256 with scales of their own for every 16 or 32 weights

struct Q2_K {
    static constexpr int kElements = 256, kBytes = 84;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const uint8_t *scales = p, *codes = p + 16;
        const float d = half_at(p + 80), dmin = half_at(p + 82);
        for (int i = 0; i < 256; i += 16) {
            const float scale = d * (float)(scales[i / 16] & 15), least = dmin * (float)(scales[i / 16] >> 4);
            const uint8_t* from = codes + i / 128 * 32 + i % 32;
            const int shift = i % 128 / 32 * 2;
            for (int j = 0; j < 16; j += 8) sink.shifted(i + j, floats(eight(from + j) >> shift & 3), scale, -least);
        }
    }
};

struct Q3_K {
    static constexpr int kElements = 256, kBytes = 110;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const uint8_t *high = p, *codes = p + 32, *scales = p + 96;
        const float d = half_at(p + 108);
        for (int i = 0; i < 256; i += 16) {
            const int n = i / 16;
            const int low = n < 8 ? scales[n] & 15 : scales[n - 8] >> 4;
            const float scale = d * (float)((low | (scales[8 + n % 4] >> n / 4 * 2 & 3) << 4) - 32);
            const uint8_t* from = codes + i / 128 * 32 + i % 32;
            const int shift = i % 128 / 32 * 2, bit = i / 32;
            for (int j = 0; j < 16; j += 8) {
                const EightInt below = ((eight(high + i % 32 + j) >> bit & 1) ^ 1) << 2;  // a missing bit takes 4 away
                sink.scaled(i + j, floats((eight(from + j) >> shift & 3) - below), scale);
            }
        }
    }
};

// The 6-bit scale and minimum number n of Q4_K and Q5_K.
inline void scale_and_least(const uint8_t* s, int n, float& scale, float& least) {
    const int a = n < 4 ? s[n] & 63 : (s[n + 4] & 15) | s[n - 4] >> 6 << 4;
    const int b = n < 4 ? s[n + 4] & 63 : s[n + 4] >> 4 | s[n] >> 6 << 4;
    scale *= (float)a;
    least *= (float)b;
}

struct Q4_K {
    static constexpr int kElements = 256, kBytes = 144;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        for (int n = 0; n < 8; n++) {
            float scale = half_at(p), least = half_at(p + 2);
            scale_and_least(p + 4, n, scale, least);
            const uint8_t* from = p + 16 + n / 2 * 32;
            for (int j = 0; j < 32; j += 8)
                sink.shifted(n * 32 + j, floats(eight(from + j) >> n % 2 * 4 & 15), scale, -least);
        }
    }
};

struct Q5_K {
    static constexpr int kElements = 256, kBytes = 176;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        for (int n = 0; n < 8; n++) {
            float scale = half_at(p), least = half_at(p + 2);
            scale_and_least(p + 4, n, scale, least);
            const uint8_t *high = p + 16, *from = p + 48 + n / 2 * 32;
            for (int j = 0; j < 32; j += 8) {
                const EightInt code = (eight(from + j) >> n % 2 * 4 & 15) | (eight(high + j) >> n & 1) << 4;
                sink.shifted(n * 32 + j, floats(code), scale, -least);
            }
        }
    }
};

struct Q6_K {
    static constexpr int kElements = 256, kBytes = 210;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const uint8_t *low = p, *high = p + 128, *scales = p + 192;
        const float d = half_at(p + 208);
        for (int i = 0; i < 256; i += 16) {
            const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
            const float scale = d * (float)(int8_t)scales[i / 16];
            const uint8_t* from = low + half * 64 + quarter % 2 * 32 + l;
            for (int j = 0; j < 16; j += 8) {
                const EightInt code = (eight(from + j) >> quarter / 2 * 4 & 15) |
                                      (eight(high + half * 32 + l + j) >> quarter * 2 & 3) << 4;
                sink.scaled(i + j, floats(code - 32), scale);
            }
        }
    }
};

// Calls fn with the block form of a ggml type; false for numbers, which have none.
template <class Fn>
inline bool by_block_form(int64_t type, Fn fn) {
    switch (type) {
        case 2: fn(Q4_0{}); return true;
        case 3: fn(Q4_1{}); return true;
        case 6: fn(Q5_0{}); return true;
        case 7: fn(Q5_1{}); return true;
        case 8: fn(Q8_0{}); return true;
        case 10: fn(Q2_K{}); return true;
        case 11: fn(Q3_K{}); return true;
        case 12: fn(Q4_K{}); return true;
        case 13: fn(Q5_K{}); return true;
        case 14: fn(Q6_K{}); return true;
    }
    return false;
}

// Weights k .. k + count of a row of blocks; k and count are multiples of the block's length.
template <class Form>
inline void write_blocks(const uint8_t* row, int64_t k, int64_t count, float* out) {
    row += k / Form::kElements * Form::kBytes;
    for (int64_t i = 0; i < count; i += Form::kElements, row += Form::kBytes) {
        Writer writer{out + i};
        Form::each(row, writer);
    }
}

template <class T>
inline void numbers(const void* row, int64_t k, int64_t count, float* out) {
    const T* from = (const T*)row + k;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(out + i, load(from + i));
    for (; i < count; i++) out[i] = load_one(from + i);
}

// Weights k .. k + count of a row of a ggml type, as write_blocks.
inline void decode_blocks(int64_t type, const uint8_t* row, int64_t k, int64_t count, float* out) {
    if (by_block_form(type, [&](auto form) { write_blocks<decltype(form)>(row, k, count, out); })) return;
    if (type == 0) numbers<float>(row, k, count, out);
    if (type == 1) numbers<Float16>(row, k, count, out);
    if (type == 30) numbers<Bfloat16>(row, k, count, out);
}

// ---- integers in groups

// Eight codes of kBits bits each, from the least significant bit of the first byte on.
template <int kBits>
inline EightInt codes(const uint8_t* p) {
    if constexpr (kBits == 8) return eight(p);
    uint32_t word = 0;
    __builtin_memcpy(&word, p, kBits);
    return (EightInt)(((EightUint){} + word) >> kOnes * kBits & ((1u << kBits) - 1));
}

template <int kBits>
inline void unpack(const uint8_t* row, int64_t k, int64_t count, float* out) {
    row += k / 8 * kBits;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8, row += kBits) put(out + i, floats(codes<kBits>(row)));
    if (i < count) {
        const Eight last = floats(codes<kBits>(row));  // rows are padded to whole eights
        for (int64_t j = 0; i < count; i++, j++) out[i] = last[j];
    }
}

// Weights k .. k + count of a row, k a multiple of 8: (code - zero) * scale, with scale and zero of the weight's group.
inline void decode_groups(const Weights& w, int64_t row, int64_t k, int64_t count, float* out) {
    const uint8_t* packed = (const uint8_t*)w.values + row * w.row_bytes;
    switch (w.type) {
        case 2: unpack<2>(packed, k, count, out); break;
        case 3: unpack<3>(packed, k, count, out); break;
        case 4: unpack<4>(packed, k, count, out); break;
        case 8: unpack<8>(packed, k, count, out); break;
    }
    int64_t group = 0;
    for (int64_t above = w.groups - 1; group < above;) {  // the first group that ends after k
        const int64_t middle = (group + above) / 2;
        if (w.ends[middle] > k) above = middle;
        else group = middle + 1;
    }
    by_weight_type(Type(w.scale_type), [&](auto* tag) {
        const auto* scales = (const Pointee<decltype(tag)>*)w.scale + row * w.groups;
        const uint8_t* zeros = w.zeros + row * w.groups;
        for (int64_t i = 0; i < count; group++) {
            const int64_t end = group + 1 < w.groups && w.ends[group] - k < count ? w.ends[group] - k : count;
            const float scale = load_one(scales + group), zero = (float)zeros[group];
            for (; i + kWidth <= end; i += kWidth) store(out + i, (load(out + i) - zero) * scale);
            for (; i < end; i++) out[i] = (out[i] - zero) * scale;
        }
    });
}

// The row of the file that is row `row` of the model: GGUF keeps the two halves of a rotated head interleaved.
inline int64_t stored_row(const Weights& w, int64_t row) {
    if (!w.half) return row;
    const int64_t inside = row % (2 * w.half);
    return row - inside + inside % w.half * 2 + inside / w.half;
}

// A W of one of these two forms, for products.h; nothing is written past out + count.
inline void decode_part(const Weights& w, int64_t row, int64_t k, int64_t count, float* out) {
    if (w.form == Weights::kBlocks)
        decode_blocks(w.type, (const uint8_t*)w.values + stored_row(w, row) * w.row_bytes, k, count, out);
    else
        decode_groups(w, row, k, count, out);
}

}  // namespace
