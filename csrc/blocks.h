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
    void scaled(int64_t i, Eight code, float scale) { put(out + i, code * scale); }
    void shifted(int64_t i, Eight code, float scale, float offset) { put(out + i, code * scale + offset); }
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

// ---- blocks of 256 with scales of their own for every 16 or 32 weights, which are all made floats first. A byte has parts
// of several weights that lie 32 apart; it is loaded once for all of them.

// out [8] = the eight bytes at p, or of two words, times a factor.
inline void times(EightInt numbers, float factor, float* out) { put(out, floats(numbers) * factor); }
inline EightInt eight(uint32_t first, uint32_t second) {
    const uint32_t words[2] = {first, second};
    return eight((const uint8_t*)words);
}

struct Q2_K {
    static constexpr int kElements = 256, kBytes = 84;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p + 80), dmin = half_at(p + 82);
        float scale[16], least[16];
        for (int n = 0; n < 16; n += 8) {
            times(eight(p + n) & 15, d, scale + n);
            times(eight(p + n) >> 4, -dmin, least + n);
        }
        for (int start = 0; start < 256; start += 128)
            for (int j = 0; j < 32; j += 8) {
                const EightInt codes = eight(p + 16 + start / 4 + j);
                for (int part = 0; part < 4; part++) {
                    const int i = start + part * 32 + j;
                    sink.shifted(i, floats(codes >> 2 * part & 3), scale[i / 16], least[i / 16]);
                }
            }
    }
};

struct Q3_K {
    static constexpr int kElements = 256, kBytes = 110;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p + 108);
        const uint32_t a = word_at(p + 96), b = word_at(p + 100), high = word_at(p + 104);
        const uint32_t four = 0x0f0f0f0f, two = 0x03030303;
        float scale[16];
        times(eight((a & four) | (high & two) << 4, (b & four) | (high >> 2 & two) << 4) - 32, d, scale);
        times(eight((a >> 4 & four) | (high >> 4 & two) << 4, (b >> 4 & four) | (high >> 6 & two) << 4) - 32, d, scale + 8);
        for (int start = 0; start < 256; start += 128)
            for (int j = 0; j < 32; j += 8) {
                const EightInt codes = eight(p + 32 + start / 4 + j), missing = ~eight(p + j);
                for (int part = 0; part < 4; part++) {
                    const int i = start + part * 32 + j;  // a missing bit takes 4 away
                    sink.scaled(i, floats((codes >> 2 * part & 3) - (missing >> i / 32 & 1) * 4), scale[i / 16]);
                }
            }
    }
};

// The 6-bit scales and minima of Q4_K and Q5_K, times their factors: 8 of each.
inline void scales_and_minima(const uint8_t* p, float d, float dmin, float* scale, float* least) {
    const uint32_t a = word_at(p), b = word_at(p + 4), c = word_at(p + 8), six = 0x3f3f3f3f, four = 0x0f0f0f0f;
    times(eight(a & six, (c & four) | (a >> 6 & 0x03030303) << 4), d, scale);
    times(eight(b & six, (c >> 4 & four) | (b >> 6 & 0x03030303) << 4), -dmin, least);
}

struct Q4_K {
    static constexpr int kElements = 256, kBytes = 144;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        float scale[8], least[8];
        scales_and_minima(p + 4, half_at(p), half_at(p + 2), scale, least);
        for (int n = 0; n < 8; n += 2)
            for (int j = 0; j < 32; j += 8) {
                const EightInt codes = eight(p + 16 + n * 16 + j);
                sink.shifted(n * 32 + j, floats(codes & 15), scale[n], least[n]);
                sink.shifted(n * 32 + 32 + j, floats(codes >> 4), scale[n + 1], least[n + 1]);
            }
    }
};

struct Q5_K {
    static constexpr int kElements = 256, kBytes = 176;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        float scale[8], least[8];
        scales_and_minima(p + 4, half_at(p), half_at(p + 2), scale, least);
        for (int n = 0; n < 8; n += 2)
            for (int j = 0; j < 32; j += 8) {
                const EightInt codes = eight(p + 48 + n * 16 + j), high = eight(p + 16 + j) >> n;
                sink.shifted(n * 32 + j, floats((codes & 15) | (high & 1) << 4), scale[n], least[n]);
                sink.shifted(n * 32 + 32 + j, floats(codes >> 4 | (high & 2) << 3), scale[n + 1], least[n + 1]);
            }
    }
};

struct Q6_K {
    static constexpr int kElements = 256, kBytes = 210;
    template <class Sink>
    static void each(const uint8_t* p, Sink& sink) {
        const float d = half_at(p + 208);
        float scale[16];
        for (int n = 0; n < 16; n += 8) times(eight_signed(p + 192 + n), d, scale + n);
        for (int start = 0; start < 256; start += 128)
            for (int j = 0; j < 32; j += 8) {
                const EightInt even = eight(p + start / 2 + j), odd = eight(p + start / 2 + 32 + j);
                const EightInt high = eight(p + 128 + start / 4 + j);
                const EightInt low[4] = {even & 15, odd & 15, even >> 4, odd >> 4};
                for (int part = 0; part < 4; part++) {
                    const int i = start + part * 32 + j;
                    sink.scaled(i, floats((low[part] | (high >> 2 * part & 3) << 4) - 32), scale[i / 16]);
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

template <int kBits>
struct Bits {
    static constexpr int value = kBits;
};

// Calls fn with the number of bits as a constant.
template <class Fn>
inline void by_bits(int64_t bits, Fn fn) {
    switch (bits) {
        case 2: fn(Bits<2>{}); break;
        case 3: fn(Bits<3>{}); break;
        case 4: fn(Bits<4>{}); break;
        case 8: fn(Bits<8>{}); break;
    }
}

// Weights k .. k + count of a row, k a multiple of 8: (code - zero) * scale, with scale and zero of the weight's group.
inline void decode_groups(const Weights& w, int64_t row, int64_t k, int64_t count, float* out) {
    const uint8_t* packed = (const uint8_t*)w.values + row * w.row_bytes;
    by_bits(w.type, [&](auto bits) { unpack<decltype(bits)::value>(packed, k, count, out); });
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
