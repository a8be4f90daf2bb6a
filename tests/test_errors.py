"""Errors."""

from __future__ import annotations

import itertools
import pickle
import re

import pytest

from clip_rd_edge.errors import InputError, MissingExtraError, causes, in_one_line, near_matches
from clip_rd_edge.runtime.labels import parse_labels

CALL = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:114 std::conditional_t<THRW, void, "
    "onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*, const char*, SUCCTYPE) [with ERRTYPE "
    "= cudaError; bool THRW = true; std::conditional_t<THRW, void, common::Status> = void] "
)
WINDOWS_CALL = r"D:\a\_work\1\s\onnxruntime\core\providers\cuda\cuda_call.cc:121 onnxruntime::CudaCall "
LOAD = "[ONNXRuntimeError] : 1 : FAIL : Load model from /models/image.onnx failed:"
MODEL = (
    "/onnxruntime_src/onnxruntime/core/graph/model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, const bool&) "
)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (f"{LOAD}Protobuf parsing failed.", "Protobuf parsing failed"),
        (f"{LOAD}{MODEL}Unsupported model IR version: 99 (max 14)\n", "Unsupported model IR version: 99 (max 14)"),
        (f"{2 * CALL}CUDA failure 35: an old driver (535) ; GPU=0", "CUDA failure 35: an old driver (535) ; GPU=0"),
        (f"{2 * WINDOWS_CALL}CUDA failure 35: an old driver (535)", "CUDA failure 35: an old driver (535)"),
        (
            "[ONNXRuntimeError] : 1 : FAIL : tensorprotoutils.cc:1805 Validate Initializer 'a': count (0) is wrong",
            "Validate Initializer 'a': count (0) is wrong",
        ),
        ("Invalid MIT-MAGIC-COOKIE.\n\nSee std::cerr (the log).", "Invalid MIT-MAGIC-COOKIE. See std::cerr (the log)"),
        (LOAD, "RuntimeError"),
    ],
)
def test_the_reason_of_another_library_is_told_without_the_place_in_its_code(message: str, reason: str) -> None:
    assert in_one_line(RuntimeError(message)) == reason


def test_the_causes_of_an_error_are_those_it_was_raised_from_or_else_while_handling() -> None:
    first, stated, last = KeyError("first"), ValueError("stated"), RuntimeError("last")
    stated.__context__ = first
    last.__cause__, last.__context__ = stated, TypeError("handled meanwhile")
    assert list(causes(last)) == [last, stated, first]


def test_the_causes_of_an_error_that_was_raised_from_itself_end() -> None:
    error = OSError("itself")
    error.__cause__ = error
    assert list(itertools.islice(causes(error), 2)) == [error]


def test_an_error_comes_whole_out_of_another_process() -> None:
    error = MissingExtraError("ray", extra="ray", purpose="The option --ray")
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), copied.hint) == (MissingExtraError, str(error), error.hint)


def test_a_path_of_windows_is_shown_as_it_was_typed() -> None:
    assert near_matches("photo", ["photos"], prefix="d\\") == r" Did you mean 'd\photos'?"
    with pytest.raises(InputError, match=re.escape(r"The label '.\nowhere\red.txt' looks like the path of a file")):
        parse_labels((r".\nowhere\red.txt", "blue"))
