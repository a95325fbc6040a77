"""passes/unfold_heads.py"""

from typing import Any

from llmc.passes.unfold_heads import unfold_heads

H, D = 4, 8


def folded(build: Any, name: str) -> Any:
    x = build.input(name, "batch", "sequence", H * D)
    return build.op("Reshape", x, build.constant([-1, D]), shape=("4*batch*sequence", D))


def whole(build: Any, x: Any) -> Any:
    return build.op("Reshape", x, build.constant([1, -1, H * D]), shape=("batch", "sequence", H * D))


def test_norms_and_gates_of_heads_stand_beside_the_tokens(build: Any, check: Any) -> None:
    build.sequence_inputs()
    x, gate = folded(build, "x"), folded(build, "gate")
    normed = build.op("RMSNormalization", x, build.weight("norm", D), axis=1, epsilon=1e-6)
    result = build.op("Mul", normed, build.op("Mul", gate, build.op("Sigmoid", gate)))
    check(build.model(whole(build, result)), unfold_heads, 6)


def test_heads_that_are_mixed_with_tokens_stay(build: Any, refused: Any) -> None:
    build.sequence_inputs()
    x = folded(build, "x")
    mixed = build.op("Transpose", build.op("Relu", x), perm=[1, 0])
    back = build.op("Transpose", mixed, perm=[1, 0])
    refused(build.model(whole(build, build.op("Add", x, back))), unfold_heads)


def test_a_norm_across_heads_stays(build: Any, refused: Any) -> None:
    build.sequence_inputs()
    refused(build.model(whole(build, build.op("Softmax", folded(build, "x"), axis=0))), unfold_heads)


def test_what_meets_a_number_for_each_head_of_all_tokens_stays(build: Any, refused: Any) -> None:
    build.sequence_inputs()
    other = build.input("other", "4*batch*sequence", D)
    refused(
        build.model(whole(build, build.op("Add", folded(build, "x"), other, shape=("4*batch*sequence", D)))),
        unfold_heads,
    )
