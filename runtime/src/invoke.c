/* invoke.c - calls a kernel with as many pointers as it takes. */
#include "runtime.h"

/* FOR_n(f) is f(0), f(1), … f(n - 1). */
#define FOR_1(f) f(0)
#define FOR_2(f) FOR_1(f), f(1)
#define FOR_3(f) FOR_2(f), f(2)
#define FOR_4(f) FOR_3(f), f(3)
#define FOR_5(f) FOR_4(f), f(4)
#define FOR_6(f) FOR_5(f), f(5)
#define FOR_7(f) FOR_6(f), f(6)
#define FOR_8(f) FOR_7(f), f(7)
#define FOR_9(f) FOR_8(f), f(8)
#define FOR_10(f) FOR_9(f), f(9)
#define FOR_11(f) FOR_10(f), f(10)
#define FOR_12(f) FOR_11(f), f(11)
#define FOR_13(f) FOR_12(f), f(12)
#define FOR_14(f) FOR_13(f), f(13)
#define FOR_15(f) FOR_14(f), f(14)
#define FOR_16(f) FOR_15(f), f(15)
#define FOR_17(f) FOR_16(f), f(16)
#define FOR_18(f) FOR_17(f), f(17)
#define FOR_19(f) FOR_18(f), f(18)
#define FOR_20(f) FOR_19(f), f(19)
#define FOR_21(f) FOR_20(f), f(20)
#define FOR_22(f) FOR_21(f), f(21)
#define FOR_23(f) FOR_22(f), f(22)
#define FOR_24(f) FOR_23(f), f(23)

#define TYPE(i) void *
#define VALUE(i) at(arguments + i, thread)
#define CASE(n) \
    case n: return ((int32_t (*)(FOR_##n(TYPE), int32_t, int32_t))function)(FOR_##n(VALUE), task, n_tasks);

static void *at(const argument *argument, uint64_t thread)
{
    return argument->pointer + thread * argument->thread_stride;
}

int32_t invoke(const call *call, int32_t thread_number, int32_t task)
{
    void (*function)(void) = (void (*)(void))call->kernel->function;
    const argument *arguments = call->arguments; /* [n_pointers] */
    uint64_t thread = (uint64_t)thread_number;
    int32_t n_tasks = (int32_t)call->n_tasks;
    switch (call->kernel->n_pointers) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
        CASE(17) CASE(18) CASE(19) CASE(20) CASE(21) CASE(22) CASE(23) CASE(24)
    }
    return -1; /* not reached: plan.c has checked the number */
}
