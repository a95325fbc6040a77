"""Routers of experts on a GPU: the k experts of each token and their shares, in one launch (include/router.cuh)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isinf

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, RowMajor, short_hash
from llmc.compiler.ops import DOMAIN, ROUTERS, router_fits
from llmc.compiler.target import Target
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.rule import Rule

WARPS = 4


@dataclass(frozen=True)
class Router:
    """`tokens` rows of scores of `experts`, of which each takes `chosen`.

    least: shares are divided by their sum, or by this if it is larger; None: they are not divided.  groups: of experts;
    1 if there are none; `kept` of them stay, by the sum of the `best` largest scores of each, and scores of the others
    become `fill`.
    """

    tokens: int
    experts: int
    chosen: int
    sigmoid: bool
    bias: bool
    least: float | None
    groups: int = 1
    kept: int = 1
    best: int = 1
    fill: float = 0.0

    def __str__(self) -> str:
        return "a warp a token"


def match(call: Call, target: Target) -> Router | None:
    domain, _, name = call.op.rpartition(".")
    if domain != DOMAIN or name not in ROUTERS:
        return None
    x, *bias = call.inputs
    scores, _, groups, normed = ROUTERS[name]
    if x is None or x.dtype != "f32" or x.tiled or any(b is None or not b.constant for b in bias):
        return None
    tokens, experts = x.shape
    least = float(call.attribute("least")) if normed else None
    router = Router(tokens, experts, call.attribute("k"), scores == "Sigmoid", bool(bias), least)
    if groups:
        count, kept, best, fill = (call.attribute(key) for key in ("num_groups", "kept", "best", "fill"))
        router = replace(router, groups=count, kept=kept, best=best, fill=float(fill))
    return router if router_fits(router.experts, router.chosen, router.groups, router.best) else None


def implement(call: Call, router: Router, target: Target) -> Implementation:
    key = f"router_source({router!r})"
    name = f"router_m{router.tokens}_{router.chosen}of{router.experts}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(router_source, name, router), n_threads=32 * WARPS, dependent=True)
    inputs = [Operand("input", index) for index in range(1 + router.bias)]
    operands = (*inputs, Operand("output", 0), Operand("output", 1))
    n_bytes = 4 * router.tokens * router.experts + 12 * router.tokens * router.chosen + 4 * router.experts * router.bias
    launch = Launch(kernel, operands, ceil(router.tokens / WARPS), n_bytes, 2 * router.tokens * router.experts)
    layouts: dict[int, Layout] = {1: RowMajor("f32")} if router.bias else {}
    return Implementation((launch,), layouts=layouts)


def router_source(name: str, router: Router) -> str:
    """The kernel's CUDA C++."""
    sizes = {"kTokens": router.tokens, "kExperts": router.experts, "kChosen": router.chosen}
    sizes |= {"kGroups": router.groups, "kKept": router.kept, "kBest": router.best}
    flags = {"kSigmoid": router.sigmoid, "kBias": router.bias, "kNormed": router.least is not None}
    fill = ("-INFINITY" if router.fill < 0 else "INFINITY") if isinf(router.fill) else f"{router.fill!r}f"
    bias = "const float *bias, " if router.bias else ""
    return (
        '#include "router.cuh"\n\n'
        "struct Sizes {\n"
        f"    static constexpr int {', '.join(f'{key} = {value}' for key, value in sizes.items())};\n"
        f"    static constexpr bool {', '.join(f'{key} = {c_bool(value)}' for key, value in flags.items())};\n"
        f"    static constexpr float kLeast = {router.least or 0.0!r}f;\n"
        f"    static __device__ float fill() {{ return {fill}; }}\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * WARPS})\n'
        f"{name}(const float *x, {bias}float *share, long long *index) {{\n"
        f"    route<Sizes>(x, {'bias' if router.bias else 'nullptr'}, share, index);\n}}\n"
    )


RULES = (Rule("router", match, implement),)
