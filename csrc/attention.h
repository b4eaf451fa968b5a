// Causal attention over blocks of queries: products by BLAS, softmax in between. Only the keys that a block can see are
// multiplied, so about half of the work of the full square is done. The forward pass keeps one number per query, the
// log of the sum of exponentials; the backward pass computes the probabilities again (FlashAttention, arXiv 2205.14135).

namespace {

using namespace smidgen;

// Row-major products. C [m, n] = alpha A [m, k] B [n, k]^T + beta C.
inline void product_nt(Sgemm gemm, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                       const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    const int mm = (int)n, nn = (int)m, kk = (int)k, la = (int)ldb, lb = (int)lda, lc = (int)ldc;
    gemm("T", "N", &mm, &nn, &kk, &alpha, b, &la, a, &lb, &beta, c, &lc);
}
// C [m, n] = alpha A [m, k] B [k, n] + beta C.
inline void product_nn(Sgemm gemm, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                       const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    const int mm = (int)n, nn = (int)m, kk = (int)k, la = (int)ldb, lb = (int)lda, lc = (int)ldc;
    gemm("N", "N", &mm, &nn, &kk, &alpha, b, &la, a, &lb, &beta, c, &lc);
}
// C [m, n] = alpha A [k, m]^T B [k, n] + beta C.
inline void product_tn(Sgemm gemm, int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                       const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
    const int mm = (int)n, nn = (int)m, kk = (int)k, la = (int)ldb, lb = (int)lda, lc = (int)ldc;
    gemm("N", "T", &mm, &nn, &kk, &alpha, b, &la, a, &lb, &beta, c, &lc);
}

template <class T>
inline float dot(const float* a, const T* b, int64_t n) {
    Vec total{};
    const int64_t whole = n / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) total = fma(load(a + i), load(b + i), total);
    float value = sum(total);
    for (int64_t i = whole; i < n; i++) value += a[i] * load_one(b + i);
    return value;
}

// Keys that lie one behind the other: columns [column, column + count) of a block's scores, from `token` on.
struct Keys {
    int64_t column, count, token;
};

// One block of queries, of all heads that share a key head: which tokens it holds and which keys it sees. Positions
// count from the start of the row, or of the row that it goes on after. The heads' queries are stacked, so that one
// product serves the whole group: stacked row i is query i % queries of head kv_head * group + i / queries.
struct Block {
    int64_t token, kv_head, group, first, queries, stacked, first_key, keys, padded, num_pieces;
    Keys pieces[2];  // of the row before, if it sees any of that, and of its own row

    Block(const Attention& a, int64_t row, int64_t kv_head_, int64_t block) : kv_head(kv_head_) {
        const int64_t start = a.starts[row], before = a.prefixes[row];
        const int64_t prefix = before < 0 ? 0 : a.starts[before + 1] - a.starts[before];
        group = a.heads / a.kv_heads;
        token = start + block * kQueries;
        first = prefix + block * kQueries;
        const int64_t left = a.starts[row + 1] - token;
        queries = left < kQueries ? left : kQueries;
        stacked = group * queries;
        first_key = a.window > 0 && first - a.window + 1 > 0 ? first - a.window + 1 : 0;
        keys = first + queries - first_key;
        padded = (keys + kWidth - 1) / kWidth * kWidth;
        const int64_t shared = first_key < prefix ? prefix - first_key : 0;
        num_pieces = 0;
        if (shared > 0) pieces[num_pieces++] = {0, shared, a.starts[before] + first_key};
        pieces[num_pieces++] = {shared, keys - shared, start + first_key + shared - prefix};
    }
    // Where stacked row i lies in a matrix [tokens, stride] whose heads lie side by side.
    int64_t place(const Attention& a, int64_t i, int64_t stride) const {
        return (token + i % queries) * stride + (kv_head * group + i / queries) * a.head_dim;
    }
    float* lse(const Attention& a, int64_t i) const {
        return a.lse + (kv_head * group + i / queries) * a.tokens + token + i % queries;
    }
    // Keys [begin, end) are what stacked row i sees.
    int64_t begin(const Attention& a, int64_t i) const {
        const int64_t earliest = first + i % queries - a.window + 1 - first_key;
        return a.window > 0 && earliest > 0 ? earliest : 0;
    }
    int64_t end(int64_t i) const { return first + i % queries + 1 - first_key; }
};

inline void fill(float* p, int64_t begin, int64_t end, float value) {
    for (int64_t i = begin; i < end; i++) p[i] = value;
}

// scores [count, a multiple of kWidth] -> exp(scores - the largest, which goes to *top); returns their sum.
inline float exponentials(float* scores, int64_t count, float* top) {
    Vec tops = load(scores), sums{};
    for (int64_t j = kWidth; j < count; j += kWidth) tops = max(load(scores + j), tops);
    *top = largest(tops);
    for (int64_t j = 0; j < count; j += kWidth) {
        const Vec p = exp(load(scores + j) - *top);
        store(scores + j, p);
        sums += p;
    }
    return sum(sums);
}

// The block's rows of `matrix` [tokens, stride], stacked in `into` [stacked, head_dim].
inline void stack(const Attention& a, const Block& block, const float* matrix, int64_t stride, float* into) {
    for (int64_t i = 0; i < block.stacked; i++) {
        const float* from = matrix + block.place(a, i, stride);
        for (int64_t d = 0; d < a.head_dim; d++) into[i * a.head_dim + d] = from[d];
    }
}

// into [stacked, padded] = scale x K^T for the keys that the block sees; x [stacked, head_dim], k: a.k or a.v.
inline void times_keys(const Attention& a, const Block& block, const float* x, const float* k, float scale, float* into) {
    for (int64_t i = 0; i < block.num_pieces; i++) {
        const Keys& piece = block.pieces[i];
        product_nt(a.sgemm, block.stacked, piece.count, a.head_dim, scale, x, a.head_dim,
                   k + piece.token * a.stride + block.kv_head * a.head_dim, a.stride, 0.0f, into + piece.column,
                   block.padded);
    }
}

// into [stacked, head_dim] = scale weights K; weights [stacked, padded].
inline void sum_of_keys(const Attention& a, const Block& block, const float* weights, const float* k, float scale,
                        float* into) {
    for (int64_t i = 0; i < block.num_pieces; i++) {
        const Keys& piece = block.pieces[i];
        product_nn(a.sgemm, block.stacked, a.head_dim, piece.count, scale, weights + piece.column, block.padded,
                   k + piece.token * a.stride + block.kv_head * a.head_dim, a.stride, i > 0 ? 1.0f : 0.0f, into,
                   a.head_dim);
    }
}

// grad [tokens, head_dim] += scale weights^T x for the keys that the block sees.
inline void add_to_keys(const Attention& a, const Block& block, const float* weights, const float* x, float scale,
                        float* grad) {
    for (int64_t i = 0; i < block.num_pieces; i++) {
        const Keys& piece = block.pieces[i];
        product_tn(a.sgemm, piece.count, a.head_dim, block.stacked, scale, weights + piece.column, block.padded, x,
                   a.head_dim, 1.0f, grad + piece.token * a.head_dim, a.head_dim);
    }
}

// scores = scale Q K^T, with -inf where a query must not look; from end(i), rounded up to a whole vector, on: 0.
inline void masked_scores(const Attention& a, const Block& block, const float* q, float* scores) {
    times_keys(a, block, q, a.k, a.scale, scores);
    for (int64_t i = 0; i < block.stacked; i++) {
        float* row = scores + i * block.padded;
        const int64_t end = block.end(i), whole = (end + kWidth - 1) / kWidth * kWidth;
        fill(row, 0, block.begin(a, i), -__builtin_inff());
        fill(row, end, whole, -__builtin_inff());
        fill(row, whole, block.padded, 0.0f);
    }
}

void attention(const Attention& a, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
        const int64_t* where = a.blocks + task / a.kv_heads * 2;
        const Block block(a, where[0], task % a.kv_heads, where[1]);
        float* scores = worker_scratch(0, block.stacked * block.padded);
        float* q = worker_scratch(1, block.stacked * (2 * a.head_dim + 1));
        float* out = q + block.stacked * a.head_dim;
        float* inverse = out + block.stacked * a.head_dim;
        stack(a, block, a.q, a.stride, q);
        masked_scores(a, block, q, scores);
        for (int64_t i = 0; i < block.stacked; i++) {
            float* row = scores + i * block.padded;
            const int64_t stop = (block.end(i) + kWidth - 1) / kWidth * kWidth;
            float top;
            const float total = exponentials(row, stop, &top);
            inverse[i] = 1.0f / total;
            *block.lse(a, i) = top + (float)__builtin_log(total);
        }
        sum_of_keys(a, block, scores, a.v, 1.0f, out);
        for (int64_t i = 0; i < block.stacked; i++) {
            float* to = a.out + block.place(a, i, a.out_stride);
            for (int64_t d = 0; d < a.head_dim; d++) to[d] = out[i * a.head_dim + d] * inverse[i];
        }
    }
}

// The gradient of the block's queries, and what they add to grad_k, grad_v [tokens, head_dim].
inline void block_backward(const AttentionBackward& args, const Block& block, float* grad_k, float* grad_v) {
    const Attention& a = args.forward;
    const int64_t size = block.stacked * a.head_dim;
    float* p = worker_scratch(0, 2 * block.stacked * block.padded);
    float* ds = p + block.stacked * block.padded;
    float* q = worker_scratch(1, 4 * size);
    float *grad_out = q + size, *out = q + 2 * size, *grad_q = q + 3 * size;
    stack(a, block, a.q, a.stride, q);
    stack(a, block, args.grad_out, a.out_stride, grad_out);
    stack(a, block, a.out, a.out_stride, out);
    masked_scores(a, block, q, p);
    times_keys(a, block, grad_out, a.v, 1.0f, ds);
    for (int64_t i = 0; i < block.stacked; i++) {
        float* p_row = p + i * block.padded;
        float* ds_row = ds + i * block.padded;
        const float lse = *block.lse(a, i);
        const float delta = dot(grad_out + i * a.head_dim, out + i * a.head_dim, a.head_dim);
        const int64_t stop = (block.end(i) + kWidth - 1) / kWidth * kWidth;
        fill(ds_row, block.keys, block.padded, 0.0f);
        for (int64_t j = 0; j < stop; j += kWidth) {
            const Vec probability = exp(load(p_row + j) - lse);
            store(p_row + j, probability);
            store(ds_row + j, probability * (load(ds_row + j) - delta));
        }
        fill(ds_row, stop, block.padded, 0.0f);
    }
    sum_of_keys(a, block, ds, a.k, a.scale, grad_q);
    add_to_keys(a, block, ds, q, a.scale, grad_k);
    add_to_keys(a, block, p, grad_out, 1.0f, grad_v);
    for (int64_t i = 0; i < block.stacked; i++) {
        float* to = args.grad_q + block.place(a, i, a.stride);
        for (int64_t d = 0; d < a.head_dim; d++) to[d] = grad_q[i * a.head_dim + d];
    }
}

void attention_backward(const AttentionBackward& args, int64_t begin, int64_t end) {
    const Attention& a = args.forward;
    for (int64_t task = begin; task < end; task++) {
        const int64_t* part = args.parts + task / a.kv_heads * 3;
        const int64_t kv_head = task % a.kv_heads, first_row = args.groups[part[0]], last_row = args.groups[part[0] + 1];
        const int64_t matrix = (part[1] * a.kv_heads + kv_head) * a.tokens * a.head_dim;
        float* grad_k = args.partial_k + matrix;
        float* grad_v = args.partial_v + matrix;
        fill(grad_k, a.starts[first_row] * a.head_dim, a.starts[last_row] * a.head_dim, 0.0f);
        fill(grad_v, a.starts[first_row] * a.head_dim, a.starts[last_row] * a.head_dim, 0.0f);
        int64_t number = 0;  // of a block in the group
        for (int64_t row = first_row; row < last_row; row++) {
            const int64_t blocks = (a.starts[row + 1] - a.starts[row] + kQueries - 1) / kQueries;
            for (int64_t b = 0; b < blocks; b++) {
                if (number++ % part[2] == part[1]) block_backward(args, Block(a, row, kv_head, b), grad_k, grad_v);
            }
        }
    }
}

void attention_reduce(const AttentionReduce& a, int64_t begin, int64_t end) {
    const int64_t head_size = a.tokens * a.head_dim;
    for (int64_t task = begin; task < end; task++) {
        const int64_t group = task / a.kv_heads, kv_head = task % a.kv_heads;
        for (int64_t t = a.starts[group]; t < a.starts[group + 1]; t++) {
            float* grad_k = a.grad_k + t * a.stride + kv_head * a.head_dim;
            float* grad_v = a.grad_v + t * a.stride + kv_head * a.head_dim;
            for (int64_t d = 0; d < a.head_dim; d++) {
                float k = 0, v = 0;
                for (int64_t part = 0; part < a.parts_of_group[group]; part++) {
                    const int64_t place = (part * a.kv_heads + kv_head) * head_size + t * a.head_dim + d;
                    k += a.partial_k[place];
                    v += a.partial_v[place];
                }
                grad_k[d] = k;
                grad_v[d] = v;
            }
        }
    }
}

// keys, values: of type T.
template <class T>
inline void decode_rows(const AttentionDecode& a, int64_t begin, int64_t end) {
    const int64_t group = a.heads / a.kv_heads, size = a.head_dim, whole = size / kWidth * kWidth;
    for (int64_t task = begin; task < end; task++) {
        const int64_t row = task / a.kv_heads, kv_head = task % a.kv_heads, length = a.lengths[row] + 1;
        T* row_keys = (T*)a.keys + task * a.capacity * size;
        T* row_values = (T*)a.values + task * a.capacity * size;
        for (int64_t d = 0; d < size; d++) {
            store_one(row_keys + (length - 1) * size + d, a.k[row * a.stride + kv_head * size + d]);
            store_one(row_values + (length - 1) * size + d, a.v[row * a.stride + kv_head * size + d]);
        }
        const int64_t first = a.window > 0 && length > a.window ? length - a.window : 0, seen = length - first;
        const int64_t padded = (seen + kWidth - 1) / kWidth * kWidth;
        const T* keys = row_keys + first * size;
        const T* values = row_values + first * size;
        const float* q = a.q + row * a.stride + kv_head * group * size;
        float* out = a.out + row * a.out_stride + kv_head * group * size;
        float* scores = worker_scratch(0, group * padded);
        for (int64_t t = 0; t < seen; t++)  // each key is read once for all heads of the group
            for (int64_t h = 0; h < group; h++)
                scores[h * padded + t] = dot(q + h * size, keys + t * size, size) * a.scale;
        for (int64_t h = 0; h < group; h++) {
            float* row_scores = scores + h * padded;
            fill(row_scores, seen, padded, -__builtin_inff());
            float top;
            const float inverse = 1.0f / exponentials(row_scores, padded, &top);
            for (int64_t t = 0; t < seen; t++) row_scores[t] *= inverse;
        }
        fill(out, 0, group * size, 0.0f);
        for (int64_t t = 0; t < seen; t++)
            for (int64_t h = 0; h < group; h++) {
                const float weight = scores[h * padded + t];
                const T* value = values + t * size;
                float* sums = out + h * size;
                for (int64_t d = 0; d < whole; d += kWidth)
                    store(sums + d, fma(broadcast(weight), load(value + d), load(sums + d)));
                for (int64_t d = whole; d < size; d++) sums[d] += weight * load_one(value + d);
            }
    }
}

void attention_decode(const AttentionDecode& a, int64_t begin, int64_t end) {
    if (a.type == kBfloat16) return decode_rows<Bfloat16>(a, begin, end);
    decode_rows<float>(a, begin, end);
}

}  // namespace
