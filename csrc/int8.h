// Weights in 8-bit rows with a scale each, as LLM.int8() stores them: value = code * (scale / 127).

namespace {

using namespace smidgen;

typedef int8_t ByteVec __attribute__((vector_size(kWidth)));

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    ByteVec bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, IntVec), Vec);
#endif
}
inline float load_one(const int8_t* p) { return (float)*p; }

// codes [rows, width] * scale [rows] / 127 into out [rows, width], of type T.
template <class T>
inline void dequantise_int8(const int8_t* codes, const float* scales, int64_t rows, int64_t width, T* out) {
    const int64_t whole = width / kWidth * kWidth;
    for (int64_t row = 0; row < rows; row++, codes += width, out += width) {
        const float scale = scales[row] / 127.0f;
        for (int64_t i = 0; i < whole; i += kWidth) store(out + i, load(codes + i) * scale);
        for (int64_t i = whole; i < width; i++) store_one(out + i, (float)codes[i] * scale);
    }
}

void quantise_int8(const QuantiseInt8& a, int64_t begin, int64_t end) {
    by_weight_type(a.type, [&](auto* tag) {
        using T = Pointee<decltype(tag)>;
        const int64_t whole = a.width / kWidth * kWidth;
        const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, ties to even
        const auto codes_of = [&](Vec value) {
            const IntVec codes = (IntVec)(value + magic) - (IntVec)magic;
            return (IntVec)(value * value <= 16384.0f) & codes;  // NaN and infinity: 0
        };
        for (int64_t row = begin; row < end; row++) {
            const T* weight = (const T*)a.weight + row * a.width;
            int8_t* codes = a.codes + row * a.width;
            const float top = largest_magnitude(weight, a.width);
            const float factor = top > 0 ? 1.0f / top * 127.0f : 0.0f;  // rounded twice, as PyTorch divides a number
            a.scale[row] = top;
            for (int64_t i = 0; i < whole; i += kWidth) {
                const ByteVec bytes = __builtin_convertvector(codes_of(load(weight + i) * factor), ByteVec);
                __builtin_memcpy(codes + i, &bytes, sizeof bytes);
            }
            for (int64_t i = whole; i < a.width; i++)
                codes[i] = (int8_t)codes_of(broadcast(load_one(weight + i) * factor))[0];
        }
    });
}

}  // namespace
