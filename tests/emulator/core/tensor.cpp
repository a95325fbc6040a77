// Tensor cores: mma.sync, ldmatrix and wgmma by whole warps and warpgroups.
#include <string.h>

#include <deque>
#include <vector>

#include "core.h"

namespace emulated {

namespace {

float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

float from_f16(uint16_t bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return float(x);
}

float element(uint16_t bits, bool is_bf16) { return is_bf16 ? from_bf16(bits) : from_f16(bits); }

// ---- of a warp

struct WarpMma {
    float *d;
    const uint32_t *a, *b;
};

template <bool kIsBf16>
void complete_mma(const uint64_t *values, uint32_t) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        const auto &part = *reinterpret_cast<const WarpMma *>(values[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 2; i++)
                a[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = element(uint16_t(part.a[r] >> 16 * i), kIsBf16);
        for (int r = 0; r < 2; r++)
            for (int i = 0; i < 2; i++) b[g][2 * t + i + 8 * r] = element(uint16_t(part.b[r] >> 16 * i), kIsBf16);
    }
    float sums[16][8];
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[m][k] * b[n][k];
            sums[m][n] = sum;
        }
    for (int lane = 0; lane < 32; lane++) {
        float *d = reinterpret_cast<const WarpMma *>(values[lane])->d;
        for (int i = 0; i < 4; i++) d[i] += sums[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
    }
}

struct WarpBytesMma {
    int *d;
    const uint32_t *a, *b;
};

void complete_bytes_mma(const uint64_t *values, uint32_t) {
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        const auto &part = *reinterpret_cast<const WarpBytesMma *>(values[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) memcpy(&a[g + 8 * (r & 1)][4 * t + 16 * (r >> 1)], &part.a[r], 4);
        for (int r = 0; r < 2; r++) memcpy(&b[g][4 * t + 16 * r], &part.b[r], 4);
    }
    for (int lane = 0; lane < 32; lane++) {
        int *d = reinterpret_cast<const WarpBytesMma *>(values[lane])->d;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 32; k++) d[i] += a[lane / 4 + 8 * (i >> 1)][k] * b[2 * (lane % 4) + (i & 1)][k];
    }
}

struct Load {
    uint32_t *d;
    const void *row;
    int n_matrices;
    bool transposed;
};

void complete_load(const uint64_t *values, uint32_t) {
    const auto part = [&](int lane) -> const Load & { return *reinterpret_cast<const Load *>(values[lane]); };
    for (int matrix = 0; matrix < part(0).n_matrices; matrix++) {
        uint16_t rows[8][8];
        for (int r = 0; r < 8; r++) {
            const uint32_t address = shared_address(part(8 * matrix + r).row);
            if (address % 16) fail("ldmatrix: row %d of matrix %d lies at shared memory + %#x, not aligned to 16", r, matrix, address);
            memcpy(rows[r], shared_pointer(address, 16, "ldmatrix"), 16);
            check_read(part(8 * matrix + r).row, 16, "ldmatrix");
        }
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = 2 * (lane % 4);
            const bool transposed = part(lane).transposed;
            const uint16_t low = transposed ? rows[t][g] : rows[g][t], high = transposed ? rows[t + 1][g] : rows[g][t + 1];
            part(lane).d[matrix] = uint32_t(high) << 16 | low;
        }
    }
}

// ---- of a warpgroup

// A product under way. Its operands must not change until it is waited for.
struct Pending {
    uint64_t a, b;
    bool a_is_shared, transpose_b;
    int n;
    uint64_t fingerprint;
    int group;
    float *first_d;
    std::vector<const uint32_t *> a_registers;  // of each thread, if A comes from there
    uint64_t a_fingerprint;
};
// Accumulators under way, known by thread 0's pointer.
struct Accumulator {
    int n, n_pending;
    float *d[128];
    std::vector<float> value;  // [64][n]
};
struct Warpgroup {
    std::deque<Pending> pending;
    std::deque<Accumulator> accumulators;
    int group;
    bool fenced;    // since the last wait
    bool fenced_a;  // since the last commit: registers that a product reads were written before
} warpgroups[kWarps / 4];

const uint64_t kPoisonedPair = 0xffffffffffffffff;

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct Descriptor {
    uint32_t start, leading, stride;
    bool is_swizzled;
    Descriptor(uint64_t bits, const char *name)
        : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4),
          stride(uint32_t(bits >> 32 & 0x3fff) << 4), is_swizzled(bits >> 62 == 1) {
        if (bits >> 62 > 1) fail("wgmma: the descriptor of %s says another swizzle than none or 128 bytes", name);
        if (bits >> 49 & 7) fail("wgmma: the descriptor of %s has a base offset", name);
    }
    // Of element k of row r, where K is contiguous; of element r of row k where it isn't.
    uint32_t address(int r, int k, bool k_major) const {
        if (!is_swizzled)  // 8x8 matrices of 128 bytes: `leading` to the next 8 of k, `stride` to the next 8 rows
            return start + uint32_t(r / 8) * stride + uint32_t(k / 8) * leading +
                   uint32_t(k_major ? r % 8 * 16 + k % 8 * 2 : k % 8 * 16 + r % 8 * 2);
        if (k_major) return swizzled(start + uint32_t(r / 8) * stride + uint32_t(r % 8) * 128 + uint32_t(k) * 2);
        return swizzled(start + uint32_t(r / 64) * leading + uint32_t(k / 8) * stride + uint32_t(k % 8) * 128 +
                        uint32_t(r % 64) * 2);
    }
};

// The operand as [rows][16] raw elements.
template <typename F>
void read_operand(uint64_t bits, const char *name, int rows, bool k_major, uint16_t *out, F visit) {
    const Descriptor descriptor(bits, name);
    for (int r = 0; r < rows; r += k_major ? 1 : 8)
        for (int k = 0; k < 16; k += k_major ? 8 : 1) {  // eight elements lie together
            uint16_t chunk[8];
            const unsigned char *from = shared_pointer(descriptor.address(r, k, k_major), 16, name);
            memcpy(chunk, from, 16);
            visit(from);
            for (int i = 0; i < 8; i++) (k_major ? out[r * 16 + k + i] : out[(r + i) * 16 + k]) = chunk[i];
        }
}

uint64_t fingerprint(const uint16_t *elements, int count, uint64_t hash) {
    for (int i = 0; i < count; i += 4) {
        uint64_t word;
        memcpy(&word, elements + i, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return hash;
}

uint64_t fingerprint(const std::vector<const uint32_t *> &registers) {
    uint64_t hash = 1;
    for (const uint32_t *of_thread : registers) hash = fingerprint(reinterpret_cast<const uint16_t *>(of_thread), 8, hash);
    return hash;
}

// `visit` is called for each 16 bytes.
template <typename F>
uint64_t fingerprint(const Pending &product, F visit) {
    uint16_t elements[256 * 16];
    uint64_t hash = 1;
    if (product.a_is_shared) {
        read_operand(product.a, "wgmma's A", 64, true, elements, visit);
        hash = fingerprint(elements, 64 * 16, hash);
    }
    read_operand(product.b, "wgmma's B", product.n, !product.transpose_b, elements, visit);
    return fingerprint(elements, product.n * 16, hash);
}

void multiply(Accumulator &to, const uint16_t *a_bits, const uint16_t *b_bits, bool is_bf16, bool accumulate) {
    static float a[64][16], b[16][256];
    const int n = to.n;
    for (int m = 0; m < 64; m++)
        for (int k = 0; k < 16; k++) a[m][k] = element(a_bits[m * 16 + k], is_bf16);
    for (int j = 0; j < n; j++)
        for (int k = 0; k < 16; k++) b[k][j] = element(b_bits[j * 16 + k], is_bf16);
    for (int m = 0; m < 64; m++) {
        float *row = &to.value[size_t(m * n)], sums[256] = {};
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < n; j++) sums[j] += a[m][k] * b[k][j];
        for (int j = 0; j < n; j++) row[j] = accumulate ? row[j] + sums[j] : sums[j];
    }
}

// Thread t's registers are rows 16w + g and + 8 of the warp w, columns 8j + 2(t % 4) and + 1.
template <typename F>
void for_each_register(const Accumulator &accumulator, F visit) {
    for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < accumulator.n / 2; i++) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0);
            const int column = i / 4 * 8 + 2 * (thread % 4) + (i & 1);
            visit(accumulator.d[thread][i], size_t(row * accumulator.n + column));
        }
}

Accumulator &open_accumulator(Warpgroup &group, const uint64_t *values, int n) {
    const auto &first = *reinterpret_cast<const Product *>(values[0]);
    for (Accumulator &open : group.accumulators)
        if (open.d[0] == first.d) {
            if (open.n != n) fail("wgmma of N = %d on registers that one of N = %d still writes", n, open.n);
            return open;
        }
    if (!group.fenced) fail("wgmma on new registers without a wgmma_fence since the last wgmma_wait");
    Accumulator &opened = group.accumulators.emplace_back();
    opened.n = n, opened.n_pending = 0;
    opened.value.resize(size_t(64 * n));
    for (int thread = 0; thread < 128; thread++) opened.d[thread] = reinterpret_cast<const Product *>(values[thread])->d;
    for_each_register(opened, [&](float &d, size_t at) { opened.value[at] = d, memset(&d, kPoison, 4); });
    return opened;
}

void complete_wgmma(const uint64_t *values, uint32_t) {
    const auto part = [&](int thread) -> const Product & { return *reinterpret_cast<const Product *>(values[thread]); };
    const Product &first = part(0);
    for (int thread = 1; thread < 128; thread++)
        if (part(thread).n != first.n || part(thread).a != first.a || part(thread).b != first.b ||
            part(thread).accumulate != first.accumulate)
            fail("wgmma: threads of the warpgroup disagree about the product");
    Warpgroup &group = warpgroups[current / 128];
    Accumulator &to = open_accumulator(group, values, first.n);
    uint16_t a[64 * 16], b[256 * 16];
    std::vector<const uint32_t *> a_registers;
    if (first.a_registers) {
        if (!group.fenced_a) fail("wgmma on A's registers without a wgmma_fence since the last wgmma_commit");
        for (int thread = 0; thread < 128; thread++) a_registers.push_back(part(thread).a_registers);
        for (int thread = 0; thread < 128; thread++)
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 2; i++)
                    a[(thread / 32 * 16 + thread % 32 / 4 + 8 * (r & 1)) * 16 + 2 * (thread % 4) + i + 8 * (r >> 1)] =
                        uint16_t(part(thread).a_registers[r] >> 16 * i);
    } else {
        read_operand(first.a, "wgmma's A", 64, true, a, [](const void *p) { check_async_read(p, 16, "wgmma's A"); });
    }
    read_operand(first.b, "wgmma's B", first.n, !first.transpose_b, b,
                 [](const void *p) { check_async_read(p, 16, "wgmma's B"); });
    multiply(to, a, b, first.is_bf16, first.accumulate);
    Pending product = {first.a, first.b, !first.a_registers, first.transpose_b, first.n, 0, group.group, to.d[0],
                       a_registers, fingerprint(a_registers)};
    product.fingerprint = fingerprint(product, [](const void *) {});
    group.pending.push_back(product);
    to.n_pending++;
}

void complete_fence(const uint64_t *, uint32_t) {
    Warpgroup &group = warpgroups[current / 128];
    group.fenced = group.fenced_a = true;
}
void complete_commit(const uint64_t *, uint32_t) {
    Warpgroup &group = warpgroups[current / 128];
    group.group++;
    group.fenced_a = false;
}

void complete_wait(const uint64_t *values, uint32_t) {
    Warpgroup &group = warpgroups[current / 128];
    while (!group.pending.empty() && group.pending.front().group < group.group - int(values[0])) {
        const Pending product = group.pending.front();
        group.pending.pop_front();
        // It may have read until now.
        const auto note = [](const void *p) { note_async_read(p, 16, current / 128 * 4, 4); };
        if (fingerprint(product, note) != product.fingerprint)
            fail("shared memory that a wgmma reads changed between the wgmma and its wgmma_wait");
        if (fingerprint(product.a_registers) != product.a_fingerprint)
            fail("registers that a wgmma reads changed between the wgmma and its wgmma_wait");
        for (auto open = group.accumulators.begin(); open != group.accumulators.end(); ++open) {
            if (open->d[0] != product.first_d || --open->n_pending) continue;
            for_each_register(*open, [&](float &d, size_t at) {
                if (memcmp(&d, &kPoisonedPair, 4)) fail("a wgmma's registers were written before its wgmma_wait");
                d = open->value[at];
            });
            group.accumulators.erase(open);
            break;
        }
    }
    group.fenced = false;
}

}  // namespace

void ldmatrix(uint32_t *d, const void *shared_row, int n_matrices, bool transposed) {
    const Load load = {d, shared_row, n_matrices, transposed};
    warp_collective("ldmatrix", 0xffffffffu, reinterpret_cast<uint64_t>(&load), complete_load);
}

void mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool is_bf16) {
    const WarpMma part = {d, a, b};
    warp_collective("mma_16816", 0xffffffffu, reinterpret_cast<uint64_t>(&part),
                    is_bf16 ? complete_mma<true> : complete_mma<false>);
}

void mma_16832(int *d, const uint32_t *a, const uint32_t *b) {
    const WarpBytesMma part = {d, a, b};
    warp_collective("mma_16832", 0xffffffffu, reinterpret_cast<uint64_t>(&part), complete_bytes_mma);
}

void wgmma(const Product &product) {
    warpgroup_collective("wgmma", reinterpret_cast<uint64_t>(&product), complete_wgmma);
}
void wgmma_fence() { warpgroup_collective("wgmma_fence", 0, complete_fence); }
void wgmma_commit() { warpgroup_collective("wgmma_commit", 0, complete_commit); }
void wgmma_wait(int n_pending) { warpgroup_collective("wgmma_wait", uint64_t(n_pending), complete_wait); }

void start_products() {
    for (Warpgroup &group : warpgroups) {
        group.pending.clear();
        group.accumulators.clear();
        group.group = 0;
        group.fenced = group.fenced_a = false;
    }
}

void finish_products() {
    for (const Warpgroup &group : warpgroups)
        if (!group.pending.empty()) fail("the block ended with a wgmma under way");
}

}  // namespace emulated
