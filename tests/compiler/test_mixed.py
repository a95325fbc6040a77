"""4 bits and 8 in one artifact: what rounding a product costs, and which products get 8 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import llmc
from llmc.cli.verify import compare
from llmc.compiler.certificate import bars, certify
from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.driver import compile_model
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.frontend.as_torch import as_torch
from llmc.compiler.graph import products_of_logits
from llmc.compiler.quantization.importance import batch_of, experts_of, measured
from llmc.compiler.quantization.mixed import Product, within_bits
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme, quantize
from llmc.compiler.rewrite import rewrite_each
from llmc.compiler.weights import Coded, Weight
from llmc.runtime.errors import LlmcError

TinyModel = Callable[[str], Path]
INT4 = Scheme(4, 32)
PLACE = "--quant-bits"


def texts(n: int = 4, length: int = 60) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 131, length) for seed in range(n)]


def products(source: SourceModel, resident_bytes: int = 2 << 30, *, inputs: bool = False) -> list[Product]:
    return measured(as_torch(source, "f32", resident_bytes), source.weights, INT4, batch_of(texts()), inputs=inputs)


# -- what a product costs ------------------------------------------------------------------------------------------


def divergence(exact: list[np.ndarray], other: list[np.ndarray]) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(np.concatenate(logits)), -1) for logits in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_is_the_divergence_that_rounding_the_product_alone_makes(tiny_model: TinyModel) -> None:
    """To second order, by one drawn token a position, and as if errors at different tokens were independent, which is
    not so of keys'."""
    source = load_source(str(tiny_model("llama")))
    found = products(source)
    assert [[name.split(".")[-2] for name in product.weights] for product in found] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ] * 2
    prompts = [list(map(int, tokens)) for tokens in texts()]
    exact = reference_logits(source, prompts)
    costs = []
    for product in found:
        rounded = {
            name: Weight.of_array(name, quantize(weight.numpy(), INT4).values())
            for name, weight in product.weights.items()
        }
        alone = replace(source, weights={**source.weights, **rounded}, random=True)  # not read from the folder
        costs.append(divergence(exact, reference_logits(alone, prompts)))
    ratios = np.array([product.nats for product in found]) / costs
    assert ratios.min() > 0.25
    assert ratios.max() < 1.5
    assert 0.7 < sum(product.nats for product in found) / sum(costs) < 1.3


@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt2"])
def test_it_is_the_same_of_a_model_that_is_read_piece_by_piece(family: str, tiny_model: TinyModel) -> None:
    source = load_source(str(tiny_model(family)))
    whole, pieces = products(source, inputs=True), products(source, 0, inputs=True)
    assert [list(product.weights) for product in whole] == [list(product.weights) for product in pieces]
    np.testing.assert_allclose([p.nats for p in whole], [p.nats for p in pieces], rtol=1e-4)
    assert all(product.nats > 0 for product in whole)


def test_autograd_keeps_no_weight_of_a_model_that_is_read_piece_by_piece(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is read once forwards, and once backwards where a gradient goes through it."""
    source = load_source(str(tiny_model("llama")))
    model, kept = as_torch(source, "f32", 0), []
    of_weights = {tuple(weight.dims) for weight in source.weights.values()}
    saved = torch.autograd.graph.saved_tensors_hooks.__init__

    def watch(self: object, pack: Callable[[torch.Tensor], object], unpack: Callable[[object], torch.Tensor]) -> None:
        def noted(tensor: torch.Tensor) -> object:
            packed = pack(tensor)
            if packed is tensor and tensor.ndim == 2 and {tuple(tensor.shape), tuple(tensor.T.shape)} & of_weights:
                kept.append(tuple(tensor.shape))
            return packed

        saved(self, noted, unpack)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", watch)
    measured(model, source.weights, INT4, batch_of(texts()), inputs=True)
    assert not kept
    assert all(parameter.is_meta for parameter in model.parameters())


def test_sequences_are_taken_at_even_distances_and_all_have_one_length() -> None:
    sequences = [np.full(length, i) for i, length in enumerate([512, 512, 512, 512, 512, 512, 512, 512, 40])]
    batch = batch_of(sequences)
    assert (list(batch.shape), batch[:, 0].tolist()) == ([4, 128], [0, 2, 4, 6])
    assert list(batch_of(sequences[-1:]).shape) == [1, 40]


# -- which get 8 bits ----------------------------------------------------------------------------------------------


def product(name: str, nats: float, n_rows: int = 64, coded: Coded | None = None) -> Product:
    weight = Weight.of_array(name, np.zeros((n_rows, 128), np.float32))
    weight.coded = coded
    return Product({name: weight}, nats)


def test_those_that_save_most_a_byte_get_8_bits_as_long_as_there_is_room() -> None:
    found = [product("a", 0.08), product("b", 0.3, 192), product("c", 0.2), product("kept", 9.0, coded=Coded(4, 32))]
    experts = [Weight.of_array("e", np.zeros((2, 32, 128), np.float32))]

    def wide(bits: float) -> set[str]:
        choice = within_bits(found, experts, replace(INT4, most_bits=bits), PLACE)
        assert choice.bits <= bits
        return set(choice.wide)

    assert wide(4.5) == set()
    assert wide(5.1) == {"c"}
    assert wide(5.6) == {"a", "c"}  # b has no room
    assert wide(6.7) == {"b", "c"}
    assert wide(8.1) == {"a", "b", "c"}
    choice = within_bits(found, experts, replace(INT4, most_bits=5.6), PLACE)
    assert str(choice) == (
        "2 of 4 products are in 8 bits: 4 would have cost 3% of 9.6 nats there, by estimate; 5.57 bits a weight"
    )


def test_zeros_that_are_kept_count() -> None:
    found = [product("a", 1.0), product("kept", 1.0, coded=Coded(4, 32, zeros=True))]
    assert within_bits(found, [], replace(INT4, most_bits=4.8), PLACE).bits == 4.75
    with pytest.raises(LlmcError, match=r"takes 4\.750 bits"):
        within_bits(found, [], replace(INT4, most_bits=4.7), PLACE)


def test_fewer_bits_than_all_take_are_refused() -> None:
    with pytest.raises(LlmcError, match=r"int4 in groups of 32 takes 4\.500 bits a weight") as refused:
        within_bits([product("a", 1.0)], [], replace(INT4, most_bits=4.2), PLACE)
    assert refused.value.hint == "ask for more, or for --quant-group 128"
    assert not within_bits([product("a", 1.0)], [], Scheme(4, 128, most_bits=4.2), PLACE).wide


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma2", "qwen3"])
def test_their_parameters_are_found_again_in_the_graph_of_each_kind_of_device(
    family: str, tiny_model: TinyModel
) -> None:
    source = load_source(str(tiny_model(family)))
    names = frozenset(name for product in products(source) for name in product.weights)
    assert not experts_of(as_torch(source, "f32"), source.weights)
    for model, _ in rewrite_each(source, replace(INT4, wide=names), None, ["cpu", "cuda"]).values():
        logits = products_of_logits(model.graph)
        weights = [value.const_value for node in model.graph for value in node.inputs if value is not None]
        quantised = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        assert len(quantised) >= 8 + bool(logits)
        assert {weight.scheme.bits for weight in quantised} == {8}


# -- whole artifacts -----------------------------------------------------------------------------------------------


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    (tmp_path / "ids.json").write_text(json.dumps([list(map(int, tokens)) for tokens in texts()]))
    return tmp_path / "ids.json"


def test_more_bits_lose_less(tiny_model: TinyModel, ids: Path, tmp_path: Path) -> None:
    lost = []
    for bits in (4.5, 5.5, 9.0):
        out = tmp_path / f"{bits}.so"
        report = compile_model(tiny_model("llama"), out=out, quant="int4", quant_bits=bits, calibrate=ids, batch=(1,))
        lost.append(report["certificate"]["kl_mean"])
        assert report["quant"]["most_bits"] == bits
        n_wide = len(report["quant"]["in_8_bits"])
        assert n_wide == 0 if bits == 4.5 else n_wide == 14 if bits == 9 else 0 < n_wide < 14
        assert any(note.startswith(f"--quant-bits {bits:g}: ") for note in report["notes"])
    assert lost[0] > 1.3 * lost[1] > 2 * lost[2]


def test_the_comparison_with_the_source_rounds_the_same_products_to_8_bits(
    tiny_model: TinyModel, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is made, and when it is repeated.  Nothing is usual here, so that the reference is asked."""
    monkeypatch.setattr(bars, "LOGITS", replace(bars.LOGITS, usual={"int4": 0.0}))
    folder, out = tiny_model("llama"), tmp_path / "m.so"
    report = compile_model(folder, out=out, quant="int4", quant_bits=7.5, calibrate=ids, batch=(1,))
    cost = report["certificate"]["rounded_reference"]
    assert 0.5 * cost < report["certificate"]["kl_mean"] < cost  # fitted
    all_in_4 = compile_model(folder, out=tmp_path / "4.so", quant="int4", batch=(1,))["certificate"]
    assert cost < 0.7 * all_in_4["rounded_reference"]
    asked: list[Scheme] = []

    def certify_source(artifact: Path, source: SourceModel, quant: str, scheme: Scheme) -> dict[str, object]:
        asked.append(scheme)
        return {"relative_error": 0.0}

    monkeypatch.setattr(certify, "certify_source", certify_source)
    with llmc.load(out) as model:
        (check,) = compare(str(out), str(folder), model.manifest)
    assert (check.status, asked[0].wide) == ("passed", frozenset(report["quant"]["in_8_bits"]))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"quant": "int8"}, "chooses between 4 and 8 bits"),
        ({"quant": "none"}, "--quant-bits says how to quantise, but nothing is"),
        ({"quant": "int4"}, "measured on a text, and none is given"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(options: dict[str, str], fact: str, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=fact):
        compile_model("nothing is read here", quant_bits=5.0, out=tmp_path / "m.so", **options)  # type: ignore[arg-type]
