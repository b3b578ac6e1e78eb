"""Images on disk measured a block at a time, so that memory does not grow with their number."""

from __future__ import annotations

from ..utils.processes import process_state

BLOCK = 32  # pictures in memory


def own_blocks(count: int) -> list[range]:
    """Return this process's blocks of `count` images.

    The blocks are the same whatever the number of processes: models give the same figures only on the same batches.
    """
    state = process_state()
    blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    return blocks[state.process_index :: state.num_processes]
