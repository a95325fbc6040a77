"""What is carried to a GPU machine to be checked and tuned: the calls of models, and calls of odd shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from llmc.bench.gpu.kit import call_to_json, layout_to_json
from llmc.bench.gpu.latent_jobs import add_odd_latents
from llmc.bench.gpu.measure import is_decode
from llmc.bench.gpu.state_jobs import add_odd_states
from llmc.compiler.kernel import PAGE_TOKENS, Call, DType, Implementation, Kernel, TensorType
from llmc.compiler.target import Target
from llmc.schedules import records, rule_of
from llmc.schedules.attention_call import input_places
from llmc.schedules.cuda.deferred_norm import settled
from llmc.schedules.cuda.experts.call import DOWN, GATE_UP
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from llmc.schedules.rule import Rule

DECODE_LENGTHS, PROMPT_LENGTHS = (128, 1024, 4096), (2048, 4096)
MORE_WAYS = 12
"""Candidates, where several are asked for, of products of up to MORE_ROWS tokens by weights of 4 bits: they are
furthest from their limit, by instructions that no paper counts well."""
MORE_ROWS = 8
MOST_CACHED_TOKENS = 1 << 16
"""The most cached tokens of all sequences together: 34 GB for a 7B, which leaves room on a card of 80."""


@dataclass
class Jobs:
    """Jobs as kit.json has them, and the kernels that they launch.  tuned: what was measured before."""

    target: Target
    kernels: dict[str, Kernel]
    said: dict[str, dict[str, Any]]
    tuned: records.Tuned = field(default_factory=records.Tuned)

    def add(
        self,
        name: str,
        call: Call,
        most: int,
        lengths: Sequence[int] = (),
        *,
        tuned: bool = True,
        of_chain: bool = False,
        ways: Sequence[Any] = (),
    ) -> None:
        """A call with its `most` best candidates on paper, the rule's own choice first and then what a record says, so
        that it is measured against the others, or in these `ways` alone; a known name is left alone.  of_chain: it is
        there for a chain of layers alone."""
        if name in self.said:
            return
        call = settled(call, self.target)
        rule, own = rule_of(call, self.target)
        recorded, _ = self.tuned.choose(rule, call, self.target, own)
        candidates = ways or list(dict.fromkeys([own, recorded, *rule.space(call, self.target)]))
        signature = records.signature(call, self.target) if tuned else None
        if signature and most > 1 and signature.m <= MORE_ROWS and signature.weight.startswith(("i4", "z4")):
            most = max(most, MORE_WAYS)
        self.said[name] = {
            "name": name,
            "rule": rule.name,
            "call": call_to_json(call),
            "signature": signature._asdict() if signature else None,
            "lengths": list(lengths) if signature else [],
            "of_chain": of_chain,
            "candidates": [self._candidate(rule, call, params) for params in islice(candidates, most)],
        }

    def _candidate(self, rule: Rule, call: Call, params: Any) -> dict[str, Any]:
        implementation = rule.implement(call, params, self.target)
        self.kernels |= {launch.kernel.name: launch.kernel for launch in implementation.launches}
        words = ", ".join(filter(None, (implementation.family, str(params))))
        return {"params": asdict(params), "words": words, **implementation_to_json(implementation)}


def implementation_to_json(implementation: Implementation) -> dict[str, Any]:
    return {
        "launches": [
            {
                "kernel": launch.kernel.name,
                "grid": launch.grid,
                "operands": [[operand.kind, operand.index] for operand in launch.operands],
            }
            for launch in implementation.launches
        ],
        "temps": list(implementation.temps),
        "scratch_bytes": implementation.scratch_bytes,
        "kv_layer_bytes": implementation.kv_layer_bytes,
        "layouts": {str(index): layout_to_json(layout) for index, layout in implementation.layouts.items()},
        "n_bytes": sum(launch.n_bytes for launch in implementation.launches),
        "n_operations": sum(launch.n_operations for launch in implementation.launches),
    }


# -- of models --------------------------------------------------------------------------------------------------------


def add_model(jobs: Jobs, calls: Iterable[Call], most: int) -> None:
    """The calls of a model's plans that can be executed in several ways."""
    for call in calls:
        signature = records.signature(call, jobs.target)
        front = call.attribute("in_front", "")
        if signature is not None:
            name = f"{signature} behind {front}" if front else str(signature)  # its moments may be of other parts
            jobs.add(name, call, 1 if front else most, lengths_of(call), tuned=not front)


def lengths_of(call: Call) -> tuple[int, ...]:
    """Contexts to measure attention at: those that the model has room for, and that a step of M rows can have."""
    if not call.op.endswith("PagedAttention"):
        return ()
    kind = call.inputs[input_places(call)["page_table"]]
    assert kind is not None
    m, room = kind.shape[0], kind.shape[1] * PAGE_TOKENS
    decode = is_decode(m)
    wanted = DECODE_LENGTHS if decode else PROMPT_LENGTHS
    fits = [n for n in wanted if n <= room and (n * m <= MOST_CACHED_TOKENS if decode else n >= m)]
    return tuple(fits) or (min(room, max(m, DECODE_LENGTHS[0])),)


# -- experts ----------------------------------------------------------------------------------------------------------

EXPERTS = {
    "mixtral-8x7b": (2, 8, 14336, 4096),
    "qwen3-30b-a3b": (8, 128, 768, 2048),
    "gpt-oss-20b": (4, 32, 2880, 2880),
}
"""Sizes of one layer: experts of a token, all experts, their width, and that of x."""
CLAMPED = {"gpt-oss-20b": {"alpha": 1.702, "limit": 7.0, "offset": 1.0}}
"""Gates of those that have biases and a clamped gate, and weights in mxfp4; the others' are in bf16."""
EXPERT_ROWS = (1, 4, 8)
OF_EACH_WAY = 2
"""Candidates of each way to execute them: the best on paper."""


def add_experts(jobs: Jobs) -> list[dict[str, Any]]:
    """Layers of mixtures as kit.json has them, and their kernels among those of the jobs."""
    return [
        experts_layer(jobs, name, (m, *shape), CLAMPED.get(name))
        for name, shape in EXPERTS.items()
        for m in EXPERT_ROWS
    ]


def experts_layer(
    jobs: Jobs, name: str, shape: tuple[int, ...], clamp: dict[str, float] | None = None
) -> dict[str, Any]:
    """shape: tokens, experts of each, experts, their width, that of x.  clamp: of the gate, as in CLAMPED."""
    m, chosen, n_experts, n, k = shape
    kind: DType = "m4" if clamp else "bf16"
    weights = ((n_experts, 2 * n, k), (n_experts, k, n))
    inputs = [TensorType((m, k), "f32"), TensorType((m, chosen), "i64"), TensorType((m, chosen), "f32")]
    inputs += [TensorType(weight, kind, constant=True, group=32 if clamp else 0) for weight in weights]
    inputs += [TensorType(weight[:2], "f32", constant=True) for weight in weights if clamp]
    op = "llmc.ExpertsClampedSwishBias" if clamp else "llmc.ExpertsSilu"
    call = Call(op, tuple(inputs), (TensorType((m, k), "f32"),), tuple((clamp or {}).items()))
    rule, _ = rule_of(call, jobs.target)
    families: dict[type, list[Any]] = {}
    for params in rule.space(call, jobs.target):
        families.setdefault(type(params), []).append(params)
    offered = [params for family in families.values() for params in family[:OF_EACH_WAY]]
    layouts = rule.implement(call, offered[0], jobs.target).layouts
    return {
        "name": f"{name} M={m}",
        "shape": list(shape),
        "clamp": clamp,
        "expert_bytes": [layouts[i].n_bytes(inputs[i].shape) // n_experts for i in (GATE_UP, DOWN)],
        "candidates": [jobs._candidate(rule, call, params) for params in offered],
    }


# -- of odd shapes ----------------------------------------------------------------------------------------------------

ODD_LINEAR = (
    ("Linear", 1, 72, 200),
    ("LinearBias", 3, 200, 72),
    ("RMSNormLinear", 2, 136, 264),
    ("LayerNormLinearBiasRelu", 5, 136, 200),
    ("LinearBiasResidual", 7, 100, 648),
    ("RMSNormGatedLinearSilu", 8, 88, 328),
    ("GatedLinearGeluTanhBias", 13, 72, 136),
    ("LinearGelu", 16, 65, 129),
    ("LinearResidual", 17, 200, 200),
    ("LinearBiasRelu", 33, 136, 328),
    ("RMSNormGatedLinearSilu", 40, 136, 264),
    ("LayerNormLinearBiasRelu", 65, 264, 136),
    ("LinearBiasResidual", 129, 328, 200),
    ("RMSNormLinear", 200, 648, 328),
    ("GatedLinearSilu", 300, 264, 200),
    ("LinearSilu", 513, 200, 136),
)
"""Operator, M, N, K; no size is a multiple of a tile."""
KEPT = partial(Gemv, stages=2, side=4, blocks=2, ahead=1, bulk=True, split=2, kept=True)
ODD_WAYS: tuple[tuple[str, DType, int, int, int, int, Tiling | Gemv], ...] = (
    ("LinearBiasResidual", "i4", 32, 1, 200, 1096, KEPT(5, shared_x=True, digits=True)),
    ("LinearResidual", "i4", 32, 3, 136, 1280, KEPT(3, shared_x=True, digits=True, depth=2)),
    ("GatedLinearSilu", "i4", 32, 7, 264, 1096, KEPT(4, shared_x=False)),
    ("LinearBiasRelu", "i4", 32, 5, 200, 1280, KEPT(6, shared_x=False, depth=2)),
    ("LinearBiasResidual", "bf16", 0, 513, 328, 200, Tiling(128, 3, 4, band=2, turns=2, quick=True)),
    ("GatedLinearSilu", "bf16", 0, 300, 264, 200, Tiling(152, 4, 4, cluster=2, turns=1, quick=True)),
    ("LinearResidual", "f16", 0, 520, 200, 1096, Tiling(112, 6, 6, cluster=2, turns=2, quick=True)),
    ("LinearBiasRelu", "bf16", 0, 512, 1280, 264, Tiling(256, 5, 3, False, band=2, turns=1, quick=True)),
    ("GatedLinearGeluTanhBias", "i8", 0, 257, 200, 392, Tiling(128, 6, 4, turns=2, quick=True)),
    ("LinearResidual", "i4", 32, 300, 328, 200, Tiling(160, 4, 2, False, turns=1, quick=True)),
    ("LinearBiasResidual", "bf16", 0, 768, 384, 200, Tiling(256, 4, 4, quick=True)),
    ("GatedLinearSilu", "f16", 0, 300, 72, 136, Tiling(104, 4, 3, False, quick=True)),
)
"""What is offered for large products alone, or where x comes tiled, made to meet edges, parts of tiles, and warps
without a column.  Operator, dtype, group, M, N, K."""
ODD_ATTENTION: tuple[tuple[int, int, int, int, int, dict[str, Any]], ...] = (
    (1, 4, 2, 64, 64, {}),
    (2, 6, 2, 64, 0, {"slopes": True}),
    (3, 4, 4, 128, 128, {}),
    (17, 6, 2, 96, 32, {"interleaved": 1}),
    (5, 4, 2, 64, 64, {"window": 70, "softcap": 20.0}),
    (3, 6, 2, 128, 64, {"epsilon": 1e-6}),
    (8, 8, 1, 80, 0, {"sinks": True}),
    (70, 4, 2, 64, 64, {}),
    (90, 3, 3, 80, 80, {"epsilon": 1e-5}),
    (130, 4, 4, 128, 0, {"slopes": True}),
    (150, 6, 2, 80, 0, {"window": 90, "sinks": True}),
    (7, 4, 2, 64, 64, {"window": -50, "epsilon": 1e-6}),
    (160, 5, 1, 128, 128, {"window": -70}),
    (20, 4, 2, 64, 0, {"both_ways": True}),
    (150, 4, 4, 64, 64, {"both_ways": True, "window": 40}),
    (170, 2, 1, 256, 256, {"both_ways": True, "window": 30, "epsilon": 1e-6}),
    (300, 3, 3, 32, 0, {"both_ways": True}),
)
"""Rows, heads, key heads, D, how much of it is turned, and what is special."""
KV_DTYPES = ("bf16", "f16", "int8")
ODD_PAGES = 9


def add_odd(jobs: Jobs, most: int, *, few: bool = False) -> None:
    """Shapes that fill no tile, in every operator and dtype; few: a handful, for a try."""
    for op, m, n, k in ODD_LINEAR[:: 5 if few else 1]:
        for dtype, group in weights_of(m, few):
            jobs.add(odd_name(op, dtype, group, m, n, k), linear_call(op, m, n, k, dtype, group), most, tuned=False)
    for op, dtype, group, m, n, k, tiling in () if few else ODD_WAYS:
        call = linear_call(op, m, n, k, dtype, group)
        if DEVICES[jobs.target.arch].wgmma:
            jobs.add(f"{odd_name(op, dtype, group, m, n, k)} by {tiling}", call, most, tuned=False, ways=(tiling,))
    for shape in ODD_ATTENTION[:: 6 if few else 1]:
        for kv_dtype in KV_DTYPES[:: 2 if few else 1]:
            name = f"odd attention {kv_dtype} M={shape[0]} H={shape[1]} KH={shape[2]} D={shape[3]}"
            special = "".join(f" {key}={value}" for key, value in shape[5].items())
            jobs.add(name + special, attention_call(*shape[:5], kv_dtype, **shape[5]), most, tuned=False)
    add_odd_states(jobs, few=few)
    if not few:
        add_odd_latents(jobs, most)


def odd_name(op: str, dtype: str, group: int, m: int, n: int, k: int) -> str:
    family = "gemv" if m <= 16 else "gemm"
    return f"odd {family} {op} {dtype}{f'g{group}' if group else ''} [{n}, {k}] M={m}"


def weights_of(m: int, few: bool) -> Iterator[tuple[DType, int]]:
    """How the weight of an odd shape is stored, and its group: in every way, for some."""
    yield "bf16", 0
    if few:
        return
    yield "f16", 0
    if m in (1, 8, 17, 200):
        yield from (("i8", 0), ("i4", 32), ("f8", 0))
    if m in (1, 33):
        yield "f32", 0


def linear_call(name: str, m: int, n: int, k: int, dtype: DType, group: int) -> Call:
    """x and y tiled every other time; vectors in the dtype that is multiplied."""
    vector_dtype: DType = "bf16" if dtype in ("i8", "i4", "f8") else dtype
    norms = 1 if name.startswith("RMSNorm") else 2 if name.startswith("LayerNorm") else 0
    tiled = dtype != "f32" and not norms and m % 2 == 1
    x = TensorType((m, k), vector_dtype if tiled else "f32", tiled=tiled)
    rows = 2 * n if "Gated" in name else n
    inputs = [x, *[TensorType((k,), vector_dtype, constant=True)] * norms]
    inputs.append(TensorType((rows, k), dtype, constant=True, group=group))
    if "Bias" in name:
        inputs.append(TensorType((rows,), vector_dtype, constant=True))
    if "Residual" in name:
        inputs.append(TensorType((m, n), "f32"))
    y_tiled = dtype != "f32" and "Residual" not in name and m % 4 != 1
    y = TensorType((m, n), vector_dtype if y_tiled else "f32", tiled=y_tiled)
    return Call(f"llmc.{name}", tuple(inputs), (y,), (("epsilon", 1e-5),) if norms else ())


def attention_call(
    m: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    dtype: str,
    *,
    sinks: bool = False,
    slopes: bool = False,
    both_ways: bool = False,
    **special: Any,
) -> Call:
    """A layer's attention, the first of two; an int8 cache is one of a bf16 model.  sinks, slopes: whether heads have
    them.  both_ways: over all of a text."""
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "head_dim": dim,
        "scale": dim**-0.5,
        "softcap": 0.0,
        "window": 0,
        "n_layers": 2,
        "kv_dtype": dtype,
        "page_tokens": PAGE_TOKENS,
        **({"interleaved": 0, "rotary_dim": rotary_dim} if rotary_dim else {}),
        **special,
    }
    qkv = TensorType((m, (heads + 2 * kv_heads) * dim), "f32")
    turn = [TensorType((m, rotary_dim // 2), "f32")] * 2 if rotary_dim else []
    ids = [TensorType((m,), "i32"), TensorType((m, ODD_PAGES), "i32")]
    cache = TensorType((1, kv_heads, PAGE_TOKENS, dim), "f32")
    out = TensorType((m, heads * dim), "f16" if dtype == "f16" else "bf16", tiled=True)
    norms = [TensorType((dim,), "bf16", constant=True)] * 2 if "epsilon" in special else []
    of_heads = [TensorType((heads,), "f32", constant=True)] * (sinks + slopes)
    kind = f"{'RMSNorm' if norms else ''}{'Rotary' if rotary_dim else ''}{'Sink' * sinks}{'Alibi' * slopes}"
    inputs = (qkv, *norms, *turn, *of_heads, *ids, cache, cache)
    kind += "Bidirectional" * both_ways
    return Call(f"llmc.{kind}PagedAttention", inputs, (out, cache, cache), tuple(sorted(attributes.items())))
