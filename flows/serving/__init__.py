"""What drives runs from Prefect: the form, deployments, server and worker, limits, questions to a person."""
