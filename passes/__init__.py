"""The pipeline: from the exported graph of whole sequences to the step graph. Read it top to bottom.

A pass is a file, named as its one function: `pass_name(model) -> number of rewrites`, in place. Its docstring shows
the rewrite, says what it refuses, what it assumes of the graph it gets and what it leaves. After every pass each value
has a shape and a type, and the graph still runs in ONNX Runtime. No pass reads a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

from llmc.compiler.graph import number_values
from llmc.compiler.low_rank import Added
from llmc.passes.arrange_experts import arrange_experts
from llmc.passes.drop_cache import drop_cache
from llmc.passes.drop_dead import drop_dead
from llmc.passes.drop_expand import drop_expand
from llmc.passes.drop_slice import drop_slice
from llmc.passes.expand_leftovers import expand_leftovers
from llmc.passes.flatten_patches import flatten_patches
from llmc.passes.flatten_tile import flatten_tile
from llmc.passes.flatten_tokens import flatten_tokens
from llmc.passes.fold_constants import fold_constants
from llmc.passes.fold_query_scale import fold_query_scale
from llmc.passes.fold_value_scale import fold_value_scale
from llmc.passes.form_activation import form_activation
from llmc.passes.form_attention import form_attention
from llmc.passes.form_choice import form_choice
from llmc.passes.form_experts import form_experts
from llmc.passes.form_gather import form_gather
from llmc.passes.form_groups import form_groups
from llmc.passes.form_latent import form_latent
from llmc.passes.form_linear import form_linear
from llmc.passes.form_norm import form_norm
from llmc.passes.form_split import form_split
from llmc.passes.fuse_epilogue import fuse_epilogue
from llmc.passes.fuse_head_norm import fuse_head_norm
from llmc.passes.fuse_norm import fuse_norm
from llmc.passes.fuse_query_key_norm import fuse_query_key_norm
from llmc.passes.fuse_rotary import fuse_rotary
from llmc.passes.gather_rows import gather_rows
from llmc.passes.insert_adapters import insert_adapters
from llmc.passes.insert_kv_cache import insert_kv_cache
from llmc.passes.insert_states import insert_states
from llmc.passes.look_ahead import look_ahead
from llmc.passes.merge_gate_up import merge_gate_up
from llmc.passes.merge_qkv import merge_qkv
from llmc.passes.move_norm import move_norm
from llmc.passes.name_patches import name_patches
from llmc.passes.name_positions import name_positions
from llmc.passes.order_columns import order_columns
from llmc.passes.part_columns import part_columns
from llmc.passes.part_windows import part_windows
from llmc.passes.resolve_shapes import resolve_shapes
from llmc.passes.standardise_operators import standardise_operators
from llmc.passes.swap_product import swap_product
from llmc.passes.tabulate_places import tabulate_places
from llmc.passes.tabulate_positions import tabulate_positions
from llmc.passes.tabulate_turns import tabulate_turns
from llmc.passes.take_given import take_given
from llmc.passes.turn_product import turn_product
from llmc.passes.unfold_heads import unfold_heads

Pass = Callable[[ir.Model], int]
Observe = Callable[[str, ir.Model, int], None]


Steps = tuple[tuple[str, Pass], ...]
SumsTo = Literal["norms", "products"]


def pipeline(n_context: int, sums_to: SumsTo = "norms") -> Steps:
    """The passes in order, by name.  sums_to: see `run`."""
    return first_steps(n_context) + last_steps(sums_to)


def first_steps(n_context: int, *, is_turned: bool = False) -> Steps:
    """Those that are the same for all kinds of devices.  is_turned: of a model with positions in three directions."""
    turned: Steps = (("tabulate_turns", lambda model: tabulate_turns(model, n_context=n_context)),)
    return (
        # 1. over [batch, sequence], as exported
        ("form_experts", form_experts),
        ("arrange_experts", arrange_experts),
        ("fold_constants", fold_constants),
        ("turn_product", turn_product),
        ("drop_slice", drop_slice),
        ("form_norm", form_norm),
        ("form_groups", form_groups),
        ("form_choice", form_choice),
        ("form_gather", form_gather),
        ("fuse_rotary", fuse_rotary),
        ("move_norm", move_norm),
        *(turned if is_turned else ()),
        ("tabulate_positions", lambda model: tabulate_positions(model, n_context=n_context)),
        ("unfold_heads", unfold_heads),
        # 2. over M tokens of one sequence
        ("flatten_tokens", flatten_tokens),
        ("swap_product", swap_product),
        ("form_linear", form_linear),
        ("order_columns", order_columns),
        ("form_latent", form_latent),
        ("form_activation", form_activation),
        ("fold_query_scale", fold_query_scale),
        ("fold_value_scale", fold_value_scale),
        ("part_columns", part_columns),
        ("merge_qkv", merge_qkv),
        ("merge_gate_up", merge_gate_up),
    )


def adapter_steps(added: Added) -> Steps:
    """Between these and the last, where adapters add to weights."""
    return (("insert_adapters", lambda model: insert_adapters(model, added=added)),)


def given_steps() -> Steps:
    """There too, where rows may stand for tokens."""
    return (("take_given", take_given),)


def ahead_steps() -> Steps:
    """Behind the last, where the rows of a picture see all of it."""
    return ("look_ahead", look_ahead), ("drop_dead", drop_dead)


def file_steps(n_context: int) -> Steps:
    """What an .onnx file's own graph goes through first, whoever wrote it: then it is as our exporter writes one.

    Such a graph may lack shapes, and `drop_cache` changes them all: from `resolve_shapes` on each value has one.
    """
    return (
        ("drop_cache", drop_cache),
        *spelled_out_steps(n_context),
    )


def spelled_out_steps(n_context: int) -> Steps:
    """What a graph with its attention spelled out goes through first: an .onnx file's, and that of a model whose
    attention does not go through transformers' interface."""
    return (
        ("standardise_operators", standardise_operators),
        ("resolve_shapes", lambda model: resolve_shapes(model, n_context=n_context)),
        ("drop_unchanged", drop_dead),
        ("form_attention", lambda model: form_attention(model, n_context=n_context)),
        ("name_positions", lambda model: name_positions(model, n_context=n_context)),
        ("drop_expand", drop_expand),
        ("form_split", form_split),
    )


def tower_steps() -> Steps:
    """What the graph of a tile of a picture goes through, all of whose shapes are known: its rows are its tokens."""
    return (
        ("fold_constants", fold_constants),
        ("form_norm", form_norm),
        ("flatten_tile", flatten_tile),
        *steps_of_rows(),
        *last_of_tower(),
    )


def picture_steps(n_places: int) -> Steps:
    """The same of all patches of a picture of any size, which has fewer than n_places lines and columns of them."""
    return (
        ("fold_constants", fold_constants),
        ("form_norm", form_norm),
        ("flatten_patches", flatten_patches),
        ("tabulate_places", lambda model: tabulate_places(model, n_places=n_places)),
        *steps_of_rows(),
        ("part_windows", part_windows),
        *last_of_tower(),
        ("name_patches", name_patches),
    )


def steps_of_rows() -> Steps:
    """What both have in common."""
    return (
        ("form_linear", form_linear),
        ("form_activation", form_activation),
        ("fold_query_scale", fold_query_scale),
        ("fold_value_scale", fold_value_scale),
        ("merge_qkv", merge_qkv),
        ("merge_gate_up", merge_gate_up),
        ("fuse_norm", fuse_norm),
        ("fuse_epilogue", fuse_epilogue),
        ("insert_kv_cache", insert_kv_cache),
    )


def last_of_tower() -> Steps:
    return (
        ("fuse_head_norm", fuse_head_norm),
        ("fuse_query_key_norm", fuse_query_key_norm),
        ("expand_leftovers", expand_leftovers),
        ("drop_dead", drop_dead),
    )


def last_steps(sums_to: SumsTo) -> Steps:
    steps: Steps = (
        ("fuse_norm", fuse_norm),  # before fuse_epilogue: a sum that is normalised belongs to the norm
        ("fuse_epilogue", fuse_epilogue),
        # 3. the step graph: M tokens of any sequences, R rows of logits
        ("insert_kv_cache", insert_kv_cache),
        ("insert_states", insert_states),
        ("fuse_head_norm", fuse_head_norm),
        ("fuse_query_key_norm", fuse_query_key_norm),
        ("gather_rows", gather_rows),
        ("expand_leftovers", expand_leftovers),
        ("drop_dead", drop_dead),
    )
    return tuple(step for step in steps if step[0] != "fuse_norm" or sums_to == "norms")


def run(model: ir.Model, *, n_context: int, sums_to: SumsTo = "norms", observe: Observe | None = None) -> ir.Model:
    """Turn an exported graph into a step graph, in place, and return it.

    n_context: most tokens of a sequence, the rows of position tables.
    sums_to: where a residual is added that is normalised next: in the norm, which saves reading it again (CPU), or in
    the product before it, so that the norm can go to the product behind it (GPU: fuse_norm_linear).
    observe(name, model, n_rewrites): called after each pass.
    """
    return run_steps(model, pipeline(n_context, sums_to), observe)


def run_steps(model: ir.Model, steps: Steps, observe: Observe | None = None) -> ir.Model:
    """Some of the pipeline's passes, as `run` does it with all."""
    for name, rewrite in steps:
        n_rewrites = rewrite(model)
        if name == "drop_dead":
            number_values(model.graph)
        if observe is not None:
            observe(name, model, n_rewrites)
    return model
