"""Traces of requests, sent to a collector by OpenTelemetry; the extra `telemetry` brings it."""


class TelemetryError(Exception):
    """What sends traces is not installed; `str()` of it says how to go on."""


def configure() -> None:
    """Send a span for every request of this process, as the OTEL_ environment variables say.

    FastAPI makes the spans, and takes over the trace that a request's headers name. They are sent
    by OTLP over HTTP, to `OTEL_EXPORTER_OTLP_ENDPOINT`, in batches on a thread of their own.

    Raises:
        TelemetryError: the extra is not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TelemetryError(
            f"--telemetry needs the extra telemetry: pip install 'syncbn[telemetry]' ({error})"
        ) from None
    resource = Resource({SERVICE_NAME: "syncbn"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
