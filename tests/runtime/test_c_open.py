"""Opening an artifact that is loaded: which file it is, what it says about itself, and what a process may do to it."""

from __future__ import annotations

import ctypes as c
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from llmc.runtime import format as fmt
from llmc.runtime.capi import Api, Handle, Info, Options
from tests.runtime import toy_artifact as toy
from tests.runtime.toy_model import ARGUMENT, OK, Model, Refused


def run_python(program: str, folder: Path) -> str:
    """What a fresh process prints; it starts in `folder` and can import the tests."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", f"from tests.runtime.toy_model import *\nimport os\n{program}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_artifact_says_what_it_is(toy_so: Path) -> None:
    with Model(toy_so, n_threads=3, kv_tokens=50) as model:
        info = model.info()
        assert (info.n_vocab, info.n_context, info.n_threads, info.bos_token) == (toy.VOCAB, toy.CONTEXT, 3, 1)
        assert (info.max_step_tokens, info.weight_bytes) == (max(toy.BODIES), len(toy.weights_section()))
        assert (info.kv_bytes_per_token, info.kv_tokens, info.kv_tokens_free) == (128, 52, 52)
        assert [model.api.is_eos(model.handle, token) for token in (toy.EOS, toy.EOS + 1, -1)] == [1, 0, 0]
        assert [model.text(token) for token in (0, 59, 60)] == [b"<0>", b"<59>", b""]
        for token in (-1, toy.VOCAB):
            with pytest.raises(Refused, match=f"token {token} is out of range"):
                model.text(token)


def test_all_allowed_cpus_are_used_by_default(toy_so: Path) -> None:
    with Model(toy_so, n_threads=0) as model:
        assert 1 <= model.info().n_threads <= len(os.sched_getaffinity(0))
    first = min(os.sched_getaffinity(0))
    program = f"os.sched_setaffinity(0, [{first}])\nprint(Model({str(toy_so)!r}, 0).info().n_threads)"
    assert run_python(program, toy_so.parent) == "1\n"


def test_a_text_needs_no_vocabulary(toy_so: Path, tmp_path: Path) -> None:
    sections = toy.toy_sections(code_of(toy_so))
    del sections["vocabulary"]
    path = tmp_path / "mute.so"
    path.write_bytes(toy.pack_sections(sections))
    with Model(path) as model:
        assert model.sequence([1, 2]).logits() == toy.oracle([1, 2])[-1]
        with pytest.raises(Refused, match="the artifact has no vocabulary"):
            model.text(1)


def code_of(path: Path) -> bytes:
    """The code section of an artifact."""
    data = path.read_bytes()
    at = struct.unpack_from("<Q", data, len(data) - fmt.TRAILER.size + 16)[0]
    return data[: fmt.SECTION.unpack_from(data, at)[2]]


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_null_and_nonsense_are_refused_everywhere(toy_so: Path) -> None:
    with Model(toy_so) as model:
        api, none, out, token = model.api, None, Handle(), c.c_int32()
        floats = c.POINTER(c.c_float)()
        sequence = model.sequence([1]).handle
        refused = [
            api.open(c.byref(Options(0, 1, 0)), c.byref(out)),
            api.open(c.byref(Options(c.sizeof(Options), -1, 0)), c.byref(out)),
            api.open(c.byref(Options(c.sizeof(Options), 4096, 0)), c.byref(out)),
            api.open(none, none),
            api.info(none, c.byref(Info(c.sizeof(Info)))),
            api.info(model.handle, none),
            api.info(model.handle, c.byref(Info())),
            api.token_text(none, 1, none, none),
            api.sequence_new(none, c.byref(out)),
            api.sequence_new(model.handle, none),
            api.sequence_fork(none, c.byref(out)),
            api.sequence_truncate(none, 0),
            api.step(none, none, 0),
            api.step(model.handle, none, 1),
            api.feed(none, none, 0),
            api.feed(sequence, none, 1),
            api.logits(none, c.byref(floats)),
            api.logits(sequence, none),
            api.sample(none, none, c.byref(token)),
            api.sample(sequence, none, none),
            api.sequence_save(none, b"x", none, 0),
            api.sequence_save(sequence, none, none, 0),
            api.sequence_save(sequence, b"x", none, 1),
            api.sequence_restore(none, b"x", c.byref(out)),
            api.sequence_restore(model.handle, none, c.byref(out)),
            api.sequence_restore(model.handle, b"x", none),
            api.sequence_tokens(none, none),
            api.sequence_note(none, none, none),
        ]
        assert refused == [ARGUMENT] * len(refused)
        assert out.value is None
        api.close(none)
        api.sequence_free(none)
        assert api.sequence_length(none) == 0


def test_a_sequence_of_another_model_is_refused(toy_so: Path) -> None:
    another = pytest.raises(Refused, match="input 0 of the step is a sequence of another model")
    with Model(toy_so) as model, Model(toy_so) as other, another:
        model.step([(other.sequence(), [1])])


def test_callers_of_an_older_interface_are_served(toy_so: Path) -> None:
    with Model(toy_so) as model:
        info = Info(size=12)
        info.n_threads = 77
        assert model.api.info(model.handle, c.byref(info)) == OK
        assert (info.n_vocab, info.n_context, info.n_threads) == (toy.VOCAB, toy.CONTEXT, 77)


def test_an_unknown_version_of_the_interface_is_null(toy_so: Path) -> None:
    library = c.CDLL(str(toy_so))
    library.llmc_get_api.restype = c.POINTER(Api)
    assert not library.llmc_get_api(0)
    assert not library.llmc_get_api(2)


# -- which file -------------------------------------------------------------------------------------------------------


def test_two_artifacts_and_two_models_of_one_live_together(toy_so: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(toy_so, tmp_path / "copy.so"))
    with Model(toy_so, 2) as a, Model(toy_so, 2) as b, Model(copy, 2) as d:
        texts = [[1, 2, 3], [4, 5], [6]]
        sequences = [model.sequence(text) for model, text in zip((a, b, d), texts, strict=True)]
        assert [s.logits() for s in sequences] == [toy.oracle(text)[-1] for text in texts]
        assert c.CDLL(str(toy_so))._handle != c.CDLL(str(copy))._handle


def test_models_run_at_the_same_time(toy_so: Path) -> None:
    text, said = list(range(toy.CONTEXT)), []

    def live() -> None:
        with Model(toy_so, 2, kv_tokens=64) as model:
            for _ in range(100):
                sequence = model.sequence(text)
                said.append(sequence.logits())
                sequence.free()

    threads = [threading.Thread(target=live) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [toy.oracle(text)[-1]] * 300


def test_the_file_is_found_after_changing_directory(toy_so: Path, tmp_path: Path) -> None:
    shutil.copy(toy_so, tmp_path / "a.so")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.so").write_bytes(b"another file of that name")
    program = (
        "import ctypes\nlibrary = ctypes.CDLL('./a.so')\nos.chdir('elsewhere')\n"
        "library.llmc_get_api.restype = ctypes.POINTER(Api)\nmodel = Handle()\n"
        "print(library.llmc_get_api(1).contents.open(None, ctypes.byref(model)))"
    )
    assert run_python(program, tmp_path) == "0\n"


def test_a_file_replaced_after_it_was_loaded_is_noticed(toy_so: Path, tmp_path: Path) -> None:
    shutil.copy(toy_so, tmp_path / "a.so")
    program = (
        "import ctypes, shutil\nlibrary = ctypes.CDLL('./a.so')\n"
        "shutil.copy('a.so', 'b.so'); os.replace('b.so', 'a.so')\n"
        "library.llmc_get_api.restype = ctypes.POINTER(Api)\nmodel, api = Handle(), library.llmc_get_api(1).contents\n"
        "print(api.open(None, ctypes.byref(model)), api.last_error().decode())"
    )
    assert run_python(program, tmp_path).startswith("1 the artifact's file was moved or replaced after it was loaded\n")


def test_an_artifact_of_13_gigabytes_opens_at_once(toy_so: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.so"
    n_weights = 13_500_000_000 // 64 * 64
    sections = toy.toy_sections(code_of(toy_so), plan=toy.ToyPlan().read_weights(n_weights).pack())
    weights = sections.pop("weights")
    small = bytearray(toy.pack_sections(sections))
    at = struct.unpack_from("<Q", small, len(small) - fmt.TRAILER.size + 16)[0]
    entries = [list(e) for e in fmt.SECTION.iter_unpack(small[at : -fmt.TRAILER.size])]
    begin = -(-entries[0][2] // 4096) * 4096
    shift = begin + n_weights - entries[1][1]
    for entry in entries[1:]:
        entry[1] += shift
    entries.insert(1, [b"weights", begin, n_weights, bytes(32)])
    directory = b"".join(fmt.SECTION.pack(*entry) for entry in entries)
    with path.open("wb") as file:
        file.write(code_of(toy_so))
        file.seek(begin)
        file.write(weights)
        file.seek(begin + n_weights)
        tail = bytes(small[entries[2][1] - shift : at])
        file.write(tail + toy.pack_end(directory, begin + n_weights + len(tail)))
    with Model(path) as model:  # the weights' hash is wrong: opening must not read them
        assert model.info().weight_bytes == n_weights
        assert model.sequence([1, 2]).logits() == toy.oracle([1, 2])[-1]


def test_the_manifest_is_read_as_the_documentation_says(toy_so: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "artifact.md").read_text()
    program = textwrap.dedent(page[page.index("    import json, struct") : page.index("It holds the format version")])
    shutil.copy(toy_so, toy_so.parent / "model.so")
    assert run_python(program, toy_so.parent) == "{}\n"


# -- fork() -----------------------------------------------------------------------------------------------------------


def test_a_forked_child_is_told_that_the_threads_are_gone(toy_so: Path) -> None:
    program = f"""
model = Model({str(toy_so)!r}, 2)
sequence = model.sequence([1, 2])
child = os.fork()
if child == 0:
    try:
        sequence.feed([3])
    except Refused as refused:
        print(refused, flush=True)
    model.api.close(model.handle)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
sequence.feed([3])
model.api.close(model.handle)
"""
    assert run_python(program, toy_so.parent).startswith("this process was forked after the model was opened")
