"""The HTTP face of a node: REST, streams, metrics, OpenAPI and the dashboard.

Reads replicated state and observed facts, proposes commands, never touches a process. ``app.HttpServer`` is
the way in; ``services.Services`` is all that it needs from a node.
"""
