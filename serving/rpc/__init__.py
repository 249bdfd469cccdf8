"""gRPC: `api` (servicers), `codec`, `guard`. Imports `runtime`."""
