"""The commands of the service."""

from pipeline.contract.flags import Command

COMMANDS = {
    "items": Command(
        "serving.publish.settings:ItemsConfig",
        "serving.publish.items:change_items",
        "add candidates to a published model, replace and remove them",
        stores="models",
    ),
    "serve": Command(
        "serving.settings:ServeConfig",
        "serving.workers:serve",
        "serve the newest model versions over REST and gRPC",
        stores="models",
        flags="models host rest_port grpc_port workers index config_file token_file",
        groups={
            "models and versions": "state_dir poll_seconds prune_versions",
            "requests": "unknown_queries max_k max_body_mb deadline_ms log_requests",
            "batches": "max_batch_size batch_timeout_micros max_enqueued_batches num_batch_threads",
            "who may ask": "admin_token_file tls_certificate tls_key",
            "the end": "lame_duck_seconds drain_seconds",
        },
    ),
    "query": Command(
        "serving.retrieval.settings:QueryConfig",
        "serving.retrieval.query:answer",
        "ask a published version for a top-k",
        stores="models",
        flags="models query k exclude_seen history set where json",
        positional="query",
    ),
}
