"""One layer's experts of mixtures: are their kernels right, and how fast are they beside PyTorch's?

Weights are bits that mean nothing, as large as the model's; tokens choose their experts by chance, in several ways one
after the other, so that no cache holds what a step reads.  Of few experts the weights are read from the device again,
and the result is worked out in float32; the other candidates must give what the first one does.  Where that is too
much to read, the first one is unchecked, and the report says so.

Of gpt-oss experts have biases, a clamped gate and weights in mxfp4; PyTorch's have its weights in bf16, and no biases.

    loop      as transformers has it: for each expert its tokens, two products, and an addition by index
    grouped   PyTorch's grouped product over tokens that are sorted by expert, where it has one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from llmc.bench.gpu import bits, mxfp4
from llmc.bench.gpu.bits import Array
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.inputs import normal
from llmc.bench.gpu.journal import Journal, one_line
from llmc.bench.gpu.kit import Candidate, Kit, candidate_of
from llmc.bench.gpu.measure import Random, Size, time_us
from llmc.bench.gpu.memory import launches
from llmc.compiler.kernel import Operand
from llmc.schedules.cuda.tile_layout import GatedTiles, Tiles

STAGE = "experts"
CHOICES = 4
"""Ways to choose, of which each has its turn."""
MOST_READ_BYTES = 800 << 20
"""The most bytes of weights that are read back and worked with on the CPU."""
TOLERANCE = 2**-6
REPEATS = 7


def items(kit: Kit) -> Iterator[str]:
    yield from (said["name"] for said in kit.said.get("experts", []))


def runner(device: Device, kit: Kit) -> Callable[[str], dict[str, Any]]:
    """run(item) -> µs of each candidate, of PyTorch's ways, GB/s of the best; raises ValueError for a wrong result."""
    settings = kit.said["settings"]
    size, random = Size(settings["l2_bytes"], settings["shortest_ms"], settings["replays"]), Random(device)

    def run(name: str) -> dict[str, Any]:
        said = next(each for each in kit.said["experts"] if each["name"] == name)
        candidates = [candidate_of(each) for each in said["candidates"]]
        with device.kept():
            layer = Layer(device, random, said)
            times: list[dict[str, Any]] = []
            known = expected = layer.expected()
            for candidate in candidates:
                places = [layer.places(candidate, choice) for choice in range(CHOICES)]
                us, _ = time_us(device, [launches(device, kit, candidate, each) for each in places], size)
                y = layer.result(launches(device, kit, candidate, places[0]), places[0])
                if expected is None:
                    expected = y
                refuse_wrong(y, expected, candidate.words)
                times.append({"words": candidate.words, "us": us, "params": candidate.params})
            n_bytes = layer.chosen_bytes()
        best = min(float(entry["us"]) for entry in times)
        return {
            "us": best,
            "checked": known is not None,
            "candidates": times,
            "bytes": n_bytes,
            "gb_per_s": n_bytes / best / 1e3,
            **peers(said),
        }

    return run


def refuse_wrong(y: Array, expected: Array, words: str) -> None:
    error = float(np.abs(y - expected).max()) / (float(np.abs(expected).max()) or 1.0)
    if not error <= TOLERANCE:
        raise ValueError(f"{words}: wrong by {error:.3g} of the largest result")


class Layer:
    """A layer's experts in the device's memory; said: what kit.json says of them."""

    def __init__(self, device: Device, random: Random, said: dict[str, Any]) -> None:
        self.device, self.said = device, said
        self.tokens, self.chosen, self.n_experts, self.n, self.k = said["shape"]
        self.x = bits.exact(normal(said["name"], (self.tokens, self.k)), "bf16")
        self.index = [choice(self.tokens, self.chosen, self.n_experts, seed) for seed in range(CHOICES)]
        self.share = np.full((self.tokens, self.chosen), 1 / self.chosen, np.float32)
        self.biases: list[Array] = []
        if said["clamp"]:
            weights = [self.mxfp4_weights(n_bytes, which) for which, n_bytes in enumerate(said["expert_bytes"])]
            widths = {"up": 2 * self.n, "down": self.k}
            self.biases = [normal(f"{said['name']} {name}", (self.n_experts, width)) for name, width in widths.items()]
        else:
            weights = [random.bytes(self.n_experts * n_bytes) for n_bytes in said["expert_bytes"]]
        vectors = [device.upload(bias) for bias in self.biases]
        self.inputs = [device.upload(self.x), 0, device.upload(self.share), *weights, *vectors]
        self.indices = [device.upload(index) for index in self.index]
        self.y = device.allocate(4 * self.tokens * self.k)

    def mxfp4_weights(self, n_bytes: int, which: int) -> int:
        """All experts' gate and up, or down, one behind the other."""
        address = self.device.allocate(self.n_experts * n_bytes)
        codes = [mxfp4.drawn(2 * seed + which, n_bytes) for seed in range(min(2, self.n_experts))]  # neighbours differ
        for expert in range(self.n_experts):
            self.device.write(address + expert * n_bytes, codes[expert % len(codes)])
        return address

    def places(self, candidate: Candidate, choice: int) -> dict[Operand, int]:
        places = {Operand("input", i): address for i, address in enumerate(self.inputs)}
        places[Operand("input", 1)] = self.indices[choice]
        places[Operand("output", 0)] = self.y
        temps = {Operand("temp", i): self.device.allocate(n_bytes) for i, n_bytes in enumerate(candidate.temps)}
        return places | temps

    def result(self, launch: Callable[[], None], places: dict[Operand, int]) -> Array:
        self.device.fill(self.y, bits.POISON, 4 * self.tokens * self.k)
        launch()
        self.device.wait()
        return bits.view_of(self.device.read(self.y, 4 * self.tokens * self.k), "f32", (self.tokens, self.k))

    def chosen_bytes(self) -> int:
        """Of the experts that a step reads, on the average of the ways to choose."""
        n_read = sum(len(np.unique(index)) for index in self.index) / CHOICES
        return round(n_read * sum(map(int, self.said["expert_bytes"])))

    def expected(self) -> Array | None:
        """Of the first way to choose; None where it would take too much reading."""
        experts = np.unique(self.index[0])
        if len(experts) * sum(self.said["expert_bytes"]) > MOST_READ_BYTES:
            return None
        y = np.zeros((self.tokens, self.k), np.float32)
        for expert in experts:
            up, down = (self.weight(which, int(expert)) for which in (0, 1))
            tokens, places = np.nonzero(self.index[0] == expert)
            of_up, of_down = (bias[expert] for bias in self.biases) if self.biases else (np.float32(0), np.float32(0))
            gate, other = np.split(self.x[tokens] @ up.T + of_up, 2, axis=1)
            result = self.gated(gate, other) @ down.T + of_down
            np.add.at(y, tokens, self.share[tokens, places, None] * result)
        return y

    def gated(self, gate: Array, up: Array) -> Array:
        clamp = self.said["clamp"]
        if not clamp:
            return np.asarray(gate / (1 + np.exp(-gate)) * up)
        gate, up = np.minimum(gate, clamp["limit"]), np.clip(up, -clamp["limit"], clamp["limit"])
        return np.asarray(gate / (1 + np.exp(-clamp["alpha"] * gate)) * (up + clamp["offset"]), np.float32)

    def weight(self, which: int, expert: int) -> Array:
        """Of one expert: gate and up, or down; f32."""
        n_bytes = self.said["expert_bytes"][which]
        data = self.device.read(self.inputs[3 + which] + expert * n_bytes, n_bytes)
        shape = (self.k, self.n) if which else (2 * self.n, self.k)
        if self.said["clamp"]:
            return mxfp4.unpack(data, shape, gated=not which)
        data = data.view(np.uint16)
        layout = Tiles("f16") if which else GatedTiles("f16")  # bf16 under the name of another type of 2 bytes
        return bits.values_of(np.ascontiguousarray(layout.unpack(data, shape)), "bf16")


def choice(tokens: int, chosen: int, n_experts: int, seed: int) -> Array:
    """int64 [tokens, chosen], different ones for each token."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(n_experts)[:chosen] for _ in range(tokens)]).astype(np.int64)


# -- PyTorch ----------------------------------------------------------------------------------------------------------


def peers(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """torch: µs of each way that PyTorch has; nothing without a GPU that it sees.  torch_errors: why a way has none."""
    import torch

    if not torch.cuda.is_available():
        return {"torch": {}, "torch_errors": {}}
    tokens, chosen, n_experts, n, k = said["shape"]
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    gate_up, down = (torch.randn(n_experts, *shape, **kind) * 0.02 for shape in ((2 * n, k), (k, n)))
    x, share = torch.randn(tokens, k, **kind), torch.full((tokens, chosen), 1 / chosen, **kind)
    index = [torch.from_numpy(choice(tokens, chosen, n_experts, seed)).cuda() for seed in range(CHOICES)]
    ways = {"loop": loop} | ({"grouped": grouped} if hasattr(torch, "_grouped_mm") else {})
    found: dict[str, float] = {}
    errors: dict[str, str] = {}
    with torch.inference_mode():
        for name, way in ways.items():
            try:
                times = [seconds(partial(way, x, i, share, gate_up, down)) for i in index * REPEATS]
                found[name] = 1e6 * median(times[CHOICES:])
            except RuntimeError as error:  # a shape or a card that a way does not take
                errors[name] = one_line(error)
    return {"torch": found, "torch_errors": errors}


def seconds(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def loop(x: Any, index: Any, share: Any, gate_up: Any, down: Any) -> Any:
    import torch.nn.functional as F

    y = x.new_zeros(x.shape)
    hits = F.one_hot(index, len(down)).permute(2, 1, 0)  # [E, chosen, tokens]
    for expert in hits.sum(dim=(1, 2)).nonzero().flatten():
        place, token = hits[expert].nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, down[expert]) * share[token, place, None]
        y.index_add_(0, token, result)
    return y


def grouped(x: Any, index: Any, share: Any, gate_up: Any, down: Any) -> Any:
    import torch
    import torch.nn.functional as F

    order = index.flatten().argsort()
    token = order // index.shape[1]
    ends = torch.bincount(index.flatten(), minlength=len(down)).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[token], gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    result = torch._grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=ends)
    return x.new_zeros(x.shape).index_add_(0, token, result * share.flatten()[order, None])


def report(journal: Journal) -> Iterator[str]:
    """A line for each item."""
    for name, found in journal.results(STAGE).items():
        best = min(found["candidates"], key=lambda entry: entry["us"])
        beside = [f"{way} {us:.0f} µs" for way, us in found["torch"].items()]
        beside += [f"{way} failed ({said[:80]})" for way, said in found.get("torch_errors", {}).items()]
        checked = "" if found.get("checked") else ", unchecked"
        rate = f"{found['us']:.1f} µs, {found['gb_per_s']:,.0f} GB/s"
        yield f"- experts of {name}: {rate}, {best['words']}{checked}; PyTorch: {', '.join(beside) or 'not there'}"
