"""Small kernels that each use one part of the machine as it is meant to be used; tests break them."""

REVERSE = """
extern "C" __global__ void k(const float *x, float *y) {
    float *s = reinterpret_cast<float *>(dynamic_shared());
    const int i = threadIdx.x;
    s[i] = x[128 * blockIdx.x + i];
    __syncthreads();
    y[128 * blockIdx.x + i] = s[127 - i];
}
"""

WARP = """
extern "C" __global__ void k(const float *x, float *y) {
    const float v = x[threadIdx.x];
    float sum = warp_sum(v);
    y[threadIdx.x] = sum;
    y[128 + threadIdx.x] = warp_max(v);
    y[256 + threadIdx.x] = __popc(__ballot_sync(0xffffffffu, v > 0));
}
"""

# Warps 2 and 3 bring data for all; only warps 0 and 1 wait for it.
NAMED = """
extern "C" __global__ void k(const float *x, float *y) {
    float *s = reinterpret_cast<float *>(dynamic_shared());
    const int i = threadIdx.x;
    if (i >= 64) {
        s[i - 64] = x[i];
        named_barrier_arrive(1, 128);
        y[i] = x[i];
    } else {
        named_barrier(1, 128);
        y[i] = s[i];
    }
}
"""

# partial[block] = the sum of a row; whoever comes last adds those up.
COUNTER = """
extern "C" __global__ void k(const float *x, float *partial, uint32_t *counter, float *y) {
    __shared__ float sums[4];
    __shared__ bool last;
    const float sum = warp_sum(x[128 * blockIdx.x + threadIdx.x]);
    const int warp = warp_index();
    if (lane_index() == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 37) partial[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    __syncthreads();  // partial is written
    if (threadIdx.x == 0) last = count_up(counter) == gridDim.x - 1;
    __syncthreads();  // last is known
    if (last && threadIdx.x == 0) {
        float total = 0;
        for (int i = 0; i < gridDim.x; i++) total += partial[i];
        *y = total;
        *counter = 0;
    }
}
"""

SPIN = """
extern "C" __global__ void k(uint32_t *counter) {
    if (threadIdx.x == 0) {
        count_up(counter);
        while (load_acquire(counter) < gridDim.x) {}
    }
}
"""

COPIES = """
extern "C" __global__ void k(const float *x, float *y) {
    unsigned char *s = dynamic_shared();
    const int i = threadIdx.x;
    cp_async_16(s + 16 * i, x + 4 * i);
    cp_async_commit();
    cp_async_16(s + 2048 + 16 * i, x + 512 + 4 * i);
    cp_async_commit();  // second
    cp_async_wait<0>();
    __syncthreads();
    const float *mine = reinterpret_cast<const float *>(s + 16 * i);
    const float *other = reinterpret_cast<const float *>(s + 2048 + 16 * (127 - i));
    for (int k = 0; k < 4; k++) y[4 * i + k] = mine[k] + other[k];
}
"""

# Warp 4 brings seven rows into a ring of two; 128 threads add them up.
PIPELINE = """
extern "C" __global__ void k(const float *x, float *y) {
    unsigned char *s = dynamic_shared();
    uint64_t *full = reinterpret_cast<uint64_t *>(s + 1024), *empty = full + 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, 128);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp_index() == 4) {
        if (lane_index() == 0) {
            for (int t = 0; t < 7; t++) {
                const int stage = t % 2, parity = t / 2 % 2;
                mbarrier_wait(empty + stage, parity ^ 1);
                mbarrier_arrive_expect(full + stage, 512);
                bulk_copy(s + 512 * stage, x + 128 * t, 512, full + stage);
            }
        }
        return;
    }
    float sum = 0;
    for (int t = 0; t < 7; t++) {  // consumer
        const int stage = t % 2, parity = t / 2 % 2;
        mbarrier_wait(full + stage, parity);
        sum += reinterpret_cast<const float *>(s + 512 * stage)[threadIdx.x];
        mbarrier_arrive(empty + stage);
    }
    y[threadIdx.x] = sum;
}
"""

# D[16,8] = A[16,16] B[8,16]^T twice: fragments by plain loads, and by ldmatrix.
FRAGMENTS = """
__device__ uint32_t pair(const uint32_t *rows, int row, int index) { return rows[8 * row + index]; }

__device__ void put(float *y, const float (&d)[4], int g, int t) {
    for (int i = 0; i < 4; i++) y[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

extern "C" __global__ void k(const T_ *pa_, const T_ *pb_, float *y, float *z) {
    const uint32_t *pa = reinterpret_cast<const uint32_t *>(pa_), *pb = reinterpret_cast<const uint32_t *>(pb_);
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t a[4], b[2];
    a[0] = pair(pa, g, t);
    a[1] = pair(pa, g + 8, t);
    a[2] = pair(pa, g, t + 4);
    a[3] = pair(pa, g + 8, t + 4);
    b[0] = pair(pb, g, t);
    b[1] = pair(pb, g, t + 4);
    float d[4] = {};
    mma_16816<T_>(d, a, b);
    put(y, d, g, t);

    unsigned char *s = dynamic_shared();
    const int row = lane_index() % 8, matrix = lane_index() / 8;
    *reinterpret_cast<uint4 *>(s + 16 * lane_index()) = load_16(pa + 4 * lane_index());
    if (lane_index() < 16) *reinterpret_cast<uint4 *>(s + 512 + 16 * lane_index()) = load_16(pb + 4 * lane_index());
    __syncwarp();
    uint32_t a2[4], b2[2];
    ldmatrix_x4(a2, s + 32 * (row + 8 * (matrix % 2)) + 16 * (matrix / 2));
    ldmatrix_x2(b2, s + 512 + 32 * row + 16 * (matrix % 2));
    float e[4] = {};
    mma_16816<T_>(e, a2, b2);
    put(z, e, g, t);
}
"""

# D[64,64] = A[64,128] B[64,128]^T; both operands are two slabs of 64 columns in 128-byte swizzled rows.
PRODUCT = """
extern "C" __global__ void k(const unsigned char *ga, const unsigned char *gb, float *y) {
    unsigned char *s = dynamic_shared(), *b = s + 16384;
    uint64_t *full = reinterpret_cast<uint64_t *>(s + 32768);
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full, 32768);
        bulk_copy(s, ga, 16384, full);
        bulk_copy(b, gb, 16384, full);
    }
    mbarrier_wait(full, 0);
    float d[32];
    wgmma_fence(d);
    for (int slab = 0; slab < 2; slab++, b += 8192)
        for (int k = 0; k < 4; k++)
            wgmma<64, bf16>(d, k_major_descriptor(s + 8192 * slab, k), k_major_descriptor(b, k), slab > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<0>(d);
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int i = 0; i < 32; i++)
        y[64 * (16 * warp_index() + g + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * t + i % 2] = d[i];
}
"""

# D[64,64] = A[64,64] V[64,64], A from registers and V as it lies: row k holds 64 n.
REGISTERS_A = """
extern "C" __global__ void k(const float *a, const bf16 *v, float *y) {
    unsigned char *s = dynamic_shared();
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        const int row = i / 8, chunk = i % 8;
        *reinterpret_cast<uint4 *>(s + 128 * row + 16 * (chunk ^ (row & 7))) = load_16(v + 64 * row + 8 * chunk);
    }
    fence_async_shared();
    __syncthreads();
    const int g = 16 * warp_index() + lane_index() / 4, t = lane_index() % 4;
    float d[32];
    uint32_t fragments[4][4];
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) {
            const float *from = a + 64 * (g + 8 * (i % 2)) + 16 * k + 8 * (i / 2) + 2 * t;
            fragments[k][i] = pack2<bf16>(from[0], from[1]);
        }
    wgmma_fence(d);
    for (int k = 0; k < 4; k++) wgmma<64, bf16, true>(d, fragments[k], n_major_descriptor(s, 8192, k), k > 0);
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int i = 0; i < 32; i++) y[64 * (g + 8 * (i / 2 % 2)) + 8 * (i / 4) + 2 * t + i % 2] = d[i];
}
"""
