"""How many lanes of a run fit into the memory: measured on the compiled program."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax


def available() -> int:
    """The bytes that a program may take: of the accelerator, or of the host if that computes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    info = pathlib.Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return int(0.8 * free[0]) if free else 2**62


def needed(compiled: Any) -> int:
    """The bytes that a call of a compiled function takes: arguments, outputs and temporaries."""
    stats = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    )


def fitting(lanes: int, compiled: Callable[[int], Any], limit: int | None = None) -> int:
    """The largest of lanes, lanes / 2, lanes / 4, ... (rounded up) whose compiled program fits; at least 1."""
    limit = available() if limit is None else limit
    while lanes > 1 and needed(compiled(lanes)) > limit:
        lanes = -(-lanes // 2)
    return lanes
