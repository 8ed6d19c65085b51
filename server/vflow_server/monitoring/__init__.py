"""For those who look after the service: gauges, and the side port with its metrics, readiness and status pages."""
