"""Every metric and every bucket list. Labels are closed sets; known values start at 0."""

from collections.abc import Iterator, Mapping
from itertools import product

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

PREFIX = "transformer_"

LANES = ("translate", "fill-mask", "generate", "classify")
ENDPOINTS = (*LANES, "next-sentence")
# What a lane's models serve.
SERVED = {lane: (lane,) for lane in LANES} | {"fill-mask": ("fill-mask", "next-sentence")}
# A request that chose no model: refused before, or for a name that nothing has.
NO_MODEL = ""
PHASES = ("prefill", "decode", "encode", "batch", "return")
OUTCOMES = ("success", "refused", "failed", "timeout", "disconnected")
REASONS = (
    *("validation", "overloaded", "draining", "too_large"),
    *("unauthorized", "forbidden", "rate_limited", "crowded", "slow_body", "not_ready"),
)
MEMORY_KINDS = ("allocated", "reserved")

DURATION_BUCKETS = tuple(round(0.001 * 1.5**k, 6) for k in range(28))  # 1 ms to 56.8 s
TOKEN_BUCKETS = tuple(round(0.0005 * 1.5**k, 6) for k in range(22))  # 0.5 ms to 2.5 s
SIZE_BUCKETS = tuple(float(2**k) for k in range(11))  # 1 to 1024
RATIO_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)

Labels = Mapping[str, tuple[str, ...]]

# Known by the name of a loaded model, for as long as it is loaded.
_MODEL: tuple[str, ...] = ()

_ENDPOINT = {"endpoint": ENDPOINTS}
_ENDPOINT_MODEL = {"endpoint": ENDPOINTS, "model": _MODEL}
_LANE = {"endpoint": LANES}
_LANE_MODEL = {"endpoint": LANES, "model": _MODEL}
_LANE_PHASE = {"endpoint": LANES, "phase": PHASES}

disable_created_metrics()  # type: ignore[no-untyped-call]


class Distribution(Histogram):
    """A histogram that takes many equal observations at the cost of one."""

    def observe_many(self, amount: float, n: int) -> None:
        """`observe`, so many times."""
        self._sum.inc(amount * n)
        for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
            if amount <= bound:
                bucket.inc(n)
                break


# Everything that counts or observes, with its known labels, for `forget_warm_up`.
_started: list[tuple[Counter | Histogram, Labels]] = []
# What tells models apart, with its known labels.
_by_model: list[tuple[Counter | Gauge, Labels]] = []
_loaded: dict[tuple[str, str], str] = {}  # endpoint and name -> sha256


def _start(metric: Counter | Gauge | Histogram, labels: Labels) -> None:
    for values in product(*labels.values()):
        metric.labels(*values)


def _counter(name: str, help_text: str, labels: Labels) -> Counter:
    metric = Counter(PREFIX + name, help_text, tuple(labels))
    _started.append((metric, labels))
    _start(metric, labels)
    if "model" in labels:
        _by_model.append((metric, labels))
    return metric


def _gauge(name: str, help_text: str, labels: Labels) -> Gauge:
    metric = Gauge(PREFIX + name, help_text, tuple(labels))
    _start(metric, labels)
    if "model" in labels:
        _by_model.append((metric, labels))
    return metric


def _histogram(name: str, help_text: str, labels: Labels, buckets: tuple[float, ...]) -> Distribution:
    metric = Distribution(PREFIX + name, help_text, tuple(labels), buckets=buckets)
    _started.append((metric, labels))
    _start(metric, labels)
    return metric


requests_total = _counter(
    "requests_total",
    "Requests answered.",
    {"endpoint": ENDPOINTS, "model": (NO_MODEL,), "outcome": OUTCOMES},
)
rejected_total = _counter("rejected_total", "Requests refused at the door.", {**_ENDPOINT, "reason": REASONS})
request_duration_seconds = _histogram(
    "request_duration_seconds",
    "From the request's first byte to the answer's last.",
    _ENDPOINT,
    DURATION_BUCKETS,
)

queue_seconds = _histogram("queue_seconds", "Waiting of one item.", _ENDPOINT, DURATION_BUCKETS)
inference_seconds = _histogram(
    "inference_seconds", "From leaving the queue to the end, one item.", _ENDPOINT, DURATION_BUCKETS
)
time_to_first_token_seconds = _histogram(
    "time_to_first_token_seconds", "From submission to the first token.", _LANE, TOKEN_BUCKETS
)
inter_token_seconds = _histogram(
    "inter_token_seconds", "Between two tokens of one item.", _LANE, TOKEN_BUCKETS
)
prompt_tokens_total = _counter("prompt_tokens_total", "Tokens taken in.", _ENDPOINT_MODEL)
reused_tokens_total = _counter(
    "reused_tokens_total", "Prompt tokens whose keys and values an earlier prompt left.", _LANE_MODEL
)
reranked_total = _counter(
    "reranked_total", "Translations of which the reranking put another first than the search.", _LANE_MODEL
)
with_examples_total = _counter(
    "with_examples_total", "Sentences translated, and texts with masks filled, after known ones.", _LANE_MODEL
)
generated_tokens_total = _counter("generated_tokens_total", "Tokens produced.", _LANE_MODEL)

batch_rows = _histogram("batch_rows", "Rows of one model step.", _LANE_PHASE, SIZE_BUCKETS)
batch_padding_ratio = _histogram(
    "batch_padding_ratio", "Padded share of one model step's tokens.", _LANE_PHASE, RATIO_BUCKETS
)
queue_items = _gauge("queue_items", "Items that wait.", _LANE_MODEL)
queue_tokens = _gauge("queue_tokens", "Tokens of the items that wait.", _LANE_MODEL)
rows_in_use = _gauge("rows_in_use", "Rows (slots) that are occupied.", _LANE_MODEL)
kv_cache_usage_ratio = _gauge("kv_cache_usage_ratio", "Occupied share of the KV cache.", _LANE_MODEL)
step_failures_total = _counter("step_failures_total", "Model steps that raised.", _LANE_MODEL)

model_bytes = _gauge(
    "model_bytes",
    "Device memory of a model: its weights, shared ones included, and the caches of its rows.",
    {**_LANE_MODEL, "kind": ("weights", "cache")},
)
device_memory_bytes = _gauge("device_memory_bytes", "Accelerator memory.", {"kind": MEMORY_KINDS})
model_info = Gauge(
    PREFIX + "model_info", "The models that are loaded; always 1.", ("endpoint", "name", "sha256")
)
build_info = Gauge(
    PREFIX + "build_info", "What runs; always 1.", ("version", "python", "torch", "device", "dtype")
)
ready = Gauge(PREFIX + "ready", "1 while the service takes new work.")


class LaneLevels:
    """What one lane adds to the gauges of its model: for a while two lanes may serve under one name."""

    def __init__(self, endpoint: str, model: str) -> None:
        self._labels = endpoint, model
        self._values: dict[Gauge, float] = {}

    def set_queue(self, n_items: int, n_tokens: int) -> None:
        self._set(queue_items, n_items)
        self._set(queue_tokens, n_tokens)

    def set_rows(self, n_rows: int, usage_ratio: float) -> None:
        self._set(rows_in_use, n_rows)
        kv_cache_usage_ratio.labels(*self._labels).set(usage_ratio)

    def _set(self, gauge: Gauge, value: float) -> None:
        gauge.labels(*self._labels).inc(value - self._values.get(gauge, 0))
        self._values[gauge] = value


def add_model(endpoint: str, name: str, sha256: str) -> None:
    """Its name becomes a known label, its series start at 0; under a name that was known they go on."""
    before = _loaded.get((endpoint, name))
    if before is not None and before != sha256:
        model_info.remove(endpoint, name, before)
    _loaded[endpoint, name] = sha256
    model_info.labels(endpoint, name, sha256).set(1)
    for metric, labels in _by_model:
        for values in _values_of(endpoint, name, labels):
            metric.labels(*values)


def set_model_bytes(endpoint: str, name: str, n_weight_bytes: int, n_cache_bytes: int) -> None:
    """What a known model takes on the device."""
    model_bytes.labels(endpoint, name, "weights").set(n_weight_bytes)
    model_bytes.labels(endpoint, name, "cache").set(n_cache_bytes)


def remove_model(endpoint: str, name: str) -> None:
    """Its series end. Nothing happens for a name that is not known."""
    sha256 = _loaded.pop((endpoint, name), None)
    if sha256 is not None:
        model_info.remove(endpoint, name, sha256)
    for metric, labels in _by_model:
        for values in _values_of(endpoint, name, labels):
            metric.remove(*values)


def is_known(endpoint: str, name: str) -> bool:
    """Is a model of this name loaded that serves the endpoint?"""
    return any((lane, name) in _loaded for lane, served in SERVED.items() if endpoint in served)


def _values_of(endpoint: str, name: str, labels: Labels) -> Iterator[tuple[str, ...]]:
    """The label values of all series of a model."""
    served = tuple(each for each in SERVED[endpoint] if each in labels["endpoint"])
    return product(*{**labels, "endpoint": served, "model": (name,)}.values())


def forget_warm_up() -> None:
    """Counters and histograms back to 0: what warmed the models up was no client's work."""
    for metric, labels in _started:
        metric.clear()
        _start(metric, labels)
    for (endpoint, name), sha256 in _loaded.items():
        add_model(endpoint, name, sha256)
