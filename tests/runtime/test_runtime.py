from __future__ import annotations


def test_load_is_the_function_however_often_it_is_imported() -> None:
    from clip_rd_edge.runtime import load
    from clip_rd_edge.runtime import load as again
    from clip_rd_edge.runtime.loading import load as original

    assert load is again is original
