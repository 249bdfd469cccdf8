"""The service: a bundle becomes a version, and versions answer over REST and gRPC.

Top: `commands`, `server`, `settings`, `errors` (each refusal and its status). Imports the contract.
"""
