"""What is measured: every row, in the order in which it runs.

To add an op that works token by token: a line of `_OPS` in `bench/rows/elementwise.py`. To add another kind: a module
in `bench/rows` with a shape record (`Shape`), the functions a `Row` names and its `ROWS`, and its line here.
"""

from __future__ import annotations

from bench.record import Row
from bench.rows import attention, elementwise, gemm, moe, sampling

ROWS: tuple[Row, ...] = (*attention.ROWS, *elementwise.ROWS, *sampling.ROWS, *gemm.ROWS, *moe.ROWS)
# Rows whose first call is timed with an empty kernel cache.
COLD_ROWS = (*attention.COLD_ROWS, *elementwise.COLD_ROWS, *gemm.COLD_ROWS, *moe.COLD_ROWS)
