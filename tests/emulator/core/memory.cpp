// Shared memory of each block of a cluster with a page behind it that nobody may touch, the launch's buffers, and what an address means.
#include <link.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "buffers.h"
#include "core.h"

namespace emulated {

namespace {

constexpr size_t kPage = 4096;

constexpr size_t kWindowSpan = kWindowBytes + kPage;

unsigned char *windows;                     // of each block of a cluster kWindowBytes, then a forbidden page
unsigned char *first_dynamic;               // the launch's part of the first: ends where the forbidden page begins
uint32_t dynamic_bytes, rounded_bytes;      // as asked for; up to 1024
unsigned char *variables;                   // `__shared__` variables: this library's thread-local segment
size_t variable_bytes;

struct Image {  // of a library in memory
    const unsigned char *start, *end;
    bool holds(const unsigned char *p) const { return start <= p && p < end; }
} core_image, kernel_image;

unsigned char *dynamic_of(int rank) { return first_dynamic + size_t(rank) * kWindowSpan; }
unsigned char *dynamic() { return dynamic_of(rank_of(current)); }

void *known_marker;                         // among those variables

emulated_buffer buffers[kMaxBuffers];
char names[kMaxBuffers][48];
bool constant[kMaxBuffers];
int n_buffers;

Image image_of(const dl_phdr_info &info) {
    Image image = {};
    for (int i = 0; i < info.dlpi_phnum; i++) {
        const auto &segment = info.dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        const auto *start = reinterpret_cast<const unsigned char *>(info.dlpi_addr + segment.p_vaddr);
        if (!image.start || start < image.start) image.start = start;
        if (start + segment.p_memsz > image.end) image.end = start + segment.p_memsz;
    }
    return image;
}

// Finds this library, and the one whose thread-local segment holds `marker`.
int find_images(dl_phdr_info *info, size_t, void *marker) {
    const Image image = image_of(*info);
    if (image.holds(reinterpret_cast<const unsigned char *>(&core_image))) core_image = image;
    auto *data = static_cast<unsigned char *>(info->dlpi_tls_data);
    for (int i = 0; data && i < info->dlpi_phnum; i++) {
        const auto &segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_TLS || marker < data || data + segment.p_memsz <= marker) continue;
        kernel_image = image, variables = data, variable_bytes = segment.p_memsz;
    }
    return 0;
}

}  // namespace

void start_memory(const Kernel &kernel) {
    const uint32_t shared_bytes = kernel.shared_bytes;
    if (!windows) {
        windows = static_cast<unsigned char *>(mmap(nullptr, kMaxCluster * kWindowSpan, PROT_READ | PROT_WRITE,
                                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        for (int i = 0; i < kMaxCluster; i++) mprotect(windows + i * kWindowSpan + kWindowBytes, kPage, PROT_NONE);
    }
    void *const marker = kernel.variables();
    if (marker != known_marker) {
        dl_iterate_phdr(find_images, marker);
        known_marker = marker;
    }
    if (shared_bytes > kDynamicLimit) fail("%u bytes of shared memory; a block has %u", shared_bytes, kDynamicLimit);
    if (variable_bytes > kWindowBytes - kStaticAddress) fail("%zu bytes of __shared__ variables", variable_bytes);
    dynamic_bytes = shared_bytes;
    rounded_bytes = (shared_bytes + 1023) / 1024 * 1024;
    first_dynamic = windows + kWindowBytes - rounded_bytes;
}

void poison_shared() {
    for (int rank = 0; rank < n_blocks(); rank++) memset(dynamic_of(rank), kPoison, rounded_bytes);
    memset(variables, kPoison, variable_bytes);
}

void check_shared_end() {
    for (int rank = 0; rank < n_blocks(); rank++)
        for (uint32_t i = dynamic_bytes; i < rounded_bytes; i++)
            if (dynamic_of(rank)[i] != kPoison)
                fail("wrote to shared memory + %#x; the launch has %#x bytes", i, dynamic_bytes);
}

unsigned char *dynamic_shared() {
    if (!dynamic_bytes) fail("dynamic_shared(), but the launch declares no shared memory");
    return dynamic();
}

const unsigned char *buffer_start(int buffer) { return static_cast<const unsigned char *>(buffers[buffer].start); }
bool buffer_is_constant(int buffer) { return constant[buffer]; }
size_t buffer_bytes(int buffer) { return buffers[buffer].n_bytes; }

Place classify(const void *p, size_t n_bytes, int *buffer) {
    if (is_stack(p)) return Place::own;
    const auto *at = static_cast<const unsigned char *>(p), *end = at + n_bytes;
    if (dynamic() <= at && end <= dynamic() + dynamic_bytes) return Place::shared;
    if (core_image.holds(at) || kernel_image.holds(at)) return Place::own;
    if (variables <= at && end <= variables + variable_bytes) {
        if (n_blocks() > 1) fail("a __shared__ variable in a cluster: the emulator has one for all its blocks");
        return Place::shared;
    }
    *buffer = -1;
    if (!n_buffers) return Place::global;
    static int last = 0;
    for (int i = 0; i < n_buffers; i++) {
        const int which = (last + i) % n_buffers;
        const auto *start = static_cast<const unsigned char *>(buffers[which].start);
        if (start <= at && end <= start + buffers[which].n_bytes) {
            *buffer = last = which;
            return Place::global;
        }
    }
    return Place::nowhere;
}

uint32_t shared_address(const void *shared) {
    const auto *at = static_cast<const unsigned char *>(shared);
    if (dynamic() <= at && at <= dynamic() + rounded_bytes) return uint32_t(at - dynamic());
    if (variables <= at && at < variables + variable_bytes) return uint32_t(kStaticAddress + (at - variables));
    fail("%p is no pointer to shared memory", shared);
}

uint32_t cluster_offset(const void *shared) {
    const auto *at = static_cast<const unsigned char *>(shared);
    for (int rank = 0; rank < n_blocks(); rank++)
        if (dynamic_of(rank) <= at && at <= dynamic_of(rank) + rounded_bytes)
            return uint32_t(rank) * kWindowBytes + uint32_t(at - dynamic_of(rank));
    return shared_address(shared);
}

unsigned char *shared_of(int rank, const void *shared) { return dynamic_of(rank) + shared_address(shared); }

unsigned char *shared_pointer(uint32_t address, uint32_t n_bytes, const char *what) {
    if (address >= kStaticAddress && address - kStaticAddress + n_bytes <= variable_bytes)
        return variables + (address - kStaticAddress);
    if (address + n_bytes > dynamic_bytes)
        fail("%s touches shared memory + %#x .. %#x; the launch has %#x bytes", what, address, address + n_bytes,
             dynamic_bytes);
    return dynamic() + address;
}

void check_global(const void *global, size_t n_bytes, size_t alignment, const char *what) {
    const auto at = reinterpret_cast<uintptr_t>(global);
    if (at % alignment) fail("%s of %s: not aligned to %zu bytes", what, describe_address(global), alignment);
    if (!n_buffers) return;
    for (int i = 0; i < n_buffers; i++) {
        const auto start = reinterpret_cast<uintptr_t>(buffers[i].start);
        if (start <= at && at + n_bytes <= start + buffers[i].n_bytes) return check_waited(i, false);
    }
    fail("%s of %zu bytes at %s", what, n_bytes, describe_address(global));
}

void check_atomic(const void *memory, size_t n_bytes, const char *what) {
    const auto at = reinterpret_cast<uintptr_t>(memory);
    int buffer;
    if (at % n_bytes) fail("%s at %s: not aligned to %zu bytes", what, describe_address(memory), n_bytes);
    if (classify(memory, n_bytes, &buffer) != Place::shared) check_global(memory, n_bytes, n_bytes, what);
}

uint64_t load(const void *memory, size_t n_bytes) {
    uint64_t value = 0;
    memcpy(&value, memory, n_bytes);
    return value;
}

void store(void *memory, uint64_t value, size_t n_bytes) { memcpy(memory, &value, n_bytes); }

const char *describe_address(const void *p) {
    static char text[160];
    const auto *at = static_cast<const unsigned char *>(p);
    for (int rank = 0; rank < n_blocks(); rank++) {
        const unsigned char *start = dynamic_of(rank);
        if (at < start || start + rounded_bytes + kPage <= at) continue;
        const char *whose = rank == rank_of(current) ? "" : "another block's ";
        snprintf(text, sizeof text, "%sshared memory + %#zx (of %#x)", whose, size_t(at - start), dynamic_bytes);
        return text;
    }
    if (variables <= at && at < variables + variable_bytes) {
        snprintf(text, sizeof text, "shared memory + %#zx", kStaticAddress + size_t(at - variables));
        return text;
    }
    const emulated_buffer *nearest = nullptr;
    long distance = 0;
    for (int i = 0; i < n_buffers; i++) {
        const auto *start = static_cast<const unsigned char *>(buffers[i].start);
        const long past = at - (start + buffers[i].n_bytes), before = start - at;
        if (past < 0 && before <= 0) {
            snprintf(text, sizeof text, "%s + %ld", buffers[i].name, long(at - start));
            return text;
        }
        const long away = past >= 0 ? past : before;
        if (!nearest || away < labs(distance)) nearest = &buffers[i], distance = past >= 0 ? past : -before;
    }
    if (nearest && labs(distance) < (1L << 24))
        snprintf(text, sizeof text, "%ld bytes %s %s (of %zu bytes)", labs(distance),
                 distance >= 0 ? "past the end of" : "before", nearest->name, nearest->n_bytes);
    else
        snprintf(text, sizeof text, "%p, which is in no operand", p);
    return text;
}

void check_guards() {
    for (int i = 0; i < n_buffers; i++) {
        const auto *guard = static_cast<const unsigned char *>(buffers[i].start) + buffers[i].n_bytes;
        for (size_t k = 0; k < buffers[i].guard_bytes; k++)
            if (guard[k] != kPoison) fail("wrote %zu bytes past the end of %s", k, buffers[i].name);
    }
}

}  // namespace emulated

extern "C" void emulated_set_buffers(const emulated_buffer *given, int count) {
    emulated::dependent = false;
    emulated::n_buffers = count < emulated::kMaxBuffers ? count : emulated::kMaxBuffers;
    for (int i = 0; i < emulated::n_buffers; i++) {
        emulated::buffers[i] = given[i], emulated::constant[i] = false;
        snprintf(emulated::names[i], sizeof emulated::names[i], "%s", given[i].name);
        emulated::buffers[i].name = emulated::names[i];
    }
}

extern "C" void emulated_mark_constant(int buffer) { emulated::constant[buffer] = true; }
