"""passes/fuse_rotary.py"""

from typing import Any

import pytest

from llmc.passes.fuse_rotary import fuse_rotary

END = 2**63 - 1


def angles(build: Any, function: Any, doubled: Any = True, scale: Any = None) -> Any:
    """[batch, 1, sequence, 8] from positions as Hugging Face works them out."""
    positions = next((v for v in build.inputs if v.name == "f"), None) or build.input("f", "batch", "sequence", 4)
    other = positions if doubled else build.op("Neg", positions)
    waves = build.op(function, build.op("Concat", positions, other, axis=-1))
    if scale:
        waves = build.op("Mul", waves, build.constant(scale))
    return build.op("Unsqueeze", waves, build.constant([1]))


def part(build: Any, x: Any, start: Any, stop: Any, axis: Any = 3) -> Any:
    bounds = (build.constant([n]) for n in (start, stop, axis, 1))
    return build.op("Slice", x, *bounds)


def rotate_half(build: Any, x: Any, middle: Any = 4) -> Any:
    return build.op("Concat", build.op("Neg", part(build, x, middle, END)), part(build, x, 0, middle), axis=-1)


def spelled_out(build: Any, middle: Any = 4, doubled: Any = True, scale: Any = None) -> Any:
    x = build.input("x", "batch", 2, "sequence", 8)
    cos, sin = (angles(build, function, doubled, scale) for function in ("Cos", "Sin"))
    turned = build.op("Mul", rotate_half(build, x, middle), sin)
    return build.model(build.op("Add", build.op("Mul", x, cos), turned))


def test_rotation_spelled_out_becomes_one_operator(build: Any, check: Any) -> None:
    check(spelled_out(build), fuse_rotary, 1)


def test_scaled_angles_are_kept(build: Any, check: Any) -> None:
    check(spelled_out(build, scale=1.25), fuse_rotary, 1)


def test_halves_of_waves_need_no_angles(build: Any, check: Any) -> None:
    """Qwen 3.5's cosines are put together from those of several positions."""
    x = build.input("x", "batch", 2, "sequence", 8)
    waves = (build.input(name, "batch", "sequence", 4) for name in ("cos", "sin"))
    cos, sin = (build.op("Unsqueeze", build.op("Concat", wave, wave, axis=-1), build.constant([1])) for wave in waves)
    turned = build.op("Mul", rotate_half(build, x), sin)
    check(build.model(build.op("Add", build.op("Mul", x, cos), turned)), fuse_rotary, 1)


def test_rotation_of_a_part_of_each_head_becomes_one_operator(build: Any, check: Any) -> None:
    x = build.input("x", "batch", 2, "sequence", 8)
    cos, sin = (build.input(name, "batch", "sequence", 2) for name in ("cos", "sin"))
    turned = build.op("RotaryEmbedding", part(build, x, 0, 4), cos, sin, num_heads=2, interleaved=0)
    check(build.model(build.op("Concat", turned, part(build, x, 4, END), axis=-1)), fuse_rotary, 1)


def halves_by_themselves(build: Any, crossed: bool = False) -> Any:
    """As gpt-oss has them."""
    x = build.input("x", "batch", 2, "sequence", 8)
    a, b = build.op("Split", x, axis=3, num_outputs=2, n_results=2)
    waves = (build.input(name, "batch", "sequence", 4) for name in ("cos", "sin"))
    cos, sin = (build.op("Unsqueeze", wave, build.constant([1])) for wave in waves)
    first = build.op("Sub", build.op("Mul", a, cos), build.op("Mul", b, sin))
    second = [build.op("Mul", *pair) for pair in ((b, cos), (a, sin))]
    turned = build.op("Add", *(second[::-1] if crossed else second))
    return build.model(build.op("Concat", *((turned, first) if crossed else (first, turned)), axis=-1))


def test_halves_turned_by_themselves_become_one_operator(build: Any, check: Any) -> None:
    check(halves_by_themselves(build), fuse_rotary, 1)


def test_halves_in_another_order_are_refused(build: Any, refused: Any) -> None:
    refused(halves_by_themselves(build, crossed=True), fuse_rotary)


def test_a_part_of_heads_that_stand_behind_the_sequence(build: Any, check: Any) -> None:
    """As GPT-J has it: by pairs, waves repeated."""
    x = build.input("x", "batch", "sequence", 2, 12)
    f = build.input("f", "batch", "sequence", 4)
    waves = []
    for function in ("Cos", "Sin"):
        once = build.op("Unsqueeze", build.op(function, f), build.constant([2]))
        waves.append(twice(build, once, "batch", "sequence", 1, 8))
    turned = part(build, x, 0, 8)
    odd, even = build.op("Neg", every_second(build, turned, 1)), every_second(build, turned, 0)
    columns = [build.op("Unsqueeze", y, build.constant([-1])) for y in (odd, even)]
    ends = build.op("Shape", f, start=0, end=2), build.constant([2, 8])
    other = build.op("Reshape", build.op("Concat", *columns, axis=-1), build.op("Concat", *ends, axis=0),
                     shape=("batch", "sequence", 2, 8))  # fmt: skip
    both = build.op("Add", build.op("Mul", turned, waves[0]), build.op("Mul", other, waves[1]))
    check(build.model(build.op("Concat", both, part(build, x, 8, END), axis=-1)), fuse_rotary, 2)


def turned_pairs(build: Any, starts: Any = (0, 1), axis: int = 1) -> Any:
    """The first and the second of each pair, turned.  axis: that of the heads."""
    x = build.input("x", "batch", *((2, "sequence") if axis == 1 else ("sequence", 2)), 8)
    ends = ((build.constant([n]) for n in (start, END, 3, 2)) for start in starts)
    a, b = (build.op("Slice", x, *bounds) for bounds in ends)
    cos, sin = (build.input(name, "batch", "sequence", 4) for name in ("cos", "sin"))
    cos, sin = (build.op("Unsqueeze", value, build.constant([axis])) for value in (cos, sin))
    first = build.op("Sub", build.op("Mul", a, cos), build.op("Mul", b, sin))
    return first, build.op("Add", build.op("Mul", b, cos), build.op("Mul", a, sin))


def sorted_pairs(build: Any, starts: Any = (0, 1)) -> Any:
    """The first of each pair in front of the second of each, as DeepSeek V3 has it."""
    return build.model(build.op("Concat", *turned_pairs(build, starts), axis=-1))


@pytest.mark.parametrize("axis", [1, 2], ids=["deepseek_v2", "llama4"])
def test_pairs_turned_as_complex_numbers_become_one_operator(build: Any, check: Any, axis: int) -> None:
    columns = [build.op("Unsqueeze", value, build.constant([-1])) for value in turned_pairs(build, axis=axis)]
    x = build.inputs[0]
    shape = build.op("Concat", build.op("Shape", x, start=0, end=3), build.constant([8]), axis=0)
    joined = build.op("Concat", *columns, axis=-1)
    check(build.model(build.op("Reshape", joined, shape, shape=x.shape)), fuse_rotary, 1)


def test_pairs_that_are_put_into_halves_are_so_before_they_are_turned(build: Any, check: Any) -> None:
    check(sorted_pairs(build), fuse_rotary, 1)


def test_pairs_the_other_way_round_are_refused(build: Any, refused: Any) -> None:
    refused(sorted_pairs(build, (1, 0)), fuse_rotary)


def test_halves_that_overlap_the_rest_are_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "batch", 2, "sequence", 8)
    cos, sin = (build.input(name, "batch", "sequence", 2) for name in ("cos", "sin"))
    turned = build.op("RotaryEmbedding", part(build, x, 0, 4), cos, sin, num_heads=2, interleaved=0)
    refused(build.model(build.op("Concat", turned, part(build, x, 2, END), axis=-1)), fuse_rotary)


def test_angles_whose_halves_differ_are_refused(build: Any, refused: Any) -> None:
    refused(spelled_out(build, doubled=False), fuse_rotary)


@pytest.mark.parametrize("middle", [2, 6])
def test_halves_cut_elsewhere_than_in_the_middle_are_refused(build: Any, refused: Any, middle: Any) -> None:
    refused(spelled_out(build, middle=middle), fuse_rotary)


def test_halves_along_another_axis_are_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "batch", 8, "sequence", 8)
    cos, sin = (angles(build, function) for function in ("Cos", "Sin"))
    turned = build.op("Concat", build.op("Neg", part(build, x, 4, END, 1)), part(build, x, 0, 4, 1), axis=1)
    refused(build.model(build.op("Add", build.op("Mul", x, cos), build.op("Mul", turned, sin))), fuse_rotary)


def twice(build: Any, x: Any, *shape: Any) -> Any:
    """Each element of the last axis twice in a row, as torch.repeat_interleave is exported."""
    axis = len(shape) - 1
    repeated = build.op(
        "Expand", build.op("Unsqueeze", x, build.constant([axis + 1])), build.constant([1] * (axis + 1) + [2])
    )
    sizes = {"batch": 0, "sequence": -1}
    return build.op("Reshape", repeated, build.constant([sizes.get(size, size) for size in shape]))


def every_second(build: Any, x: Any, start: Any, step: Any = 2) -> Any:
    return build.op("Slice", x, *(build.constant([n]) for n in (start, END, 3, step)))


def pairs(build: Any, kind: Any, first: Any = 1, step: Any = 2) -> Any:
    """As GLM ("after": waves are repeated), Cohere ("before": angles are) and GLM-4V ("first": waves are, in front of
    what gives them an axis of heads) write it."""
    x = build.input("x", "batch", 2, "sequence", 8)
    f = build.input("f", "batch", "sequence", 4)
    waves = []
    for function in ("Cos", "Sin"):
        if kind == "before":
            wave = build.op("Mul", build.op(function, twice(build, f, "batch", "sequence", 8)), build.constant(1.25))
            waves.append(build.op("Unsqueeze", wave, build.constant([1])))
        elif kind == "first":
            wave = twice(build, build.op(function, f), "batch", "sequence", 8)
            waves.append(build.op("Unsqueeze", wave, build.constant([1])))
        else:
            whole = build.op(function, build.op("Concat", f, f, axis=-1))
            half = part(build, build.op("Unsqueeze", whole, build.constant([1])), 0, 4)
            waves.append(twice(build, half, "batch", 1, "sequence", 8))
    odd = build.op("Neg", every_second(build, x, first, step))
    columns = [build.op("Unsqueeze", y, build.constant([-1])) for y in (odd, every_second(build, x, 1 - first, step))]
    turned = build.op("Reshape", build.op("Concat", *columns, axis=-1), build.constant([0, 2, -1, 8]))
    return build.model(build.op("Add", build.op("Mul", x, waves[0]), build.op("Mul", turned, waves[1])))


@pytest.mark.parametrize("kind", ["before", "after", "first"])
def test_rotation_by_pairs_becomes_one_operator(build: Any, check: Any, kind: Any) -> None:
    check(pairs(build, kind), fuse_rotary, 1)


def test_pairs_turned_the_other_way_round_are_refused(build: Any, refused: Any) -> None:
    refused(pairs(build, "before", first=0), fuse_rotary)
