"""What the project's words are: the pydantic models that YAML, the API, the registry and the link share."""
