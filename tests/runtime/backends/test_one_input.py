from __future__ import annotations

from typing import Any

import numpy as np

from clip_rd_edge.runtime.backends.one_input import LiteRtModel


class Interpreter:
    """A stand-in for LiteRT's: its model takes one row of int32 and returns its sum and its type."""

    def get_input_details(self) -> list[dict[str, Any]]:
        return [{"index": 3, "dtype": np.int32}]

    def get_output_details(self) -> list[dict[str, Any]]:
        return [{"index": 7}]

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        return {"serving_default": {"inputs": ["input_ids"], "outputs": ["text_embedding"]}}

    def set_tensor(self, index: int, value: Any) -> None:
        assert (index, value.shape, value.dtype) == (3, (1, 4), np.int32)
        self.sum = value.sum()

    def invoke(self) -> None:
        self.output = np.full((1, 2), self.sum, dtype=np.float32)

    def get_tensor(self, index: int) -> Any:
        assert index == 7
        return self.output.copy()


def test_a_batch_runs_row_by_row_in_the_type_that_the_file_takes() -> None:
    model = LiteRtModel(Interpreter())
    assert [port.name for port in model.get_inputs()] == ["input_ids"]
    (output,) = model.run(None, {"input_ids": np.arange(12, dtype=np.int64).reshape(3, 4)})
    np.testing.assert_array_equal(output, [[6, 6], [22, 22], [38, 38]])
