"""REST: `api` (routes), `codec`, `messages`, `guard`, the explorer. Imports `runtime`."""
