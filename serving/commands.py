"""The commands of the service."""

from pipeline.contract.flags import Command

COMMANDS = {
    "items": Command(
        "serving.publish.settings:ItemsConfig",
        "serving.publish.items:change_items",
        "add candidates to a published model, replace and remove them",
    ),
    "serve": Command(
        "serving.settings:ServeConfig",
        "serving.server:serve",
        "serve the newest model versions over REST and gRPC",
    ),
    "query": Command(
        "serving.retrieval.settings:QueryConfig",
        "serving.retrieval.query:answer",
        "ask a published version for a top-k",
    ),
}
