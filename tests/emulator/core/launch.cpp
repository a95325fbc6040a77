// A launch: clusters of blocks one after another; failures and faults become text.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include <vector>

#include "buffers.h"
#include "core.h"

namespace emulated {

namespace {

constexpr int kMaxSeconds = 120;  // of CPU time a launch may take: a loop that never waits is noticed too

constexpr int kMaxPointers = 64;

void *pointers[kMaxPointers];  // the launch's arguments, where kernels may read
sigjmp_buf left;
char *error_text;
size_t error_size;
const char *kernel_name;
bool in_block;

void write_error(const char *format, va_list arguments) {
    int n = snprintf(error_text, error_size, "kernel %s", kernel_name);
    if (in_block)
        n += snprintf(error_text + n, error_size - size_t(n), ", block %u, thread %u", block_index.x, thread_index.x);
    if (size_t(n) + 3 < error_size) {
        n += snprintf(error_text + n, error_size - size_t(n), ": ");
        vsnprintf(error_text + n, error_size - size_t(n), format, arguments);
    }
}

void on_fault(int signal, siginfo_t *info, void *) {
    const int n = snprintf(error_text, error_size, "kernel %s, block %u, thread %u: ", kernel_name, block_index.x,
                           thread_index.x);
    if (signal == SIGSEGV || signal == SIGBUS)
        snprintf(error_text + n, error_size - size_t(n), "touched %s", describe_address(info->si_addr));
    else
        snprintf(error_text + n, error_size - size_t(n), "%s",
                 signal == SIGFPE ? "divided by zero" : "ran for too long without waiting for anything");
    siglongjmp(left, 1);
}

// While it lives, faults of this process end the launch.
class Faults {
   public:
    Faults() {
        static unsigned char stack[64 * 1024];
        stack_t ours = {};
        ours.ss_sp = stack, ours.ss_size = sizeof stack;
        sigaltstack(&ours, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 4; i++) sigaction(kSignals[i], &action, &old_[i]);
        const itimerval limit = {{0, 0}, {kMaxSeconds, 0}};
        setitimer(ITIMER_VIRTUAL, &limit, nullptr);
    }
    ~Faults() {
        const itimerval none = {};
        setitimer(ITIMER_VIRTUAL, &none, nullptr);
        for (int i = 0; i < 4; i++) sigaction(kSignals[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

   private:
    static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
    struct sigaction old_[4];
    stack_t old_stack_;
};

int which_cluster(int i, int n, const std::vector<int> &shuffled) {
    return order == 1 ? n - 1 - i : order == 2 ? shuffled[size_t(i)] : i;
}

}  // namespace

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    write_error(format, arguments);
    va_end(arguments);
    siglongjmp(left, 1);
}

int launch(const Kernel &kernel, Body body, int grid, void **arguments, char *error, size_t error_bytes) {
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_at_a_time);
    error_text = error, error_size = error_bytes, kernel_name = kernel.name, in_block = false;
    std::vector<int> shuffled;
    const int n_clusters = grid / kernel.cluster;
    for (int i = 0; i < n_clusters; i++) shuffled.insert(shuffled.begin() + rand() % (i + 1), i);
    volatile int status = 1;
    {
        Faults faults;
        if (sigsetjmp(left, 1) == 0) {
            n_threads = kernel.n_threads;
            if (kernel.n_pointers > kMaxPointers) fail("%d parameters", kernel.n_pointers);
            memcpy(pointers, arguments, sizeof(void *) * size_t(kernel.n_pointers));
            if (n_threads < 1 || n_threads > kMaxThreads) fail("%d threads; a block has 1 to 1024", n_threads);
            n_fibers = n_threads * kernel.cluster;
            if (grid % kernel.cluster) fail("a grid of %d blocks; clusters have %d", grid, kernel.cluster);
            if (kernel.cluster > kMaxCluster || n_fibers > kMaxThreads || (kernel.cluster > 1 && n_threads % 32))
                fail("clusters of %d blocks of %d threads: the emulator has 8 blocks, 1024 threads and whole warps",
                     kernel.cluster, n_threads);
            block_size = {unsigned(n_threads), 1, 1}, grid_size = {unsigned(grid), 1, 1};
            checked = kernel.checked;
            start_memory(kernel);
            start_blocks();
            for (int i = 0; i < n_clusters; i++) {
                poison_shared(), start_cluster_in_grid();
                start_synchronization(), start_cluster(), start_races(), start_copies(), start_products();
                in_block = true;
                run_cluster(body, pointers, which_cluster(i, n_clusters, shuffled) * kernel.cluster);
                finish_products(), check_shared_end();
                in_block = false;
            }
            check_guards();
            status = 0;
        }
    }
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

}  // namespace emulated

extern "C" void emulated_set_order(int chosen) { emulated::order = chosen; }
