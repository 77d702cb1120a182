"""The connectors: small networks that carry one stage's features into another stage's inputs."""
