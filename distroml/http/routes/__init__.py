"""Every path of the API, by noun; ``ROUTES`` is what ``app`` serves and ``openapi`` describes."""
