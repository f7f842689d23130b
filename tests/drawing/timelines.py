"""Timelines that are made by hand, of any length."""

from __future__ import annotations

from weightstream.scheduler.timeline import Phase, Span, Timeline

__all__ = ["MIB", "timeline_of"]

MIB = 2**20


def timeline_of(num_chunks: int) -> Timeline:
    """Two readers, one stream whose copies take as long as a read, and a thread that binds; in ten seconds."""
    step = 10.0 / (num_chunks / 2 + 3)
    spans: list[Span] = [Span("preflight", "load", None, 0, 0.0, step, 0, "")]
    for chunk in range(num_chunks):
        begin = step * (1 + chunk // 2)
        file = f"model-{chunk % 4}.safetensors"
        copy = begin + step + (chunk % 2) * step / 2
        spans += [
            Span("read", f"reader {chunk % 2}", chunk, 1, begin, begin + step, MIB, file),
            Span("wait", "waiting", chunk, 1, begin + step, copy, MIB, file),
            Span("copy", "copies to cuda:0", chunk, 1, copy, copy + step / 2, MIB, file),
            Span("bind", "load", chunk, 1, copy + step / 2, copy + step * 0.7, MIB, file),
        ]
    spans = sorted((span for span in spans if span.end_s > span.begin_s), key=lambda span: span.begin_s)
    phases = Phase("preflight", 0.0, step), Phase("disk", step, 9.0), Phase("copy", 9.0, 10.0)
    return Timeline(
        "/models/<tiny>/model.safetensors.index.json", "cuda:0", 10.0, num_chunks * MIB, phases, tuple(spans)
    )
