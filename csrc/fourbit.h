// Weights in 4-bit blocks, in bitsandbytes' layout: weight i of the flat matrix has its code in byte i / 2, high nibble
// first; block i / blocksize has one scale. value = code[nibble] * scale, rounded once: the same bits as in PyTorch.
//
// A look-up of many codes at once is all that differs between the instruction sets. AVX-512 looks 16 floats up in one
// register. AVX2 and NEON can look up bytes only, so the 16 floats are cut into four tables of their first to fourth
// bytes, and the bytes that come out are interleaved to floats again. For bfloat16 a block's 16 values are scaled and
// rounded before the look-up: half as many bytes, and nothing left to compute for each weight.

namespace {

using namespace smidgen;

// As by_type, for stored weights.
template <class Fn>
inline void by_weight_type(Type type, Fn fn) {
    if (type == kFloat16)
        fn((Float16*)nullptr);
    else
        by_type(type, fn);
}

constexpr int kCodes = 32;                 // codes that are looked up at once: 16 bytes
constexpr int kVectors = kCodes / kWidth;  // and the vectors that they make

inline int nibble(const uint8_t* packed, int64_t i) { return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }

inline float block_scale(const FourBit& m, int64_t block) {
    if (!m.map) return ((const float*)m.absmax)[block];
    return m.map[((const uint8_t*)m.absmax)[block]] * m.outer[block / 256] + *m.offset;  // rounded twice, as in PyTorch
}

#if defined(__AVX512F__)

struct Table {
    __m512 values;
    explicit Table(const float* code) : values(_mm512_loadu_ps(code)) {}
};
// A table times a block's scale: the products are made once for 16 codes rather than for every weight.
struct Scaled {
    __m512 values;
    Scaled(const Table& table, float scale) : values(_mm512_mul_ps(table.values, _mm512_set1_ps(scale))) {}
};
inline Vec look_up_16(__m512 table, const uint8_t* p) {
    // the place of each nibble in its four bytes; what is left above it is ignored by the look-up
    const __m512i places = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    int32_t low, high;
    __builtin_memcpy(&low, p, 4);
    __builtin_memcpy(&high, p + 4, 4);
    const __m512i bytes = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    return (Vec)_mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, places), table);
}
inline void decode(const Scaled& scaled, const uint8_t* p, Vec* out) {
    out[0] = look_up_16(scaled.values, p);
    out[1] = look_up_16(scaled.values, p + 8);
}
inline void decode(const Table& table, const uint8_t* p, Vec* out) {
    out[0] = look_up_16(table.values, p);
    out[1] = look_up_16(table.values, p + 8);
}

#elif defined(__AVX2__)

struct Table {
    __m256i plane[4];
    const float* values;
    explicit Table(const float* code) : values(code) {
        uint8_t bytes[4][16];
        for (int i = 0; i < 16; i++) {
            uint8_t four[4];
            __builtin_memcpy(four, code + i, 4);
            for (int k = 0; k < 4; k++) bytes[k][i] = four[k];
        }
        for (int k = 0; k < 4; k++)
            plane[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes[k]));
    }
};
struct Scaled {
    const Table& table;
    Vec scale;
    Scaled(const Table& table_, float scale_) : table(table_), scale(broadcast(scale_)) {}
};
// 16 bytes -> 32 codes. Interleaving works within each half of a register: `turns` says which bytes go into which half.
inline __m256i codes_of(const uint8_t* p, __m256i turns) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    const __m256i words = _mm256_shuffle_epi8(bytes, turns);  // a byte, and a zero for its second code
    return _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8)),
                            _mm256_set1_epi8(15));
}
inline void decode(const Table& table, const uint8_t* p, Vec* out) {
    const __m256i codes = codes_of(p, _mm256_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1,  //
                                                       2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
    const __m256i b0 = _mm256_shuffle_epi8(table.plane[0], codes), b1 = _mm256_shuffle_epi8(table.plane[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(table.plane[2], codes), b3 = _mm256_shuffle_epi8(table.plane[3], codes);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), low23 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i high01 = _mm256_unpackhi_epi8(b0, b1), high23 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = (Vec)_mm256_unpacklo_epi16(low01, low23);
    out[1] = (Vec)_mm256_unpackhi_epi16(low01, low23);
    out[2] = (Vec)_mm256_unpacklo_epi16(high01, high23);
    out[3] = (Vec)_mm256_unpackhi_epi16(high01, high23);
}
inline void decode(const Scaled& scaled, const uint8_t* p, Vec* out) {
    decode(scaled.table, p, out);
    for (int i = 0; i < kVectors; i++) out[i] *= scaled.scale;
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct Table {
    uint8x16_t plane[4];
    const float* values;
    explicit Table(const float* code) : values(code) {
        const uint8x16x4_t bytes = vld4q_u8((const uint8_t*)code);
        for (int k = 0; k < 4; k++) plane[k] = bytes.val[k];
    }
};
struct Scaled {
    const Table& table;
    Vec scale;
    Scaled(const Table& table_, float scale_) : table(table_), scale(broadcast(scale_)) {}
};
inline void decode(const Table& table, const uint8_t* p, Vec* out) {
    const uint8x16_t bytes = vld1q_u8(p), high = vshrq_n_u8(bytes, 4), low = vandq_u8(bytes, vdupq_n_u8(15));
    const uint8x16_t codes[2] = {vzip1q_u8(high, low), vzip2q_u8(high, low)};
    for (int half = 0; half < 2; half++) {
        uint8x16_t b[4];
        for (int k = 0; k < 4; k++) b[k] = vqtbl1q_u8(table.plane[k], codes[half]);
        const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(b[0], b[1]));
        const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(b[2], b[3]));
        const uint16x8_t high01 = vreinterpretq_u16_u8(vzip2q_u8(b[0], b[1]));
        const uint16x8_t high23 = vreinterpretq_u16_u8(vzip2q_u8(b[2], b[3]));
        out[4 * half + 0] = (Vec)vzip1q_u16(low01, low23);
        out[4 * half + 1] = (Vec)vzip2q_u16(low01, low23);
        out[4 * half + 2] = (Vec)vzip1q_u16(high01, high23);
        out[4 * half + 3] = (Vec)vzip2q_u16(high01, high23);
    }
}
inline void decode(const Scaled& scaled, const uint8_t* p, Vec* out) {
    decode(scaled.table, p, out);
    for (int i = 0; i < kVectors; i++) out[i] *= scaled.scale;
}

#else

struct Table {
    const float* values;
    explicit Table(const float* code) : values(code) {}
};
struct Scaled {
    float values[16];
    Scaled(const Table& table, float scale) {
        for (int i = 0; i < 16; i++) values[i] = table.values[i] * scale;
    }
};
template <class AnyTable>
inline void decode(const AnyTable& table, const uint8_t* p, Vec* out) {
    float numbers[kCodes];
    for (int i = 0; i < kCodes / 2; i++) {
        numbers[2 * i] = table.values[p[i] >> 4];
        numbers[2 * i + 1] = table.values[p[i] & 15];
    }
    __builtin_memcpy(out, numbers, sizeof numbers);
}

#endif

// A block's 16 values in the type that they are stored in, so that a look-up is all that is left for each weight.
template <class T>
struct Row;

template <>
struct Row<float> {
    Scaled scaled;
    Row(const Table& table, float scale) : scaled(table, scale) {}
    void write(const uint8_t* p, float* out) const {
        Vec values[kVectors];
        decode(scaled, p, values);
        for (int v = 0; v < kVectors; v++) store(out + v * kWidth, values[v]);
    }
};

#if defined(__AVX512F__)
template <>
struct Row<Bfloat16> {
    __m512i values;  // 16 of them, twice: what lies above a code's four bits may then be anything
    Row(const Table& table, float scale) {
        const UintVec rounded = bfloat16_bits((Vec)Scaled(table, scale).values);
        values = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16((__m512i)rounded));
    }
    void write(const uint8_t* p, Bfloat16* out) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, values));
    }
};
#elif defined(__AVX2__)
template <>
struct Row<Bfloat16> {
    __m256i low, high;  // their bytes, in both halves
    Row(const Table& table, float scale) {
        // The two vectors' words lie in turns of four: bytes are sorted within the halves, then eight at a time.
        const __m256i words = _mm256_packus_epi32((__m256i)bfloat16_bits(load(table.values) * scale),
                                                  (__m256i)bfloat16_bits(load(table.values + 8) * scale));
        const __m256i bytes = _mm256_shuffle_epi8(
            words, _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                    0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        low = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6));
        high = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(1, 5, 3, 7, 1, 5, 3, 7));
    }
    void write(const uint8_t* p, Bfloat16* out) const {
        const __m256i codes =
            codes_of(p, _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1,  //
                                         4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1));
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        _mm256_storeu_si256((__m256i*)out, _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256((__m256i*)out + 1, _mm256_unpackhi_epi8(l, h));
    }
};
#else
template <>
struct Row<Bfloat16> {
    uint16_t values[16];
    Row(const Table& table, float scale) {
        for (int i = 0; i < 16; i++) store_one((Bfloat16*)values + i, table.values[i] * scale);
    }
    void write(const uint8_t* p, Bfloat16* out) const {
        for (int i = 0; i < kCodes / 2; i++) {
            out[2 * i].bits = values[p[i] >> 4];
            out[2 * i + 1].bits = values[p[i] & 15];
        }
    }
};
#endif

// Weights [begin, end) of one block, one by one: where a range begins or ends within a block.
template <class T>
inline void dequantise_some(const FourBit& m, int64_t begin, int64_t end, float scale, T* out) {
    for (int64_t i = begin; i < end; i++) store_one(out + (i - begin), m.code[nibble(m.packed, i)] * scale);
}

// Whole blocks. The most common blocksize is known to the compiler.
template <class T, bool is_64>
inline void dequantise_blocks(const FourBit& m, const Table& table, int64_t first, int64_t last, T* out) {
    const int64_t size = is_64 ? 64 : m.blocksize;
    const uint8_t* p = m.packed + first * size / 2;
    for (int64_t block = first; block < last; block++) {
        const Row<T> row(table, block_scale(m, block));
        for (int64_t i = 0; i < size; i += kCodes, p += kCodes / 2, out += kCodes) row.write(p, out);
    }
}

// Weights [i, stop) of the flat matrix into out, of type T.
template <class T>
inline void dequantise_4bit(const FourBit& m, int64_t i, int64_t stop, T* out) {
    const Table table(m.code);
    while (i < stop) {
        const int64_t block = i / m.blocksize, block_end = (block + 1) * m.blocksize;
        int64_t next = block_end < stop ? block_end : stop;
        if (m.blocksize % kCodes == 0 && next - i == m.blocksize) {
            const int64_t last = stop / m.blocksize;
            next = last * m.blocksize;
            if (m.blocksize == 64)
                dequantise_blocks<T, true>(m, table, block, last, out);
            else
                dequantise_blocks<T, false>(m, table, block, last, out);
        } else {
            dequantise_some(m, i, next, block_scale(m, block), out);
        }
        out += next - i;
        i = next;
    }
}

}  // namespace
