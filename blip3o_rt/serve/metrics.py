"""Prometheus metrics of the service, by the names that inference servers use."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from blip3o_rt.serve.client import COMPLETED, EngineClient, Handle
from blip3o_rt.serve.messages import Finished, Heartbeat

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
LOOP_SECONDS = 0.02  # between two looks at the event loop


class Metrics:
    """The metrics of one server; `text` is what /metrics answers."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"blip3o_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"blip3o_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"blip3o_{name}", text, registry=registry)

        self._running = gauge("num_requests_running", "Images of requests that have started.")
        self._waiting = gauge("num_requests_waiting", "Images of requests that have not started.")
        self._up = gauge("engine_up", "Whether the engine is ready for requests.")
        self._memory = gauge("engine_memory_bytes", "Resident memory of the engine process.")
        self._restarts = gauge("engine_restarts", "Engine processes that ended.")
        self.latency = histogram("e2e_request_latency_seconds", "From a request to its last image.", SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From a request to its first start.", SECONDS)
        self.stage = histogram("stage_time_seconds", "Of an image, by stage.", SECONDS, "stage")
        self.per_pass = histogram(
            "tokens_per_pass", "Tokens that a pass gave an image.", (1, 1.5, 2, 3, 4, 6, 8)
        )
        self.batch = counter("token_passes", "Token passes, by the number of images in them.", "batch_size")
        self.images = counter("images", "Images drawn.")
        self.requests = counter("requests", "Requests by how they ended.", "state", "reason")
        self.refused = counter("requests_refused", "Requests that were not taken, by reason.", "reason")
        self.loop_delay = histogram("event_loop_delay_seconds", "How late the event loop wakes.", DELAYS)

    def ended(self, handle: Handle) -> None:
        """Count a request that ended."""
        reason = "" if handle.error is None else handle.error.kind
        self.requests.labels(handle.state, reason).inc()
        if handle.started is not None:
            self.queue.observe(handle.started - handle.came)
        if handle.state == COMPLETED and handle.ended is not None:
            self.latency.observe(handle.ended - handle.came)

    def finished(self, image: Finished) -> None:
        """Count an image that is done."""
        self.images.inc()
        self.per_pass.observe(image.tokens_per_pass)
        for stage, seconds in image.seconds.items():
            self.stage.labels(stage).observe(seconds)

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take over what the engine counted."""
        self._memory.set(heartbeat.memory)
        for size, passes in heartbeat.batch_sizes.items():
            self.batch.labels(size).inc(passes)

    def text(self, client: EngineClient) -> bytes:
        """Everything, in Prometheus' text format."""
        self._running.set(client.running)
        self._waiting.set(client.waiting)
        self._up.set(client.ready)
        self._restarts.set(client.restarts)
        return generate_latest(self._registry)

    async def watch_loop(self) -> None:
        """Measure how late the event loop wakes, for ever."""
        while True:
            begin = time.monotonic()
            await asyncio.sleep(LOOP_SECONDS)
            self.loop_delay.observe(max(0.0, time.monotonic() - begin - LOOP_SECONDS))
