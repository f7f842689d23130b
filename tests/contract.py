"""What programs rely on: names that must not change."""

from __future__ import annotations

#: The keys of the report's JSON, in their order. New ones may be added; none may go.
REPORT_KEYS = [
    "checkpoint",
    "strategy",
    "reason",
    "device",
    "dtype",
    "num_tensors",
    "num_shards",
    "num_bytes",
    "wall_s",
    "throughput_bytes_per_s",
    "phases",
    "overlap",
    "host_peak_bytes",
    "pinned_bytes",
    "device_peak_bytes",
    "num_copies",
    "num_retries",
    "decisions",
    "fallbacks",
    "missing_keys",
    "unexpected_keys",
    "verified",
    "hash_s",
    "rank",
    "world_size",
    "unloaded_keys",
    "read_bytes",
    "mapped_bytes",
    "cast_bytes",
    "cached_read_s",
    "storage_read_s",
    "storage_cpu_s",
]

#: The keys of what the other commands print with --json. As above.
INSPECT_KEYS = ["checkpoint", "num_bytes", "num_tensors", "num_shards", "shards", "tensors"]
VERIFY_KEYS = ["checkpoint", "ok", "num_shards", "num_bytes", "wall_s", "num_retries", "manifest", "shards"]
BENCH_KEYS = [
    "checkpoint",
    "num_bytes",
    "num_tensors",
    "num_shards",
    "device",
    "io",
    "workers",
    "rows",
    "notes",
]
