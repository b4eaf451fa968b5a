// The opposite of fourbit.h: weights -> 4-bit codes and the scales of their blocks, with bitsandbytes' bytes.

namespace {

using namespace smidgen;

// The largest magnitude of `count` weights. Magnitudes compare like their bits, and a NaN is above all.
template <class T>
inline float largest_magnitude(const T* weight, int64_t count) {
    IntVec top{};
    const int64_t whole = count / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) {
        const IntVec bits = (IntVec)load(weight + i) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    int32_t value = 0;
    for (int i = 0; i < kWidth; i++) value = top[i] > value ? top[i] : value;
    for (int64_t i = whole; i < count; i++) {
        const float one = load_one(weight + i);
        int32_t bits;
        __builtin_memcpy(&bits, &one, 4);
        bits &= 0x7fffffff;
        value = bits > value ? bits : value;
    }
    float magnitude;
    __builtin_memcpy(&magnitude, &value, 4);
    return magnitude;
}

constexpr float kTiny = 1e-38f;  // what a block is divided by at least

// Values in [-1, 1] -> codes, by a search in halves: after each comparison there are half as many midpoints to look at.
#if defined(__AVX512F__)

struct Nearest {
    __m512i codes;
    __m512 midpoints;  // node n has its successors at 2 n and 2 n + 1
    explicit Nearest(const Quantise4bit& a) : codes(_mm512_loadu_si512(a.codes)) {
        const int order[16] = {0, 7, 3, 11, 1, 5, 9, 13, 0, 2, 4, 6, 8, 10, 12, 14};
        float nodes[16];
        for (int n = 0; n < 16; n++) nodes[n] = a.midpoints[order[n]];
        midpoints = _mm512_loadu_ps(nodes);
    }
    IntVec operator()(Vec value) const {
        __m512i node = _mm512_set1_epi32(1);
        for (int level = 0; level < 4; level++) {
            const __m512 midpoint = _mm512_permutexvar_ps(node, midpoints);
            const __mmask16 above = _mm512_cmp_ps_mask((__m512)value, midpoint, _CMP_NLE_UQ);
            node = _mm512_add_epi32(node, node);
            node = _mm512_mask_add_epi32(node, above, node, _mm512_set1_epi32(1));
        }
        return (IntVec)_mm512_permutexvar_epi32(node, codes);  // the look-up takes the last four bits: the rank
    }
};

#elif defined(__AVX2__)

struct Nearest {
    __m256i codes;
    __m256 levels[4];
    explicit Nearest(const Quantise4bit& a) {
        uint8_t bytes[16];
        for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)a.codes[i];
        codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes));
        for (int level = 0; level < 4; level++) {
            float some[8] = {};
            for (int i = 0; i < 1 << level; i++) some[i] = a.midpoints[(16 >> level) * i + (8 >> level) - 1];
            levels[level] = _mm256_loadu_ps(some);
        }
    }
    IntVec operator()(Vec value) const {
        __m256i rank = _mm256_setzero_si256();
        for (int level = 0; level < 4; level++) {
            const __m256 midpoint = _mm256_permutevar8x32_ps(levels[level], rank);
            const __m256i above = (__m256i)_mm256_cmp_ps((__m256)value, midpoint, _CMP_NLE_UQ);  // -1
            rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), above);
        }
        // bytes with the highest bit set look up a zero
        return (IntVec)_mm256_shuffle_epi8(codes, _mm256_or_si256(rank, _mm256_set1_epi32((int)0x80808000)));
    }
};

#else

struct Nearest {
    Vec midpoints[15];
    IntVec first, steps[15];  // one comparison with each midpoint: a step from each code to the next
    explicit Nearest(const Quantise4bit& a) : first(a.codes[0] - IntVec{}) {
        for (int k = 0; k < 15; k++) {
            midpoints[k] = broadcast(a.midpoints[k]);
            steps[k] = a.codes[k + 1] - a.codes[k] - IntVec{};
        }
    }
    IntVec operator()(Vec value) const {
        IntVec code = first;
        for (int k = 0; k < 15; k++) code += steps[k] & ~(value <= midpoints[k]);
        return code;
    }
};

#endif

// The codes of a vector, one in each 32-bit lane, into out [kWidth / 2]: neighbours share a byte.
inline void pack(IntVec codes, uint8_t* out) {
    typedef uint64_t Pairs __attribute__((vector_size(4 * kWidth)));
    const Pairs pairs = (Pairs)codes;  // the first code of a pair lies in the lower half
    const Pairs bytes = pairs << 4 | pairs >> 32;
#if defined(__AVX512F__)
    _mm_storel_epi64((__m128i*)out, _mm512_cvtepi64_epi8((__m512i)bytes));
#elif defined(__AVX2__)
    const __m256i low = _mm256_permutevar8x32_epi32((__m256i)bytes, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    const __m128i four = _mm_shuffle_epi8(_mm256_castsi256_si128(low), _mm_set1_epi32(0x0c080400));
    const int32_t word = _mm_cvtsi128_si32(four);
    __builtin_memcpy(out, &word, 4);
#else
    for (int i = 0; i < kWidth / 2; i++) out[i] = (uint8_t)bytes[i];
#endif
}

void quantise_4bit(const Quantise4bit& a, int64_t begin, int64_t end) {
    by_weight_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const T* weight = (const T*)a.weight;
        const int64_t stop = end * a.task < a.count ? end * a.task : a.count;
        const Nearest nearest(a);
        for (int64_t first = begin * a.task; first < stop; first += a.blocksize) {
            const int64_t block = first / a.blocksize, left = stop - first;
            const float top = largest_magnitude(weight + first, left < a.blocksize ? left : a.blocksize);
            const float divisor = top < kTiny ? kTiny : top;
            if (left >= a.blocksize) {
                const float factor = 1.0f / divisor;
                a.absmax[block] = top;
                for (int64_t i = first; i < first + a.blocksize; i += kWidth)
                    pack(nearest(load(weight + i) * factor), a.packed + i / 2);
            } else {  // what is left at the end is divided, and keeps the divisor: as bitsandbytes does it
                a.absmax[block] = divisor;
                for (int64_t i = 0; i < left + left % 2; i++) {  // an odd number is padded by one zero
                    const float value = i < left ? load_one(weight + first + i) / divisor : 0.0f;
                    const int code = nearest(broadcast(value))[0];
                    uint8_t& byte = a.packed[(first + i) / 2];
                    byte = i % 2 ? (uint8_t)(byte | code) : (uint8_t)(code << 4);
                }
            }
        }
    });
}

}  // namespace
