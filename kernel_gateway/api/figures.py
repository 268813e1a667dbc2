"""`GET /metrics`: what the server has counted, and what there is now."""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kernel_gateway.api.base import Call
from kernel_gateway.errors import Forbidden
from kernel_gateway.sandbox.sandboxes import Sandboxes
from kernel_gateway.sandbox.store import VARIABLE


async def figures(call: Call) -> None:
    """The server's figures in Prometheus' text format. They count the sandboxes of all keys, so few keys may read."""
    if call.mine.key.id != VARIABLE and not call.mine.key.scope.is_for_metrics:
        raise Forbidden(
            "this key may not read the server's figures", hint="`cellvm keys add --scope metrics` makes one"
        )
    call.http.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
    call.http.write(generate_latest(call.sandboxes.metrics.registry))


class Present(Collector):
    """The present state, read when it is asked for."""

    def __init__(self, sandboxes: "Sandboxes") -> None:
        self._sandboxes = sandboxes

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        sandboxes = self._sandboxes
        yield _gauge(
            "cellvm_sandboxes", "Sandboxes, by state and template.", ("state", "template"),
            Counter((str(each.state), sandboxes.templates.label(each.template)) for each in sandboxes),
        )  # fmt: skip
        yield _gauge(
            "cellvm_kernels", "Kernels of running sandboxes, by what they do.", ("state",),
            Counter((each.kernel.state,) for each in sandboxes if each.kernel is not None),
        )  # fmt: skip
        yield _gauge(
            "cellvm_pool_ready", "Machines in stock.", ("template",),
            {(pool.template_id,): pool.ready for pool in sandboxes.pools.values()},
        )  # fmt: skip
        yield GaugeMetricFamily("cellvm_places", "Machines that there may be at once.", sandboxes.places.maximum)
        yield GaugeMetricFamily(
            "cellvm_held_bytes", "Bytes in memory that wait on behalf of somebody.", sandboxes.held.size
        )
        yield GaugeMetricFamily("cellvm_disk_bytes", "Bytes of disk that sandboxes take.", sandboxes.places.disk_bytes)
        yield GaugeMetricFamily(
            "cellvm_trouble", "1 while something is amiss; GET /health says what.", float(bool(sandboxes.trouble))
        )


def _gauge(name: str, help_: str, labels: tuple[str, ...], values: dict[tuple[str, ...], int]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_, labels=labels)
    for of, value in values.items():
        gauge.add_metric(of, value)
    return gauge
