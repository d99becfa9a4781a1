"""What every process shares at run time: settings, the app factory, the HTTP client, logs and metrics."""
